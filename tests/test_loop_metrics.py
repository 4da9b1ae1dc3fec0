"""The numbers of a step and the evaluation, from what ranks and workers report. Nothing is started."""

from __future__ import annotations

import copy
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from apportion.actors.credit import EvaluationReport
from apportion.actors.engine import OptimizerStep
from apportion.actors.engines import Sampling
from apportion.actors.policy import UpdateReport
from apportion.actors.rollout import RolloutReport
from apportion.actors.scoring import ScoreReport
from apportion.batch import Prompt, Totals
from apportion.loop.calls import deal, longest, turns
from apportion.loop.evaluation import EvaluationSettings, Evaluator
from apportion.loop.metrics import StepReports, speed_metrics, step_metrics, update_metrics
from apportion.loop.state import Actors
from apportion.platform.cluster import Call
from apportion.platform.errors import RewardError
from apportion.platform.metric_names import unknown_metrics


def totals(**sums: tuple[float, float]) -> Totals:
    made = Totals()
    for name, (total, weight) in sums.items():
        made.add(name.replace("__", "/"), total, weight)
    return made


def rank(loss: float, entropy: tuple[float, float], tokens: int, seconds: float, norms=(1.0, 3.0)) -> UpdateReport:
    sums = totals(policy__loss=(loss, 0.0), policy__entropy=entropy)
    return UpdateReport(sums, [OptimizerStep(norm, 0.5 / norm) for norm in norms], tokens, seconds)


def reports(**changes) -> StepReports:
    rollout = totals(
        reward__mean=(3.0, 4), reward__square=(5.0, 4), rollout__response_tokens_mean=(80.0, 8),
        rollout__trajectories=(8, 1), rollout__prompts=(2, 1), rollout__groups_dropped=(1, 1),
        judge__failed_share=(1, 4), judge__critiques=(4, 1), judge__failed__slow=(1, 1),
    )  # fmt: skip
    policy = [rank(0.25, (6.0, 3), 100, 2.0), rank(0.75, (10.0, 5), 140, 4.0)]
    return StepReports(**({"rollout": rollout, "credit": {"credit/groups": 2.0}, "trajectories": 6,
                           "seconds_sampling": 3.0, "sampled_tokens": 60, "policy": policy} | changes))  # fmt: skip


def test_means_are_over_all_ranks_tokens_and_losses_over_optimiser_steps():
    metrics = step_metrics(reports())
    assert metrics["policy/entropy"] == 2.0 and metrics["policy/loss"] == 0.5
    assert metrics["policy/grad_norm"] == 2.0 and metrics["policy/learning_rate"] == pytest.approx(0.5 / 3)
    assert (metrics["policy/optimizer_steps"], metrics["credit/groups"]) == (2, 2.0)
    assert metrics["reward/mean"] == 0.75 and metrics["reward/std"] == pytest.approx((1.25 - 0.5625) ** 0.5)
    assert "reward/square" not in metrics
    counted = (
        "rollout/trajectories",
        "rollout/prompts",
        "rollout/groups_dropped",
        "judge/critiques",
        "judge/failed/slow",
    )
    assert [metrics[name] for name in counted] == [8, 2, 1, 4, 1]
    assert metrics["judge/failed_share"] == 0.25 and metrics["rollout/response_tokens_mean"] == 10.0
    assert unknown_metrics(metrics) == []


def test_an_update_in_which_nothing_teaches_has_a_loss_of_zero_and_a_role_that_rests_no_metrics():
    still = update_metrics([UpdateReport(Totals(), [OptimizerStep(0.0, 0.1)])], "policy")
    assert still["policy/loss"] == 0.0 and update_metrics([], "critic") == {}


def test_speeds_are_over_the_seconds_of_their_own_stage_and_the_rest_is_overhead():
    critic = [UpdateReport(Totals(), [OptimizerStep(1.0, 0.1)], 7, 1.0)]
    timing = {"rollout": 4.0, "signals": 1.0, "update": 6.0, "sync": 0.5, "step": 12.0}
    speeds = speed_metrics(reports(critic=critic), timing)
    assert speeds["timing/other"] == pytest.approx(0.5) and speeds["timing/sync"] == 0.5
    assert (
        speeds["perf/samples_per_second"] == 0.5 and speeds["perf/rollout_tokens_per_second"] == 15.0
    )  # not the 80 with an environment's
    assert speeds["perf/update_tokens_per_second"] == 40.0  # the policy's tokens
    # 3 s of sampling, 1 of signals, 4 of the slowest rank, of 12
    assert speeds["perf/overhead_share"] == pytest.approx(1 / 3)
    assert unknown_metrics(speeds) == []
    alone = speed_metrics(reports(policy=[], critic=critic), timing)
    assert alone["perf/update_tokens_per_second"] == pytest.approx(7 / 6)  # a critic's that trains alone


def test_prompts_are_dealt_in_about_equal_parts_of_which_none_is_empty():
    def parts(count: int, engines: int) -> list[list[int]]:
        return deal(list(range(count)), engines)

    assert parts(5, 2) == [[0, 1], [2, 3, 4]] and parts(2, 4) == [[0], [1]] and parts(3, 1) == [[0, 1, 2]]


