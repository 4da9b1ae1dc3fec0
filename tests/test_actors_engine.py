"""One DeepSpeed rank in this process, against a plain torch loop over the same losses. More ranks: test_system_ranks."""

import os
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from apportion.actors.engine import DeepSpeedEngine, World
from apportion.actors.engine_settings import EngineSettings
from apportion.actors.loading import load_causal_lm
from apportion.actors.lora import merged_weights
from apportion.actors.modules import CausalLMLogprobs
from apportion.actors.policy import PolicyWorker
from apportion.conf.schema import LoraConfig
from apportion.platform.errors import TrainingError

pytestmark = pytest.mark.system


@dataclass
class Settings(EngineSettings):
    learning_rate: float = 0.5
    weight_decay: float = 0.01
    adam_eps: float = 1.0  # so large that an update grows with its gradient, and a wrong scale shows
    max_grad_norm: float = 0.0
    schedule: str = "linear"
    warmup_steps: int = 1
    micro_batch_tokens: int = 64
    logits_chunk_tokens: int = 8


@pytest.fixture(scope="module", autouse=True)
def world():
    """A process group of one. It stays: DeepSpeed keeps groups made from it for as long as the process lives."""
    kept = dict(os.environ)
    os.environ.update(DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo")
    threads = torch.get_num_threads()
    yield World()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(kept)


def model_of(tiny, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)


def micro_batches(count: int) -> list[torch.Tensor]:
    """`count` micro-batches of 12 rows of tokens in all."""
    ids = torch.randint(8, 264, (12, 7), generator=torch.Generator().manual_seed(1))
    return list(ids.chunk(count))


def loss_of(forward, ids: torch.Tensor) -> torch.Tensor:
    """A sum of which 12 rows make a mean."""
    logits = forward(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / 72


def plain(tiny, steps: int, settings: Settings, rates: list[float]) -> tuple[dict[str, torch.Tensor], list[float]]:
    model = model_of(tiny)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, (settings.adam_beta1, settings.adam_beta2), settings.adam_eps,
        settings.weight_decay,
    )  # fmt: skip
    norms = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.zero_grad()
        for ids in micro_batches(1):
            loss_of(model, ids).backward()
        limit = settings.max_grad_norm or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}, norms


def trained(tiny, world, settings: Settings, steps: int, cut: int, dtype=torch.float32):
    engine = DeepSpeedEngine(model_of(tiny, dtype), settings, world, steps)
    outcomes = run(engine, steps, cut)
    return engine, outcomes


def run(engine, steps: int, cut: int) -> list:
    out = []
    for _ in range(steps):
        out.append(
            engine.train_step(micro_batches(cut), micro_batches(12)[0], lambda ids: loss_of(engine.forward, ids))
        )
    return out


