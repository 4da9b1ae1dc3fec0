"""Log-probs and values of chosen tokens, against Hugging Face's own logits; what never exists in memory."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from apportion.actors.engine import DeepSpeedEngine, World
from apportion.actors.microbatch import cut, make, nothing
from apportion.actors.modules import CausalLMLogprobs, ValueModel
from apportion.platform.errors import ConfigError

VOCABULARY = 512


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.fixture
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


def wanted(model, batch, temperature):
    """Log-probs and entropies of every action token, from whole logits of one unpadded sequence at a time."""
    logprobs, entropies = [], []
    for index in range(len(batch)):
        ids = torch.from_numpy(batch.sequence(index).astype(np.int64))
        log_softmax = (model(ids[None]).logits[0].float() / temperature).log_softmax(-1)
        for step in np.flatnonzero(batch.action_mask[batch.response_slice(index)]):
            place = int(batch.prompt_lengths[index] + step)
            logprobs.append(log_softmax[place - 1, ids[place]])
            entropies.append(-(log_softmax[place - 1].exp() * log_softmax[place - 1]).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def given(module, batch, temperature, tokens, entropy_grad=False, share_prompts=False):
    """The same from micro-batches, in packed order."""
    logprobs, entropies, places = [], [], []
    for micro in cut(batch, np.arange(len(batch)), tokens, share_prompts):
        tree = (micro.tree.positions, micro.tree.visible) if micro.tree else None
        lp, entropy = module(
            micro.input_ids, micro.rows, micro.columns, micro.targets, temperature, entropy_grad, tree=tree
        )
        logprobs.append(lp)
        entropies.append(entropy)
        places.append(micro.packed_index)
    order = np.argsort(np.concatenate(places))
    return torch.cat(logprobs)[order], torch.cat(entropies)[order]


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("chunk", "tokens"), [(1000, 10_000), (3, 10_000), (1000, 20), (5, 40)])
def test_logprobs_and_entropies_are_those_of_whole_logits(model, credited, temperature, chunk, tokens, share_prompts):
    with torch.no_grad():
        logprobs, entropies = given(
            CausalLMLogprobs(model, chunk), credited, temperature, tokens, share_prompts=share_prompts
        )
        right_logprobs, right_entropies = wanted(model, credited, temperature)
    torch.testing.assert_close(logprobs, right_logprobs, atol=2e-5, rtol=0)
    torch.testing.assert_close(entropies, right_entropies, atol=2e-5, rtol=0)


@pytest.mark.parametrize("chunk", [1000, 4])
def test_gradients_are_those_of_whole_logits_whether_or_not_chunks_are_made_anew(model, credited, chunk):
    weights = torch.randn(int(credited.action_mask.sum()), generator=torch.Generator().manual_seed(0))

    def gradients(logprobs, entropies):
        model.zero_grad()
        ((logprobs * weights).sum() + 0.3 * (entropies * weights).sum()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    right = gradients(*wanted(model, credited, 0.9))
    got = gradients(*given(CausalLMLogprobs(model, chunk), credited, 0.9, 60, entropy_grad=True))
    assert right.keys() == got.keys()
    for name, gradient in right.items():
        torch.testing.assert_close(got[name], gradient, atol=3e-5, rtol=1e-4, msg=name)


def test_no_tensor_has_all_tokens_and_the_vocabulary(credited):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4, intermediate_size=24, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    micro = make(credited, np.arange(len(credited)))
    tokens, chunk = len(micro.targets), 8

    def largest(chunk_tokens: int) -> int:
        module = CausalLMLogprobs(LlamaForCausalLM(config), chunk_tokens)
        with LargestTensor() as seen:
            logprobs, _ = module(micro.input_ids, micro.rows, micro.columns, micro.targets)
            logprobs.sum().backward()
        return seen.largest

    assert tokens == 56
    assert largest(tokens) == tokens * VOCABULARY  # the measure sees what it should
    assert largest(chunk) == chunk * VOCABULARY  # the output matrix itself is 4 wide


def test_softcap_and_scale_of_the_model_are_applied_before_the_temperature(model):
    module = CausalLMLogprobs(model, 8)
    raw = torch.tensor([[1.0, -2.0]])
    module.softcap, module.logit_scale = 2.0, 3.0
    expected = torch.tanh(raw * 3.0 / 2.0) * 2.0 / 0.5
    torch.testing.assert_close(module.finished(raw, 0.5), expected)


@pytest.mark.parametrize(
    ("settings", "scale"), [({}, 1.0), ({"logits_scaling": 4.0}, 0.25), ({"logit_scale": 2.0}, 2.0)]
)
def test_the_scale_is_read_from_the_configuration(settings, scale):
    from apportion.actors.modules import _logit_scale

    assert _logit_scale(SimpleNamespace(**settings)) == scale


def test_an_idle_pass_gives_every_parameter_a_gradient_of_zero(model):
    idle = nothing()
    logprobs, _ = CausalLMLogprobs(model, 8)(idle.input_ids, idle.rows, idle.columns, idle.targets)
    (logprobs.sum() * 0.0).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_values_are_zero_before_training_and_then_a_product_with_the_state_before_each_token(model, credited):
    micro = make(credited, np.arange(len(credited)))
    values = ValueModel(model)
    assert not values(micro.input_ids, micro.rows, micro.columns).any()
    with torch.no_grad():
        values.value_head.weight.normal_(generator=torch.Generator().manual_seed(1))
        got = values(micro.input_ids, micro.rows, micro.columns)
        ids = torch.from_numpy(credited.sequence(2).astype(np.int64))
        hidden = model.model(ids[None]).last_hidden_state[0]
        start = int(credited.prompt_lengths[2]) - 1
        expected = (hidden[start : start + 12] @ values.value_head.weight[0]).float()
    torch.testing.assert_close(got[micro.rows == 2], expected, atol=1e-4, rtol=1e-4)


class Adapted(torch.nn.Linear):
    """Stands for a head that peft has wrapped."""


def test_an_adapted_head_on_sharded_ranks_is_refused_before_they_join(model, monkeypatch):
    """ZeRO-3 would gather at each chunk, of which ranks have different numbers: they would wait for ever."""
    module = CausalLMLogprobs(model, 4)
    assert not module.calls_head_by_chunk
    monkeypatch.setattr("apportion.actors.engine.join_world", lambda world, offloads: pytest.fail("joined"))
    with pytest.raises(pytest.fail.Exception, match="joined"):
        DeepSpeedEngine(module, SimpleNamespace(zero_stage=3, offload_optimizer=False), World(0, 2), 1)
    model.set_output_embeddings(Adapted(64, 264))
    adapted = CausalLMLogprobs(model, 4)
    assert adapted.calls_head_by_chunk
    with pytest.raises(
        ConfigError, match=r"policy.zero_stage: got 3 on 2 ranks with an output head that is more than a"
    ):
        DeepSpeedEngine(adapted, SimpleNamespace(zero_stage=3, offload_optimizer=False), World(0, 2), 1)
    for stage, ranks in ((2, 2), (3, 1)):
        with pytest.raises(pytest.fail.Exception, match="joined"):
            DeepSpeedEngine(adapted, SimpleNamespace(zero_stage=stage, offload_optimizer=False), World(0, ranks), 1)
