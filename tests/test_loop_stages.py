"""The loop's stages with actors that answer in place: what each is asked, and what skips a stage or stops the run."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from judge_parts import prompt, trajectory

from apportion.actors.credit import CreditSpec, CreditWorker
from apportion.actors.engine import OptimizerStep
from apportion.actors.policy import UpdateReport
from apportion.actors.rollout import RolloutReport
from apportion.actors.scoring import ScoreReport
from apportion.algorithms.kl import KlCoefficient
from apportion.batch import Batch, Signals, Totals
from apportion.loop.state import Actors, LoopSettings
from apportion.platform.checkpoint import CheckpointStore
from apportion.platform.cluster import Call
from apportion.platform.errors import RewardError, WeightSyncError
from apportion.platform.weights import SyncReceipt, WeightBundle
from apportion.trainer import Trainer

TENSORS = {"a.weight": torch.arange(6, dtype=torch.float32), "b.weight": torch.ones(4, dtype=torch.bfloat16)}
GRPO = {"name": "grpo", "normalize": "std", "eps": 1e-6}
GAE = {"name": "gae", "gamma": 1.0, "gae_lambda": 0.95, "whiten": "sample"}


class InPlace:
    """An actor whose methods run when they are called, and what it was asked; what Ray would send is pickled."""

    def __init__(self, name, target):
        self.name, self.target, self.asked = name, target, []

    def call(self, method, *arguments, returns=1):
        sent = pickle.loads(pickle.dumps(arguments))
        self.asked.append((method, *sent))
        answer = getattr(self.target, method)(*sent)
        return Call(self, method, list(answer) if returns != 1 else [answer])

    @property
    def methods(self):
        return [method for method, *_ in self.asked]

    def arguments(self, method):
        return [tuple(sent) for asked, *sent in self.asked if asked == method]


class Engine:
    """Samples "a", "b", ... for every prompt; holds other checksums than the sent ones or an older version, or leaves
    tensors unproved, if told."""

    def __init__(self, name, other=None, behind=0, unproved=()):
        self.name, self.other, self.behind, self.unproved = name, other or {}, behind, unproved

    def generate(self, prompts, first_group, responses, sampling):
        rows = [
            trajectory("ab"[i], prompt=p.prompt_id, sample=i, group=first_group + g)
            for g, p in enumerate(prompts)
            for i in range(responses)
        ]
        return RolloutReport(0.1, 2 * len(rows), len(rows)), Batch.from_trajectories(rows)

    def load_weights(self, bundle, check):
        return self.receive_weights(bundle.entries, bundle.version, check)

    def receive_weights(self, entries, version, check):
        held = {e.name: e.checksum for e in entries} | self.other
        proved = [e.name for e in entries if e.name not in self.unproved] if check else None
        return SyncReceipt(self.name, version - self.behind, held, len(entries), [], proved, 10)


class Scorer:
    """1 for each response in the groups that are `alike`; elsewhere for the first one alone."""

    def __init__(self, alike=()):
        self.alike = list(alike)

    def score(self, batch, prompts):
        rewards = np.where(np.isin(batch.group_ids, self.alike), 1.0, batch.sample_indices == 0)
        scored = replace(batch, rewards=rewards, sample_mask=np.ones(len(batch), bool))
        return ScoreReport(samples=len(batch), scored=len(batch)), scored


class Rank:
    """A rank of the policy, the critic or the reference: answers what the stages ask, trains nothing."""

    def __init__(self, channel=False, **signals):
        self.channel, self.values = channel, signals

    def weights(self, version):
        bundle = WeightBundle.pack(TENSORS.items(), version)
        return bundle.entries, None if self.channel else bundle

    def send_weights(self):
        return None

    def signals(self, shard):
        tokens = int(shard.response_lengths.sum())
        made = {name: np.full(tokens, value, np.float32) for name, value in self.values.items()}
        return 0.1, Signals(**made)

    def update(self, shard, minibatches, kl_coefficient=0.0):
        return UpdateReport(Totals(), [OptimizerStep(1.0, 0.5)] * minibatches, shard.tokens, 0.1)


class Prompts:
    """A stream without an end."""

    skipped: dict[str, int] = {}
    reasoning_left_out = 0

    def __init__(self):
        self.drawn = 0

    def next_batch(self, count):
        self.drawn += count
        return [prompt(name=f"p{i}") for i in range(self.drawn - count, self.drawn)]

    def state(self):
        return {"drawn": self.drawn}


def credit_worker(credit, selection=(), kl_in_reward=False):
    return CreditWorker(CreditSpec(credit, {"name": "token_mean"}, [], list(selection), kl_in_reward, "k1", ""))


def actors_of(credit=None, alike=(), engines=1, **others):
    rollout = [InPlace(f"rollout-{i}", Engine(f"rollout-{i}")) for i in range(engines)]
    credits = InPlace("credit-0", credit or credit_worker(GRPO))
    parts = {"rollout": rollout, "policy": [InPlace("policy-0", Rank())]} | others
    return Actors(reward=[InPlace("reward-0", Scorer(alike))], credit=credits, **parts)


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr("apportion.trainer.gather", lambda calls, seconds, what: [call.refs[0] for call in calls])

    def make(actors, kl=None, **changes):
        values = {
            "steps": 3, "prompts_per_step": 2, "responses_per_prompt": 2, "sampling": None, "minibatches": 1,
            "policy_signals": False, "selects": False, "max_failed_share": 0.1, "sync_check": True,
            "sync_unproved": [],
            "call_timeout_seconds": 60.0, "critic_only_steps": 0, "samples_shown": 0, "max_minutes": None,
            "checkpoint_every": 0, "checkpoint_minutes": None, "checkpoint_final": False, "seeds": {"run": 0}, "ranks": {}, "max_failed_critiques": 1.0,
            "parts": 1,
        }  # fmt: skip
        rows = []
        tracker = SimpleNamespace(
            log=lambda step, row: rows.append(row), log_samples=lambda step, samples: None, warn=pytest.fail
        )
        settings, store = LoopSettings(**(values | changes)), CheckpointStore(tmp_path / "checkpoints")
        return Trainer(actors, Prompts(), settings, kl or KlCoefficient(0.0), tracker, store), rows

    return make


# the weight proof


@pytest.mark.parametrize("channel", [False, True], ids=["object store", "channel"])
def test_every_engine_gets_the_weights_of_the_version_and_is_told_whether_to_look_at_its_live_model(make, channel):
    policy = [InPlace(f"policy-{i}", Rank(channel)) for i in range(2)]
    trainer, _ = make(actors_of(engines=2, policy=policy), sync_check=False)
    trainer.progress.policy_version = 7
    trainer._sync()
    sent = WeightBundle.pack(TENSORS.items(), 7)
    asked = ["receive_weights"] if channel else ["load_weights"]
    for engine in trainer.actors.rollout:
        assert engine.methods == asked
        given = engine.asked[0][1:]
        if channel:
            assert given == (sent.entries, 7, False)
        else:
            assert (given[0].entries, given[0].version, given[1]) == (sent.entries, 7, False)
    assert [rank.methods for rank in policy] == [["weights", "send_weights"] if channel else ["weights"], ["weights"]]
    assert [rank.arguments("weights") for rank in policy] == [[(7,)], [(7,)]]
    size = 6 * 4 + 4 * 2
    assert trainer._sent == {"weights/bytes": size, "sync/sent_bytes": size}  # nothing was asked of the engines


def test_a_tensor_that_the_user_accepts_may_stay_unproved_and_shows_in_the_figures(make):
    actors = actors_of(engines=2, policy=[InPlace("policy-0", Rank())])
    actors.rollout[1].target = Engine("rollout-1", unproved=["b.weight"])
    trainer, _ = make(actors, sync_unproved=["b.*"])
    trainer._sync()
    proved = next(t.nbytes for n, t in TENSORS.items() if n != "b.weight")
    assert trainer._sent == {
        "weights/bytes": 32,
        "sync/sent_bytes": 32,
        "sync/proved_bytes": proved,
        "sync/read_bytes": 10,
    }


@pytest.mark.parametrize("channel", [False, True], ids=["object store", "channel"])
@pytest.mark.parametrize(
    ("odd", "line"),
    [
        (
            {"other": {"b.weight": "0" * 16}},
            "rollout-1: 1 of 2 tensors are not the trainer's after sync 1: b.weight; "
            "the engine's samples would come from another policy",
        ),
        ({"behind": 1}, "rollout-1: holds weights version 0, expected 1"),
        (
            {"unproved": ["b.weight"]},
            "rollout-1: 1 of 2 sent tensors were not compared with a live parameter in sync 1: b.weight; the engine may still "
            "hold earlier weights. If you accept that, list their names or patterns in train.sync_unproved",
        ),
    ],
)
def test_an_engine_without_the_trainers_weights_stops_the_run_before_it_samples(make, channel, odd, line):
    actors = actors_of(engines=2, policy=[InPlace("policy-0", Rank(channel))])
    actors.rollout[1].target = Engine("rollout-1", **odd)
    trainer, rows = make(actors, checkpoint_final=True)
    trainer.progress.step = trainer.progress.policy_version = 1
    with pytest.raises(WeightSyncError) as stopped:
        trainer.run()
    assert str(stopped.value) == line
    assert [len(engine.methods) for engine in actors.rollout] == [1, 1] and trainer.prompts.drawn == 0
    assert rows == [] and trainer.store.steps() == []


# rounds of sampling


def dynamic(alike):
    return actors_of(credit_worker(GRPO, [{"name": "dynamic_sampling", "by": "auto"}]), alike)


def first_groups(trainer):
    return [first_group for _, first_group, *_ in trainer.actors.rollout[0].arguments("generate")]


def test_groups_that_selection_drops_are_made_up_for_by_a_further_round_with_groups_of_its_own(make):
    trainer, _ = make(dynamic([0]), selects=True)
    experience = trainer._collect()
    asked = trainer.actors.rollout[0].arguments("generate")
    assert [[p.prompt_id for p in prompts] for prompts, *_ in asked] == [["p0", "p1"], ["p2", "p3"]]
    assert first_groups(trainer) == [0, 2]
    assert [sorted(set(b.group_ids.tolist())) for b in experience.admitted] == [[1], [2, 3]]
    counted = {
        name: experience.totals.sums[f"rollout/{name}"] for name in ("prompts", "groups_dropped", "trajectories")
    }
    assert counted == {"prompts": 4, "groups_dropped": 1, "trajectories": 8}
    assert (experience.groups, experience.sampled_tokens, trainer.progress.rollout_tokens) == (3, 16, 16)
    [shard], cut = trainer._cut(experience)
    assert shard.group_ids.tolist() == [1, 1, 2, 2] and cut.trajectories == 4  # two were wanted
    assert experience.totals.sums["rollout/groups_surplus"] == 1


def test_where_all_groups_are_alike_eight_rounds_are_made_and_the_run_stops(make):
    trainer, _ = make(dynamic(range(100)), selects=True)
    with pytest.raises(RewardError, match=r"^selection: no group of this step is left to train on"):
        trainer._collect()
    assert first_groups(trainer) == [0, 2, 4, 6, 8, 10, 12, 14]


def test_a_step_trains_on_the_groups_that_eight_rounds_have_left(make):
    trainer, _ = make(dynamic({*range(100)} - {5}), selects=True)
    experience = trainer._collect()
    assert first_groups(trainer)[-1] == 14 and experience.groups == 1
    assert [b.group_ids.tolist() for b in experience.admitted] == [[5, 5]]
    assert experience.totals.sums["rollout/groups_dropped"] == 15


def test_without_selection_one_round_is_made_though_a_group_has_no_reward(make):
    class Unsure(Scorer):
        def score(self, batch, prompts):
            report, scored = super().score(batch, prompts)
            return report, replace(scored, sample_mask=batch.group_ids > 0)

    actors = actors_of()
    actors.reward[0].target = Unsure()
    trainer, _ = make(actors)
    experience = trainer._collect()
    assert first_groups(trainer) == [0] and experience.groups == 1
    assert [b.group_ids.tolist() for b in experience.admitted] == [[1, 1]]


# passes before the credit


class Named:
    def __init__(self, name):
        self.name = name

    def signals(self, shard):
        return 0.1, f"{self.name} of {shard}"


@pytest.mark.parametrize("policy_signals", [True, False])
def test_signals_are_those_that_are_needed_pass_by_pass_and_shard_by_shard(make, policy_signals):
    def ranks(role, count):
        return [InPlace(f"{role}-{i}", Named(f"{role}-{i}")) for i in range(count)]

    actors = actors_of(policy=ranks("policy", 3), reference=ranks("reference", 2), critic=ranks("critic", 3))
    trainer, _ = make(actors, policy_signals=policy_signals)
    own = ["policy-0 of x", "policy-1 of y", "policy-2 of z"] if policy_signals else []
    frozen = ["reference-0 of x", "reference-1 of y", "reference-0 of z"]
    critic = ["critic-0 of x", "critic-1 of y", "critic-2 of z"]
    assert trainer._signals(["x", "y", "z"]) == own + frozen + critic
    actors.reference = actors.critic = []
    assert trainer._signals(["x", "y", "z"]) == own


# updates


def test_a_critic_that_warms_up_is_trained_alone_and_the_policy_joins_it_after_that(make):
    critic = InPlace("critic-0", Rank(values=0.25))
    trainer, rows = make(actors_of(credit_worker(GAE), critic=[critic]), critic_only_steps=2)
    progress = trainer.run()
    [policy] = trainer.actors.policy
    assert critic.methods == ["signals", "update"] * 3
    assert policy.methods == ["weights", "weights", "weights", "update", "weights"]
    assert policy.arguments("weights") == [(0,), (1,), (2,), (3,)] and progress.policy_version == 3
    assert ["policy/optimizer_steps" in row for row in rows] == [False, False, True]
    assert ["critic/loss" in row for row in rows] == [True, True, True]
    assert [row["weights/version"] for row in rows] == [1, 2, 3]
    trained = [critic.arguments("update")[i][0].tokens for i in range(3)]
    assert progress.update_tokens == sum(trained) == 3 * 4 * 3  # four responses a step, of a prompt of 1 and 2 tokens


def test_the_coefficient_stands_still_while_the_critic_learns_alone(make):
    actors = actors_of(
        credit_worker(GAE, kl_in_reward=True),
        policy=[InPlace("policy-0", Rank(old_logprobs=-1.0))],
        reference=[InPlace("reference-0", Rank(reference_logprobs=-1.0))],
        critic=[InPlace("critic-0", Rank(values=0.25))],
    )
    kl = KlCoefficient(0.1, target=1.0, horizon=10)
    trainer, rows = make(actors, kl, policy_signals=True, critic_only_steps=2)
    trainer.run()
    assert [row["policy/kl_coefficient"] for row in rows] == [0.1, 0.1, 0.1]
    assert trainer.kl.coefficient == pytest.approx(0.1 * 0.92)  # a KL of 0 in the third step: 1 - 0.2 * 4 / 10


def test_each_step_is_credited_and_updated_with_the_coefficient_that_the_last_one_left(make):
    """Policy 2 nats below its reference on each token: k3 is e^2 - 3, so that every step has the largest error, 0.2."""
    actors = actors_of(
        credit_worker(GRPO, kl_in_reward=True),
        policy=[InPlace("policy-0", Rank(old_logprobs=-3.0))],
        reference=[InPlace("reference-0", Rank(reference_logprobs=-1.0))],
    )
    trainer, rows = make(actors, KlCoefficient(0.1, target=1.0, horizon=10), policy_signals=True, minibatches=2)
    trainer.run()
    coefficients = [0.1, 0.1 * 1.08, 0.1 * 1.08**2]  # 1 + 0.2 * 4 trajectories / 10
    assert [row["policy/kl_coefficient"] for row in rows] == pytest.approx(coefficients)
    assert [row["policy/kl_reference"] for row in rows] == pytest.approx([np.exp(2) - 3] * 3)
    updates = actors.policy[0].arguments("update")
    assert [coefficient for _, _, coefficient in updates] == pytest.approx(coefficients)
    assert [minibatches for _, minibatches, _ in updates] == [2, 2, 2]
    assert [coefficient for _, coefficient, *_ in actors.credit.arguments("credit")] == pytest.approx(coefficients)
    assert trainer.kl.coefficient == pytest.approx(0.1 * 1.08**3)
