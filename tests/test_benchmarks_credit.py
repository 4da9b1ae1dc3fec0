"""The credit study's programs run, and what they say of their numbers is right."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.credit import kitchen, model, protocol, report, sums, words
from benchmarks.credit.learner import Learner, Settings, recipe, response_logprobs, rollout
from benchmarks.credit.protocol import Curve, Interval, Outcome, Results, Scale

SAME_START = ("capo", "thr", "macro_actions")
QUESTIONS = (*SAME_START, "poad", "aligndistil")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("question", QUESTIONS)
def test_each_question_runs_every_arm(question: str) -> None:
    outcome = importlib.import_module(f"benchmarks.credit.{question}").run(0, Scale(most=2))
    assert len(outcome.curves) >= 3
    firsts = {tuple((name, values[0]) for name, values in curve.values.items()) for curve in outcome.curves.values()}
    assert len(firsts) == 1 or question not in SAME_START
    for curve in outcome.curves.values():
        assert curve.places[0] == 0 and len(curve.places) >= 2
        assert all(np.isfinite(values).all() for values in curve.values.values())


@pytest.mark.parametrize("name", ["grpo", "thr", "ma_rlhf", "ppo", "poad"])
def test_a_step_takes_the_shipped_recipe_through_credit_and_update(name: str) -> None:
    torch.manual_seed(0)
    start = model.TinyLM(6, width=8, layers=1, heads=2, limit=8)
    learner = Learner(start, recipe(name), Settings())
    prompts = torch.tensor([[1, 2], [3, 4]])
    batch = rollout(start, prompts, 4, model.Ending(5, 0), torch.Generator().manual_seed(1))
    batch.rewards = np.array([0.0, 1.0] * 4)
    metrics = learner.step(batch)
    assert metrics["policy/entropy"] == pytest.approx(np.log(6), abs=0.3)  # untrained
    assert not torch.equal(learner.model.lm_head.weight, start.lm_head.weight)
    if name == "thr":
        assert 0 <= metrics["credit/masked_share"] <= 1


def test_sampling_with_cached_keys_says_the_log_probs_of_a_whole_pass() -> None:
    torch.manual_seed(0)
    start = model.TinyLM(6, width=8, layers=2, heads=2, limit=8)
    batch = rollout(start, torch.tensor([[1, 2], [3, 4]]), 2, model.Ending(5, 0), torch.Generator().manual_seed(1))
    np.testing.assert_allclose(response_logprobs(start, batch), batch.behavior_logprobs, atol=1e-5)


def test_an_episode_of_the_kitchen_rewards_the_right_phrases_at_their_last_token() -> None:
    scene = kitchen.Kitchen(3, np.random.default_rng(0))
    episode = kitchen.Episode(scene, dish=1)
    for phrase in (scene.right[1, 0], scene.right[1, 1]):
        for word in (*scene.book[phrase], kitchen.END):
            episode.write(word, -0.5)
        episode.hear()
    assert episode.done and episode.rewards == [0.0, 1.0]
    batch = kitchen.batch_of([episode])
    assert batch.action_mask.tolist() == [True] * 4 + [False] + [True] * 4
    assert batch.token_rewards.tolist() == [0.0] * 8 + [1.0]
    left = kitchen.Episode(scene, dish=0)
    for word in (kitchen.LEAVE, kitchen.END):
        left.write(word, -0.5)
    assert left.done and left.left and left.rewards == [kitchen.LEAVING]


def test_words_are_worth_what_the_topic_likes_once() -> None:
    language = words.Language(np.random.default_rng(0))
    liked = language.values[2]
    order = np.argsort(-liked)
    prompt = [words.FIRST_TOPIC + 2]

    def said(indices) -> list[int]:
        return [letter for i in indices for letter in (*language.words[i], words.SPACE)] + [words.STOP]

    best = liked[order[: words.WORDS]].sum()
    assert language.reward(prompt, said(order[: words.WORDS])) == pytest.approx(1.0)
    assert language.reward(prompt, said([order[0], order[0]])) == pytest.approx(liked[order[0]] / best)
    assert language.reward(prompt, [0, 0, 0, 0, 0, 0, 0, words.SPACE]) == pytest.approx(-np.abs(liked).mean() / best)


def test_an_interval_is_student_s() -> None:
    found = Interval.of([1.0, 2.0, 3.0, 4.0, 5.0])  # sd sqrt(2.5), t 2.776
    assert found.mean == 3.0
    assert found.high - found.mean == pytest.approx(2.776 * (2.5 / 5) ** 0.5)
    with pytest.raises(ValueError, match="expected at least 2 seeds"):
        Interval.of([1.0])


def test_a_claim_holds_only_where_the_whole_interval_is_on_its_side() -> None:
    above = np.array([1.0, 1.1, 0.9])
    assert report.Comparison("", above).verdict == "holds"
    assert report.Comparison("", above, claimed=-1).verdict == "the opposite holds"
    assert report.Comparison("", np.array([1.0, -1.1, 0.9])).verdict == "not told apart"


def test_results_are_read_as_they_were_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "RESULTS", tmp_path)
    curve = Curve()
    curve.add(0, {"reward": 0.25})
    curve.add(4, {"reward": 0.75})
    Results("trial", {0: Outcome({"arm": curve}), 1: Outcome({"arm": curve})}, 12.3).save()
    found = Results.load("trial")
    assert found.seeds == 2 and found.arms == ["arm"]
    assert found.last("arm", "reward").tolist() == [0.75, 0.75]
    assert found.places("arm").tolist() == [0, 4]


def test_the_exact_judge_finds_the_steps_that_do_not_follow() -> None:
    prompts = sums.draw_prompts(64, False, np.random.default_rng(0))
    unsure = sums.Teacher((0.5, 0.5), np.random.default_rng(1)).responses(prompts)
    right = sums.worked(prompts)
    wrong = 0
    for prompt, answer, best in zip(prompts.tolist(), unsure.tolist(), right.tolist(), strict=True):
        question, steps = sums.spell(prompt[: sums.TERMS]), _steps(answer)
        assert sums.wrong_steps(question, _steps(best)) == []
        found = sums.wrong_steps(question, steps)
        wrong += bool(found)
        assert bool(found) == (answer != best)
    assert 48 <= wrong <= 64  # a share of 1 - 0.5^4 is wrong


def _steps(answer: list[int]) -> list[str]:
    text = sums.spell(answer)
    return [text[i : i + 2] for i in range(0, len(text), 2)]