RATES = [0.5, 0.5, 0.0]  # one step of warm-up, then linear to 0 over the rest


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("cut", [1, 5])
def test_updates_norms_and_rates_are_those_of_a_plain_loop_however_the_batch_is_cut(
    tiny, world, zero_stage, cut, max_grad_norm
):
    settings = Settings(zero_stage=zero_stage, max_grad_norm=max_grad_norm)
    right, norms = plain(tiny, 3, settings, RATES)
    engine, outcomes = trained(tiny, world, settings, 3, cut)
    assert [o.learning_rate for o in outcomes] == pytest.approx(RATES)
    assert [o.grad_norm for o in outcomes] == pytest.approx(norms, rel=1e-3)
    for name, weight in engine.named_weights():
        torch.testing.assert_close(weight, right[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_in_bfloat16_the_masters_keep_what_is_too_small_for_the_weights(tiny, world, zero_stage):
    # Steps of 1e-4 vanish in bf16 next to a weight of 0.1 (spacing 5e-4); ten of them must not.
    settings = Settings(
        zero_stage=zero_stage, learning_rate=1e-4, adam_eps=1e-8, weight_decay=0.0, schedule="constant", warmup_steps=0
    )
    start = {n: p.detach().clone() for n, p in model_of(tiny, torch.bfloat16).named_parameters()}
    engine, _ = trained(tiny, world, settings, 10, 3, torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    weights = {n: w.clone() for n, w in engine.named_weights()}
    moved = (weights[name].float() - start[name].float()).abs()
    large = start[name].float().abs() > 0.1
    assert weights[name].dtype == torch.bfloat16
    assert moved[large].mean().item() == pytest.approx(1e-3, rel=0.35)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_stops_the_training(tiny, world, zero_stage, bad):
    engine, _ = trained(tiny, world, Settings(zero_stage=zero_stage), 1, 1)
    with pytest.raises(TrainingError, match=r"^optimiser step 2: got a gradient that is not finite"):
        engine.train_step(micro_batches(3), micro_batches(12)[0], lambda ids: loss_of(engine.forward, ids) * bad)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_saved_engine_goes_on_as_if_it_had_not_stopped(tiny, world, tmp_path, zero_stage):
    settings = Settings(zero_stage=zero_stage, max_grad_norm=1.0, adam_eps=1e-3, learning_rate=1e-2)
    straight, _ = trained(tiny, world, settings, 4, 3)
    half = DeepSpeedEngine(model_of(tiny), settings, world, 4)
    run(half, 2, 3)
    half.save(tmp_path)
    again = DeepSpeedEngine(model_of(tiny), settings, world, 4)
    again.load(tmp_path)
    assert again.optimizer_steps == 2
    run(again, 2, 3)
    resumed = {n: w.clone() for n, w in again.named_weights()}
    for name, weight in straight.named_weights():
        assert torch.equal(weight, resumed[name]), name


# What conf.defaults sets on a GPU, with a smaller bucket
GPU = {"fused_adam": True, "overlap_comm": True, "bucket_elements": 30_000}


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_fused_adam_takes_the_steps_of_foreach_under_every_stage(tiny, world, zero_stage):
    """Also with a bucket that all weights together do not fit into."""
    common, dtype = {"zero_stage": zero_stage, "max_grad_norm": 0.05}, torch.bfloat16
    plainly, right = trained(tiny, world, Settings(**common), 3, 5, dtype)
    engine, outcomes = trained(tiny, world, Settings(**common, **GPU), 3, 5, dtype)
    assert fused_flags(engine) == [(True, False)] and fused_flags(plainly) == [(False, True)]
    assert [o.grad_norm for o in outcomes] == pytest.approx([o.grad_norm for o in right], rel=1e-3)
    expected = {n: w.clone() for n, w in plainly.named_weights()}
    moved = 0.0
    start = dict(model_of(tiny, dtype).named_parameters())
    for name, weight in engine.named_weights():
        torch.testing.assert_close(weight, expected[name], msg=lambda m, n=name: f"{n}: {m}")
        moved = max(moved, (weight.float() - start[name].float()).abs().max().item())
    assert moved > 1e-3


def fused_flags(engine) -> list[tuple[bool, bool]]:
    return [(group["fused"], group["foreach"]) for group in engine._engine.basic_optimizer.param_groups]


@pytest.mark.parametrize(("zero_stage", "fused"), [(0, True), (2, True), (2, False), (3, True)])
def test_a_resumed_engine_steps_with_its_own_kernel_not_the_checkpoints(tiny, world, tmp_path, zero_stage, fused):
    def settings(fused: bool) -> Settings:
        return Settings(zero_stage=zero_stage, adam_eps=1e-3, learning_rate=1e-2, fused_adam=fused)

    straight, _ = trained(tiny, world, settings(fused), 4, 3, torch.bfloat16)
    half = DeepSpeedEngine(model_of(tiny, torch.bfloat16), settings(not fused), world, 4)
    run(half, 2, 3)
    half.save(tmp_path)
    again = DeepSpeedEngine(model_of(tiny, torch.bfloat16), settings(fused), world, 4)
    again.load(tmp_path)
    run(again, 2, 3)
    assert fused_flags(again) == [(fused, not fused)]
    resumed = {n: w.clone() for n, w in again.named_weights()}
    for name, weight in straight.named_weights():
        torch.testing.assert_close(weight, resumed[name], msg=lambda m, n=name: f"{n}: {m}")


def test_resuming_from_nothing_is_refused(tiny, world, tmp_path):
    engine = DeepSpeedEngine(model_of(tiny), Settings(), world, 1)
    with pytest.raises(FileNotFoundError, match=r"no training state under .*, expected a folder 'engine'"):
        engine.load(tmp_path)


def test_an_optimiser_in_main_memory_accumulates_like_the_others(tiny, world):
    for stage in (1, 2, 3):
        settings = Settings(zero_stage=stage, offload_optimizer=True)
        right, norms = plain(tiny, 2, settings, [0.5, 0.5])
        engine = DeepSpeedEngine(model_of(tiny), settings, world, 3)
        outcomes = run(engine, 2, 5)
        assert [o.grad_norm for o in outcomes] == pytest.approx(norms, rel=1e-3)
        for name, weight in engine.named_weights():
            torch.testing.assert_close(weight, right[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_idle_passes_are_those_that_another_rank_makes_more(tiny, world):
    engine = DeepSpeedEngine(model_of(tiny), Settings(zero_stage=3), world, 1)
    assert [engine.extra_passes(own) for own in (0, 1, 5)] == [0, 0, 0]
    assert DeepSpeedEngine(model_of(tiny), Settings(zero_stage=2), world, 1).extra_passes(0) == 0


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_score_with_merged_adapters_is_that_of_the_sent_weights_and_changes_nothing(tiny, world, zero_stage):
    """Between two updates, whose gradients and weights are as without the score."""
    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.0, targets=["q_proj", "down_proj"])
    ids, updates = np.arange(20, 60, dtype=np.int32), []
    for scores in (True, False):
        torch.manual_seed(3)
        module = CausalLMLogprobs(load_causal_lm(tiny, "bfloat16", lora=lora), 8)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        worker = PolicyWorker.__new__(PolicyWorker)
        worker.spec = SimpleNamespace(lora=lora)
        worker.engine = DeepSpeedEngine(module, Settings(zero_stage=zero_stage), world, 4)

        def step(engine=worker.engine):
            whole = torch.from_numpy(ids.astype(np.int64))
            places = torch.arange(len(ids) - 1)
            engine.train_step(
                [None],
                None,
                lambda _: -engine.forward(whole[None], torch.zeros_like(places), places, whole[1:], 1.0)[0].mean(),
            )

        step()
        if scores:
            plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
            for name, weight in merged_weights(worker.engine.named_weights(), lora):
                plain.get_parameter(name).data.copy_(weight)
            with torch.no_grad():
                logits = plain(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1].float()
            right = logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:].astype(np.int64))]
            np.testing.assert_allclose(worker.score(ids), right.numpy(), atol=2e-5, rtol=0)
        step()
        updates.append({name: weight.clone() for name, weight in worker.engine.named_weights()})
    assert all(torch.equal(weight, updates[1][name]) for name, weight in updates[0].items())


def test_engines_of_stage_3_allocate_what_there_is_to_send(tiny, world):
    model = model_of(tiny)
    trained_elements = sum(p.numel() for p in model.parameters())
    engine = DeepSpeedEngine(model, Settings(zero_stage=3), world, 1)
    [bucket] = engine._engine.optimizer.ipg_buckets.values()
    assert bucket.buffer.numel() == trained_elements  # DeepSpeed's default, 5e8, takes 2 GB of addresses
