"""The same batch trained on one and two ranks, in large and small micro-batches, at every ZeRO stage: the same update.

Real DeepSpeed on real Ray actors over gloo. The shards are as uneven as they can be: the second rank has one trajectory,
and nothing at all in the second optimiser step, so it makes passes only to keep pace.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from apportion.actors.critic import CriticSpec, CriticWorker
from apportion.actors.engine import World
from apportion.actors.engine_settings import EngineSettings
from apportion.actors.lora import merged_weights
from apportion.actors.policy import LossSpec, PolicySpec, PolicyWorker
from apportion.actors.preference import PreferenceSpec, PreferenceWorker, ReferenceLogprobs, StepReport, StepShare
from apportion.algorithms.correction import ImportanceCorrection
from apportion.algorithms.preference import Dpo, RewardModel
from apportion.batch import Batch, Signals, Totals
from apportion.data.pair_tokens import Answer, EncodedExample, PreferenceData, pack
from apportion.platform.cluster import ActorRequest, Cluster, gather

pytestmark = pytest.mark.system


@dataclass
class Settings(EngineSettings):
    learning_rate: float = 1.0
    adam_eps: float = 1.0  # so large that an update grows with its gradient, and a wrong scale shows
    max_grad_norm: float = 0.0
    micro_batch_tokens: int = 10_000


@dataclass
class Lora:
    rank: int = 4
    alpha: float = 8.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])


@dataclass
class Outcome:
    """What one rank says of signals, update and weights."""

    first: np.ndarray  # [R], the pass before the update: old log-probs, or values
    totals: Totals
    grad_norms: list[float]
    weights: dict[str, np.ndarray]  # of rank 0
    reloaded: dict[str, np.ndarray] | None = None  # the same from a checkpoint


class PolicyRank(PolicyWorker):
    """A rank that is set up anew for every case, in one process group."""

    def __init__(self) -> None:
        pass

    def trained(self, spec: PolicySpec, world: World, shard: Batch, folder: str | None) -> Outcome:
        self.spec = spec
        self.setup(world)
        _, signals = self.signals(shard)
        report = self.update(shard, 2, 0.2)
        outcome = Outcome(signals.old_logprobs, report.totals, [s.grad_norm for s in report.steps], self._copied())
        if folder is not None:
            self.save(folder)
            self.setup(world)
            self.load(folder)
            outcome.reloaded = self._copied()
        return outcome

    def seen(self, spec: PolicySpec, world: World, shard: Batch) -> Signals:
        self.spec = spec
        self.setup(world)
        return self.signals(shard)[1]

    def _copied(self) -> dict[str, np.ndarray]:
        return {
            n: w.detach().float().numpy().copy() for n, w in merged_weights(self.engine.named_weights(), self.spec.lora)
        }


class PreferenceRank(PreferenceWorker):
    def __init__(self) -> None:
        pass

    def begin(self, spec: PreferenceSpec, world: World, data: PreferenceData, own: np.ndarray) -> ReferenceLogprobs:
        self.spec, self.objective, self.reference = spec, spec.objective, None
        self.setup(world)
        self.load_data(data, data)
        return self.reference_logprobs(own, own)[1] if self.objective.needs_reference else ReferenceLogprobs(*[[]] * 2)

    def finish(
        self, references: list[ReferenceLogprobs], share: StepShare
    ) -> tuple[StepReport, StepReport, dict[str, np.ndarray]]:
        if self.objective.needs_reference:
            self.set_reference(*references)
        update = self.update(share)
        return (
            update,
            self.evaluate(share.examples),
            {n: w.numpy().copy() for n, w in merged_weights(self.engine.named_weights(), self.spec.lora)},
        )


class CriticRank(CriticWorker):
    def __init__(self) -> None:
        pass

    def trained(self, spec: CriticSpec, world: World, shard: Batch, folder: str | None) -> Outcome:
        self.spec = spec
        self.setup(world)
        _, signals = self.signals(shard)
        report = self.update(shard, 2)
        weights = {n: w.detach().float().numpy().copy() for n, w in self.engine.named_weights()}
        first = np.concatenate([signals.values, signals.bootstrap_values])
        return Outcome(first, report.totals, [s.grad_norm for s in report.steps], weights)


LOSS = LossSpec(
    surrogate={"name": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "ratio": "token"},
    temperature=0.8,
    kl_in_loss=True,
    kl_estimator="k3",
    entropy_coefficient=0.02,
    correction=ImportanceCorrection(),
    mismatch_bound=0.5,
    epochs=1,
)


def policy_spec(tiny: str, lora: Lora | None = None, share_prompts: bool = False, loss=LOSS, **settings) -> PolicySpec:
    return PolicySpec(tiny, "float32", "sdpa", False, lora, Settings(**settings), loss, 2, share_prompts)


@dataclass
class Ranks:
    """One process alone and two that belong together, for the policy and for the critic."""

    alone: list
    pair: list
    broken: bool = False  # ranks that lost each other wait for ever

    def trained(self, spec, batch: Batch, count: int, folder: Path | None = None) -> Outcome:
        """The outcome of a case, the ranks' parts put together: sums added, the first pass in the batch's order."""
        parts = [np.arange(len(batch))] if count == 1 else [np.array([0, 1, 2, 3, 4, 6, 7]), np.array([5])]
        outcomes = self.ask("trained", spec, [(batch.select(part), folder and str(folder)) for part in parts])
        whole = outcomes[0]
        for other in outcomes[1:]:
            whole.totals.merge(other.totals)
            assert other.grad_norms == pytest.approx(whole.grad_norms, rel=1e-5)
        if count == 2 and len(whole.first) + len(outcomes[1].first) == len(batch.action_mask):
            ordered = np.zeros(len(batch.action_mask), np.float32)
            for part, outcome in zip(parts, outcomes, strict=True):
                places = np.concatenate([np.arange(len(ordered))[batch.response_slice(i)] for i in part])
                ordered[places] = outcome.first
            whole.first = ordered
        return whole

    def ask(self, method: str, spec, arguments: list[tuple]) -> list:
        """What one rank or two answer that are set up anew, each with arguments of its own."""
        [(address, port)] = gather([self.ranks(arguments)[0].call("free_port", True)], 60, "meeting")
        worlds = [World(rank, len(arguments), address, port, 1) for rank in range(len(arguments))]
        return self.go_on(method, [(spec, world, *own) for world, own in zip(worlds, arguments, strict=True)])

    def go_on(self, method: str, arguments: list[tuple]) -> list:
        """The same of ranks that are set up."""
        if self.broken:
            pytest.fail("an earlier case has left its ranks waiting for each other")
        calls = [rank.call(method, *own) for rank, own in zip(self.ranks(arguments), arguments, strict=True)]
        self.broken = True
        outcomes = gather(calls, 120, "a case")
        self.broken = False
        return outcomes

    def ranks(self, arguments: list[tuple]) -> list:
        return self.alone if len(arguments) == 1 else self.pair


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    started = Cluster(None, "ranks", 3, tmp_path_factory.mktemp("logs"), 0.2)
    yield started
    started.shutdown()


def start(cluster: Cluster, cls: type) -> Ranks:
    environment = {
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    requests = [ActorRequest(f"{cls.__name__}-{i}", cls, (), 0, 0, environment) for i in range(3)]
    actors = cluster.start(requests, 120)
    return Ranks(actors[:1], actors[1:])


@pytest.fixture(scope="module")
def policy(cluster):
    return start(cluster, PolicyRank)


@pytest.fixture(scope="module")
def reference(policy, tiny, credited):
    """One rank, ZeRO 0, each optimiser step in one micro-batch."""
    return policy.trained(policy_spec(tiny), credited, 1)


def same(got: Outcome, right: Outcome, start: dict[str, np.ndarray] | None = None) -> None:
    np.testing.assert_allclose(got.first, right.first, atol=3e-5)
    assert got.grad_norms == pytest.approx(right.grad_norms, rel=2e-4)
    got_means, right_means = got.totals.means(), right.totals.means()
    assert got_means.keys() == right_means.keys()
    for name, value in right_means.items():
        assert got_means[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert got.totals.sums["policy/loss"] == pytest.approx(right.totals.sums["policy/loss"], rel=1e-4, abs=1e-6)
    assert got.weights.keys() == right.weights.keys()
    for name, weight in right.weights.items():
        np.testing.assert_allclose(got.weights[name], weight, atol=3e-6, rtol=1e-4, err_msg=name)


SMALL = {
    "micro_batch_tokens": 20,
    "logits_chunk_tokens": 5,
}  # so that ranks make different numbers of passes and chunks
CASES = {
    "small micro-batches": (1, SMALL),
    "a prompt once for its group": (1, {"share_prompts": True, "micro_batch_tokens": 60}),
    "gradient checkpointing": (1, {"gradient_checkpointing": True, "zero_stage": 2}),
    "two ranks": (2, SMALL),
    "two ranks, ZeRO 1": (2, {"zero_stage": 1, **SMALL}),
    "two ranks, ZeRO 2": (2, {"zero_stage": 2, **SMALL}),
    "two ranks, ZeRO 3": (2, {"zero_stage": 3, **SMALL}),
    "two ranks, ZeRO 3, checkpointing": (2, {"zero_stage": 3, "gradient_checkpointing": True, **SMALL}),
    "two ranks, ZeRO 2, optimiser in main memory": (2, {"zero_stage": 2, "offload_optimizer": True, **SMALL}),
}


@pytest.mark.parametrize("case", CASES)
def test_any_cut_over_ranks_and_micro_batches_gives_the_same_update(policy, reference, tiny, credited, case):
    ranks, settings = CASES[case]
    same(policy.trained(policy_spec(tiny, **settings), credited, ranks), reference)


def test_the_update_is_large_enough_for_a_difference_to_show(reference, tiny):
    from transformers import AutoModelForCausalLM

    start = {
        n: p.detach().numpy()
        for n, p in AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).named_parameters()
    }
    moved = {n: float(np.abs(reference.weights[n] - start[n]).max()) for n in start}
    assert min(moved.values()) > 1e-4
    assert reference.totals.means()["policy/ratio_mean"] != pytest.approx(1.0, abs=1e-3)


def test_rows_without_credit_are_left_out_and_change_nothing(policy, tiny, credited):
    loss = replace(LOSS, kl_in_loss=False, entropy_coefficient=0.0)
    idle = replace(credited, advantages=credited.advantages.copy())
    for row in (1, 5):
        idle.advantages[idle.response_slice(row)] = 0
    spec = policy_spec(tiny, loss=loss, zero_stage=3, **SMALL)
    without, with_ = policy.trained(spec, idle, 2), policy.trained(replace(spec, settings=Settings()), idle, 1)
    for name, weight in with_.weights.items():
        np.testing.assert_allclose(without.weights[name], weight, atol=3e-6, rtol=1e-4, err_msg=name)


def test_a_rank_without_anything_to_learn_looks_at_its_engine_while_the_others_keep_pace(policy, tiny, credited):
    """Row 5 is the second rank's alone, and without old log-probs it takes a pass that every ZeRO-3 rank has to make."""
    loss = replace(LOSS, kl_in_loss=False, entropy_coefficient=0.0)
    idle = replace(credited, advantages=credited.advantages.copy(), old_logprobs=None)
    idle.advantages[idle.response_slice(5)] = 0
    apart = policy.trained(policy_spec(tiny, loss=loss, zero_stage=3, **SMALL), idle, 2)
    others = policy.trained(policy_spec(tiny, loss=loss), idle, 1)  # one rank passes over the rows that teach alone
    span = idle.response_slice(5)
    mask = idle.action_mask[span]
    looked = (idle.behavior_logprobs[span] - apart.first[span])[mask]
    assert apart.totals.weights["mismatch/kl"] == others.totals.weights["mismatch/kl"] + mask.sum()
    expected = others.totals.sums["mismatch/kl"] + looked.sum()
    assert apart.totals.sums["mismatch/kl"] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_adapters_learn_the_same_on_two_sharded_ranks_and_are_merged_saved_and_resumed(
    policy, tiny, credited, tmp_path
):
    from transformers import AutoModelForCausalLM

    right = policy.trained(policy_spec(tiny, Lora()), credited, 1)
    # Different seeds would draw different adapters; B starts at 0, so the first step alone is blind to them.
    sharded = policy.trained(policy_spec(tiny, Lora(), zero_stage=3, **SMALL), credited, 2, tmp_path)
    same(sharded, right)
    for name, weight in sharded.weights.items():
        np.testing.assert_array_equal(sharded.reloaded[name], weight, err_msg=name)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for name, parameter in saved.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), sharded.weights[name], err_msg=name)
    start = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    changed = {
        n.split(".")[-2]
        for n, p in start.named_parameters()
        if not np.array_equal(p.detach().numpy(), sharded.weights[n])
    }
    assert changed == {"q_proj", "v_proj"}


