"""Who reads the judge's marks: selection, credit, and the loop that waits for them."""

import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from judge_parts import CAPO, Scripted, decode, judge_with, prompt, trajectory

from apportion.actors.credit import CreditSpec, CreditWorker
from apportion.actors.rollout import RolloutReport
from apportion.actors.scoring import ScoreReport
from apportion.algorithms import registry
from apportion.algorithms.interface import judged_method
from apportion.batch import Batch, Critique, Marks
from apportion.loop.state import Actors, LoopSettings
from apportion.platform.cluster import Call
from apportion.platform.errors import ApportionError
from apportion.trainer import Trainer

# who reads the marks


def credit_worker(selection=()):
    spec = CreditSpec(CAPO, {"name": "token_mean"}, [], list(selection), False, "k3", "", False)
    worker = CreditWorker(spec)
    worker._tokenizer = SimpleNamespace(decode=lambda ids: decode(np.asarray(ids).tolist()))
    return worker


def judged(wrong, rewards, groups):
    parts = [trajectory("a\n\nb", prompt=f"p{g}", sample=i, group=g) for i, g in enumerate(groups)]
    batch = Batch.from_trajectories(parts)
    batch = replace(batch, rewards=np.array(rewards, float), sample_mask=np.ones(len(rewards), bool))
    critiques = [[Critique(steps, "", f"{steps}")] for steps in wrong]
    ids = [np.array([0, 0, 0, 1, 1], np.int32)] * len(wrong)
    return batch, Marks(list(range(len(wrong))), ids, wrong, critiques)


@pytest.mark.parametrize("by", ["auto", "tokens"])
def test_selection_keeps_a_group_that_is_all_right_where_a_step_is_wrong(by):
    batch, marks = judged([[], [0], [], [], [], []], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2])
    report, kept = credit_worker([{"name": "dynamic_sampling", "by": by}]).admit(batch, marks)
    assert kept.group_ids.tolist() == [0, 0] and (report.groups_kept, report.groups_dropped) == (1, 2)
    assert kept.wrong_steps == [[], [0]]


def test_tokens_of_a_wrong_step_earn_less_and_samples_say_why():
    batch, marks = judged([[], [0]], [1, 1], [0, 0])
    worker = credit_worker()
    _, admitted = worker.admit(batch, marks)
    _, shard = worker.cut(1, 1, 1, admitted)
    report, credited = worker.credit(1, 0.0, 2, shard)
    first, second = credited.advantages[:5], credited.advantages[5:]
    # 7 tokens earn 2 and 3 earn 1: mean 1.7, sample deviation 0.48305
    assert first == pytest.approx([0.6211] * 5, abs=1e-3)
    assert second == pytest.approx([-1.4491] * 3 + [0.6211] * 2, abs=1e-3)
    sample = report.samples[1]
    assert sample["steps"] == ["a\n\n", "b"] and sample["step_ids"] == [0, 0, 0, 1, 1] and sample["wrong_steps"] == [0]
    assert sample["critiques"] == [{"wrong_steps": [0], "failure": "", "answer": "[0]", "detail": ""}]
    assert credited.critiques is None and credited.wrong_steps == [[], [0]]


def test_the_vote_is_found_inside_a_method_that_wraps_it():
    wrapped = registry.build("credit", {"name": "hidden_reward", "base": {"name": "capo", "voting": "union"}})
    assert "critiques" in wrapped.needs and judged_method(wrapped).vote([[0], []]) == [0]
    with pytest.raises(ValueError, match="expected the three of JudgedMethod"):
        judged_method(registry.build("credit", {"name": "grpo"}))


# the loop, with actors that answer in place


class InPlace:
    """An actor whose methods run when they are called; what Ray would send is pickled on its way."""

    def __init__(self, name, target):
        self.name, self.target, self.called, self.first_arguments = name, target, [], []

    def call(self, method, *arguments, returns=1):
        self.called.append(method)
        self.first_arguments.append(arguments[0])
        answer = getattr(self.target, method)(*pickle.loads(pickle.dumps(arguments)))
        return Call(self, method, list(answer) if returns != 1 else [answer])


class Sampler:
    def __init__(self, texts):
        self.texts = texts

    def generate(self, prompts, first_group, responses, sampling):
        rows = [
            trajectory(text, prompt=p.prompt_id, sample=i, group=first_group + g)
            for g, p in enumerate(prompts)
            for i, text in enumerate(self.texts[:responses])
        ]
        return RolloutReport(0.1, 10, len(rows)), Batch.from_trajectories(rows)