class Recorder:
    """An actor that keeps what it is asked and answers with references that say who and what."""

    def __init__(self, name: str) -> None:
        self.name, self.asked = name, []
        self.answers = {
            "evaluate_refs": EvaluationReport({"eval/greedy_accuracy": 0.5}, []),
            "generate": RolloutReport(0.1, 10, 4),
            "score": ScoreReport(samples=4, scored=4),
        }

    def call(self, method: str, *arguments, returns: int = 1) -> Call:
        self.asked.append((method, *arguments))
        answer = self.answers[method]
        return Call(self, method, [copy.deepcopy(answer), f"{self.name}:{len(self.asked)}"][:returns])


@pytest.fixture
def evaluator(monkeypatch) -> Evaluator:
    """Of three held-out prompts with two engines, greedy and with 4 samples; what it warns of is in `told`."""
    monkeypatch.setattr("apportion.loop.evaluation.gather", lambda calls, seconds, what: [c.refs[0] for c in calls])
    actors = Actors([Recorder("a"), Recorder("b")], [Recorder("r")], Recorder("credit"), [])
    prompts = [Prompt(str(i), np.zeros(1, np.int32), "q") for i in range(3)]
    settings = EvaluationSettings(0, True, True, True, 4, [2], 0.7, 16, 1.0, 3, 0.1)
    made = Evaluator(actors, settings, prompts, ["\n"], 60.0, lambda text: told.append(text))
    made.told = told = []
    return made


def test_held_out_prompts_go_to_all_engines_once_greedy_and_once_for_samples(evaluator):
    engines, scorers, credit = evaluator.actors.rollout, evaluator.actors.reward, evaluator.actors.credit
    prompts, report = evaluator.prompts, evaluator.evaluate("evaluation")
    assert report.metrics == {"eval/greedy_accuracy": 0.5, "eval/failed_share": 0.0} and evaluator.told == []
    greedy, sampled = Sampling(0.0, max_tokens=16, stop=["\n"]), Sampling(0.7, max_tokens=16, stop=["\n"])
    first, rest = prompts[:2], prompts[2:]
    assert engines[0].asked == [("generate", first, 0, 1, greedy), ("generate", first, 0, 4, sampled)]
    assert engines[1].asked == [("generate", rest, 2, 1, greedy), ("generate", rest, 2, 4, sampled)]
    assert [asked[1] for asked in scorers[0].asked] == ["a:1", "b:1", "a:2", "b:2"]
    assert credit.asked == [("evaluate_refs", 1.0, [2], 3, 2, "r:1", "r:2", "r:3", "r:4")]


def test_held_out_answers_whose_reward_failed_are_counted_and_said_with_the_first_traceback(evaluator):
    evaluator.settings.max_failed_share = 0.25
    failed = ScoreReport(samples=4, scored=3, failed=Counter(raised=1), first_traceback="why")
    evaluator.actors.reward[0].answers["score"] = failed
    report = evaluator.evaluate("evaluation after step 3")
    assert report.metrics["eval/failed_share"] == 0.25 and unknown_metrics(report.metrics) == []
    said = "evaluation after step 3: the rewards of 25% of the held-out answers failed"
    assert evaluator.told == [f"{said}; those answers are left out and counted:\nwhy"]
    evaluator.settings.max_failed_share = 0.2
    with pytest.raises(RewardError) as stopped:
        evaluator.evaluate("evaluation after step 3")
    expected = "expected at most 20% (reward.max_failed_share); the first failure:\nwhy"
    assert str(stopped.value) == f"{said}, {expected}"


def test_why_an_environment_failed_is_told_by_the_engine_that_spoke_to_it(evaluator):
    evaluator.actors.rollout[0].answers["generate"].first_failure = "the environment's own words"
    evaluator.actors.reward[0].answers["score"].failed = Counter(environment=4)
    with pytest.raises(RewardError, match=r"the environment's own words$"):
        evaluator.evaluate("evaluation")


def test_what_an_evaluation_does_not_know_is_no_metric_and_none_in_an_answer(evaluator):
    nan = float("nan")
    answers = [{"prompt_id": "0", "answer": "x", "reward": nan}, {"prompt_id": "1", "answer": "y", "reward": 1.0}]
    metrics = {"eval/greedy_accuracy": nan, "eval/response_tokens_mean": 2.0}
    evaluator.actors.credit.answers["evaluate_refs"] = EvaluationReport(metrics, answers)
    report = evaluator.evaluate("evaluation")
    assert report.metrics == {"eval/response_tokens_mean": 2.0, "eval/failed_share": 0.0}
    assert [answer["reward"] for answer in report.answers] == [None, 1.0]


def test_an_actors_calls_follow_each_other_and_their_seconds_add_up():
    first, second = SimpleNamespace(name="rollout-0"), SimpleNamespace(name="rollout-1")
    calls = [Call(actor, "generate", []) for actor in (first, first, second, first, second)]
    assert turns(calls) == [0, 1, 0, 2, 1]
    assert longest(calls, [1.0, 2.0, 4.0, 0.5, 1.0]) == 5.0