def test_a_critic_on_two_sharded_ranks_learns_what_it_learns_on_one(cluster, tiny, credited):
    critic = start(cluster, CriticRank)
    spec = CriticSpec(tiny, "float32", "sdpa", False, Settings(), 0.2, 1, 2)
    right = critic.trained(spec, credited, 1)
    got = critic.trained(replace(spec, settings=Settings(zero_stage=3, micro_batch_tokens=20)), credited, 2)
    assert got.grad_norms == pytest.approx(right.grad_norms, rel=2e-4)
    assert got.totals.sums["critic/loss"] == pytest.approx(right.totals.sums["critic/loss"], rel=1e-4)
    assert right.grad_norms[0] > 0
    for name, weight in right.weights.items():
        np.testing.assert_allclose(got.weights[name], weight, atol=3e-6, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(("first", "zero_stage"), [(6, 3), (8, 3), (5, 3), (3, 0)])
def test_influences_on_two_ranks_are_those_of_one(policy, tiny, credited, first, zero_stage):
    """With whole groups the second rank has one of four, or nothing, and makes passes only to keep pace; with an odd
    number of rows, a group is half on one rank and half on the other."""
    spec = replace(policy_spec(tiny), credit={"name": "hidden_reward", "p": 0.2})
    [right] = policy.ask("seen", spec, [(credited,)])
    sharded = replace(spec, settings=Settings(zero_stage=zero_stage, **SMALL))
    cut = [credited.select(np.arange(first)), credited.select(np.arange(first, 8))]
    parts = policy.ask("seen", sharded, [(part,) for part in cut])
    assert np.count_nonzero(right.influences) > 20
    for name in ("old_logprobs", "entropies", "influences"):
        got = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_allclose(got, getattr(right, name), atol=3e-5, rtol=1e-4, err_msg=name)


def pairs() -> PreferenceData:
    rng = np.random.default_rng(3)

    def drawn(length: int) -> np.ndarray:
        return rng.integers(8, 264, length).astype(np.int32)

    lengths = [(3, 5, 2), (7, 1, 4), (2, 9, 9), (5, 3, 6)]
    return pack(
        [
            EncodedExample(f"p:{i}", drawn(p), [Answer(drawn(n), np.zeros(n, np.int32), "") for n in answers])
            for i, (p, *answers) in enumerate(lengths)
        ]
    )


@pytest.fixture(scope="module")
def preference(cluster):
    return start(cluster, PreferenceRank)


@pytest.mark.parametrize("objective", [Dpo(), RewardModel()], ids=lambda objective: objective.name)
def test_a_preference_stage_on_two_sharded_ranks_learns_what_it_learns_on_one(preference, tiny, objective):
    data, ranks = pairs(), preference

    def trained(settings: Settings, parts: list[np.ndarray]):
        spec = PreferenceSpec(tiny, "float32", "sdpa", False, None, settings, objective, None, 2, 0)
        references = ranks.ask("begin", spec, [(data, part) for part in parts])
        shares = [StepShare(part, np.full(len(part), 0.25, np.float32)) for part in parts]
        updates, evaluations, weights = zip(
            *ranks.go_on("finish", [(references, share) for share in shares]), strict=True
        )
        update, evaluation = Totals(), Totals()
        for mine, held_out in zip(updates, evaluations, strict=True):
            update.merge(mine.totals)
            evaluation.merge(held_out.totals)
        return update, evaluation, updates[0].step.grad_norm, weights[0]

    right = trained(Settings(), [np.arange(4)])
    got = trained(Settings(zero_stage=3, **SMALL), [np.arange(3), np.array([3])])
    assert got[0].means() == pytest.approx(right[0].means(), rel=1e-3, abs=1e-5)
    assert got[0].sums[f"{objective.name}/loss"] == pytest.approx(right[0].sums[f"{objective.name}/loss"], rel=1e-4)
    assert got[1].means() == pytest.approx(right[1].means(), rel=1e-3, abs=1e-5)
    assert right[2] > 0.1
    assert got[2] == pytest.approx(right[2], rel=2e-4)
    assert got[3].keys() == right[3].keys()
    for name, weight in right[3].items():
        np.testing.assert_allclose(got[3][name], weight, atol=3e-6, rtol=1e-4, err_msg=name)