class AllRight:
    def score(self, batch, prompts):
        ones = np.ones(len(batch))
        return ScoreReport(samples=len(batch), scored=len(batch)), replace(batch, rewards=ones, sample_mask=ones > 0)


class JudgeActor:
    def __init__(self, source):
        self._judge = judge_with(source, critiques=1)

    def judge(self, batch, prompts, part, parts):
        return self._judge.judge(batch, prompts, range(part, len(batch), parts))


def loop(monkeypatch, source, limit=1.0, parts=1):
    """A trainer of two engines and two judges whose answers are all right, with dynamic sampling."""
    monkeypatch.setattr("apportion.trainer.gather", lambda calls, seconds, what: [call.refs[0] for call in calls])
    names = iter(range(100))
    actors = Actors(
        rollout=[InPlace(f"rollout-{i}", Sampler(["a\n\nb", "c"])) for i in range(2)],
        reward=[InPlace("reward-0", AllRight())],
        credit=InPlace("credit-0", credit_worker([{"name": "dynamic_sampling", "by": "auto"}])),
        policy=[],
        judge=[InPlace(f"judge-{i}", JudgeActor(source)) for i in range(2)],
    )
    settings = LoopSettings(
        1, 2, 2, None, 1, False, True, 0.1, True, [], 60.0, 0, 2, None, 0, None, False, {"run": 0}, {},
        max_failed_critiques=limit, parts=parts,
    )  # fmt: skip
    prompts = SimpleNamespace(next_batch=lambda count: [prompt(name=f"p{next(names)}") for _ in range(count)])
    warned = []
    tracker = SimpleNamespace(warn=warned.append)
    return Trainer(actors, prompts, settings, None, tracker, None), warned


def test_the_loop_hands_each_engines_batch_to_all_judges_and_their_marks_to_selection(monkeypatch):
    trainer, warned = loop(monkeypatch, Scripted(Critique([0])))
    experience = trainer._collect()
    # Every step 0 is wrong, so each group, though all right, has tokens that earn differently: one round is enough.
    assert [judge.called for judge in trainer.actors.judge] == [["judge"] * 2] * 2
    assert experience.groups == 2 and [b.wrong_steps for b in experience.admitted] == [[[0], [0]]] * 2
    means = trainer.failures.totals.means()
    assert means["judge/failed_share"] == 0.0 and means["judge/wrong_step_share"] == pytest.approx(4 / 6)
    assert trainer.failures.totals.sums["judge/critiques"] == 4 and warned == [] and "judge" in trainer._timing


def test_an_engine_samples_in_parts_and_judges_are_asked_about_each_before_the_next_is_waited_for(monkeypatch):
    trainer, _ = loop(monkeypatch, Scripted(Critique([0])), parts=2)
    trainer.settings.prompts_per_step = 5
    waited = []
    monkeypatch.setattr(
        "apportion.trainer.gather",
        lambda calls, seconds, what: (
            waited.append([(c.actor.name, c.method) for c in calls]) or [c.refs[0] for c in calls]
        ),
    )
    experience = trainer._collect()
    sampled = [("rollout-0", "generate")] * 2 + [("rollout-1", "generate")] * 2
    assert waited[0] == sampled and [judge.called for judge in trainer.actors.judge] == [["judge"] * 4] * 2
    # An engine makes groups 0 and 1, the other 2 with 3 and 4: first the part of each that is there first.
    read = [batch.group_ids[0] for batch in trainer.actors.judge[0].first_arguments]
    assert read == [0, 2, 1, 4]
    assert sorted(g for b in experience.admitted for g in set(b.group_ids.tolist())) == [0, 1, 2, 3, 4]
    assert experience.seconds_sampling == pytest.approx(0.2)  # both engines at once, each with two parts of 0.1


def test_the_loop_goes_on_without_a_judge_that_is_down_and_stops_where_the_run_asked_for_that(monkeypatch):
    down = Scripted(Critique(None, "down", detail="http://h/v1: ConnectError"))
    trainer, warned = loop(monkeypatch, down)
    with pytest.raises(ApportionError, match="no group of this step is left"):  # all right and unjudged: all alike
        trainer._collect()
    assert warned == ["judge: a critique is down, has no vote and is counted: http://h/v1: ConnectError"]
    assert trainer.failures.totals.means()["judge/unjudged_share"] == 1.0
    trainer, _ = loop(monkeypatch, down, limit=0.5)
    with pytest.raises(ApportionError, match="judge: 100% of this step's critiques failed") as stopped:
        trainer._collect()
    assert str(stopped.value) == (
        "judge: 100% of this step's critiques failed, expected at most 50% (judge.max_failed_share); "
        "the first: a critique is down, has no vote and is counted: http://h/v1: ConnectError"
    )
