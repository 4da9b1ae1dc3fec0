"""Multi-turn rollouts on a scripted engine: tokens, masks, turns, limits, failures, and what becomes of the rewards."""

import copy

import numpy as np
import pytest

from apportion.actors.credit import credit_input
from apportion.actors.engines import Sample, Sampling
from apportion.actors.environment import EnvironmentSpec, EnvironmentWorker
from apportion.actors.episodes import NO_TOKENS, EpisodeLimits, EpisodeRunner, Seeds
from apportion.actors.scoring import Scorer
from apportion.algorithms.credit.poad import Poad
from apportion.batch import Batch, Prompt
from apportion.data.builtin import TINY_CHAT_TEMPLATE, resolve_model
from apportion.data.prompts import PromptEncoder, load_tokenizer
from apportion.data.turns import TurnEncoder


class Talker:
    """Answers every action with a word; rewards 1, 2, 3, ... a turn; `row` says what goes wrong and when."""

    def reset(self, seed, length=3, fails_at=None, limit=False, observation="look"):
        if fails_at == 0:
            raise ValueError("no such level")
        self.length, self.fails_at, self.limit, self.turn = length, fails_at, limit, 0
        return observation

    def step(self, action):
        self.turn += 1
        if self.turn == self.fails_at:
            raise RuntimeError("the wall fell")
        return f"saw {action}", float(self.turn), self.turn == self.length, {"truncated": self.limit}


class ScriptedEngine:
    """Says the same words in every turn; keeps what it was asked."""

    def __init__(self, tokenizer, *words, end="<|end|>"):
        self.tokenizer, self.words, self.end, self.asked = tokenizer, words, end, []

    def generate(self, requests, sampling):
        self.asked.append(requests)
        return [self._sample(request) for request in requests]

    def _sample(self, request):
        word = self.words[(len(self.asked) - 1) % len(self.words)]
        ids = self.tokenizer(word + self.end, add_special_tokens=False)["input_ids"] if word is not None else []
        reason = "stop" if self.end and len(ids) <= request.max_tokens else "length"
        ids = np.array(ids[: request.max_tokens], np.int32)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Sample(ids, -np.arange(1, len(ids) + 1, dtype=np.float32), reason, text)


class Local:
    """Environments in this process, as one owner sees them."""

    def __init__(self, worker):
        self.worker = worker

    def start(self, starts):
        return self.worker.start("me", starts)

    def step(self, actions):
        return self.worker.step("me", actions)

    def finish(self, episodes):
        self.worker.finish("me", episodes)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer(resolve_model("builtin:tiny"))
    tokenizer.chat_template = TINY_CHAT_TEMPLATE
    return tokenizer


def play(
    tokenizer,
    *words,
    rows=({},),
    responses=1,
    max_turns=5,
    turn_tokens=None,
    max_tokens=200,
    max_prompt=64,
    end="<|end|>",
):
    """Trajectories, report, engine and environments of one round."""
    encoder = PromptEncoder(tokenizer, max_prompt_tokens=max_prompt)
    prompts = [Prompt(f"p{n}", encoder.token_ids("go"), "go", dict(row)) for n, row in enumerate(rows)]
    engine = ScriptedEngine(tokenizer, *words, end=end)
    worker = EnvironmentWorker(EnvironmentSpec(f"{__name__}:Talker"))
    runner = EpisodeRunner(engine, Local(worker), TurnEncoder(encoder), EpisodeLimits(max_turns, turn_tokens))
    seeds = Seeds(4, lambda prompt: 11, lambda prompt, index, turn: 100 * index + turn)
    trajectories, report = runner.run(prompts, 7, responses, Sampling(max_tokens=max_tokens), seeds)
    assert worker.live() == 0
    return trajectories, report, engine


def shown(tokenizer, trajectory):
    return tokenizer.decode(trajectory.token_ids)


def test_an_observation_that_the_template_cuts_fails_its_episode_alone_and_ends_its_environment(tokenizer):
    cuts = copy.deepcopy(tokenizer)
    cuts.chat_template = TINY_CHAT_TEMPLATE.replace("message['content']", "message['content'][:16]")
    [long], report, _ = play(cuts, "a long action")
    assert long.failure.startswith("step: the chat template leaves out or changes the observation 'saw a long action'")
    assert report.failures == 1
    [short], report, _ = play(cuts, "hi")
    assert (short.failure, report.failures) == (None, 0)


def test_an_episode_is_one_conversation_whose_own_tokens_are_the_policy_s_alone(tokenizer):
    [t], report, _ = play(tokenizer, "hi", "up", "ok", rows=[{"length": 3}])
    assert shown(tokenizer, t) == (
        "<|user|>go\n\nlook<|end|><|assistant|>hi<|end|><|user|>saw hi<|end|><|assistant|>up<|end|>"
        "<|user|>saw up<|end|><|assistant|>ok<|end|>"
    )
    response = t.token_ids[t.prompt_length :]
    assert tokenizer.decode(response[t.action_mask]) == "hi<|end|>up<|end|>ok<|end|>"
    assert t.turn_ids[t.action_mask].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (t.turn_ids[~t.action_mask] == -1).all() and np.isnan(t.behavior_logprobs[~t.action_mask]).all()
    assert t.behavior_logprobs[t.action_mask].tolist() == [-1, -2, -3] * 3
    assert t.turn_rewards.tolist() == [1, 2, 3]
    assert (t.terminated, t.finish_reason, t.policy_version, t.failure) == (True, "stop", 4, None)
    assert (report.sampled_tokens, report.failures) == (9, 0)
    assert t.text == "hisaw hiupsaw upok"


def test_each_turn_is_sampled_from_exactly_the_ids_before_it(tokenizer):
    [t], _, engine = play(tokenizer, "hi", "up", rows=[{"length": 2}])
    asked = [requests[0].token_ids.tolist() for requests in engine.asked]
    first_turn = int(np.flatnonzero(t.turn_ids == 1)[0]) + t.prompt_length
    assert asked == [t.token_ids[: t.prompt_length].tolist(), t.token_ids[:first_turn].tolist()]
    assert [requests[0].seed for requests in engine.asked] == [0, 1]


def test_groups_are_numbered_and_live_episodes_alone_are_sampled_on(tokenizer):
    trajectories, _, engine = play(tokenizer, "hi", rows=[{"length": 1}, {"length": 3}], responses=2)
    assert [(t.prompt_id, t.group_id, t.sample_index) for t in trajectories] == [
        ("p0", 7, 0), ("p0", 7, 1), ("p1", 8, 0), ("p1", 8, 1)
    ]  # fmt: skip
    assert [len(requests) for requests in engine.asked] == [4, 2, 2]
    assert [len(t.turn_rewards) for t in trajectories] == [1, 1, 3, 3]


def test_turn_rewards_stand_on_the_last_token_of_their_turn(tokenizer):
    [t], *_ = play(tokenizer, "hi", rows=[{"length": 2}])
    batch = Batch.from_trajectories([t])
    assert batch.rewards.tolist() == [3.0]
    places = np.flatnonzero(batch.token_rewards)
    assert batch.token_rewards[places].tolist() == [1.0, 2.0]
    assert [tokenizer.decode([i]) for i in t.token_ids[t.prompt_length :][places]] == ["<|end|>"] * 2


def test_the_number_of_turns_cuts_an_episode_and_keeps_the_last_observation_for_the_critic(tokenizer):
    [t], *_ = play(tokenizer, "hi", max_turns=2, rows=[{"length": 9}])
    assert (t.terminated, t.finish_reason, t.turn_rewards.tolist()) == (False, "length", [1, 2])
    assert shown(tokenizer, t).endswith("hi<|end|><|user|>saw hi<|end|><|assistant|>")
    assert not t.action_mask[-1]


def test_an_environment_s_own_limit_is_a_truncation(tokenizer):
    [t], *_ = play(tokenizer, "hi", rows=[{"length": 1, "limit": True}])
    assert (t.terminated, t.finish_reason) == (False, "length")
    assert shown(tokenizer, t).endswith("saw hi<|end|><|assistant|>")


def test_a_turn_cut_by_its_limit_still_acts_and_is_closed_by_the_template(tokenizer):
    [t], *_ = play(tokenizer, "hello", turn_tokens=3, rows=[{"length": 2}])
    assert shown(tokenizer, t).endswith("<|assistant|>hel<|end|><|user|>saw hel<|end|><|assistant|>hel")
    assert t.turn_ids[:5].tolist() == [0, 0, 0, -1, -1]


def test_all_turns_and_observations_together_stay_within_the_response_limit(tokenizer):
    [t], *_ = play(tokenizer, "hi", max_tokens=10, rows=[{"length": 9}])  # an action of 3, an observation of 10
    assert (len(t.turn_ids), t.finish_reason, t.terminated) == (3, "length", False)
    for room in range(1, 40):
        [t], _, engine = play(tokenizer, "hi", max_tokens=room, rows=[{"length": 9}])
        assert len(t.turn_ids) <= room
        assert all(0 < requests[0].max_tokens <= room for requests in engine.asked)


def test_an_environment_that_raises_ends_its_own_episode_and_has_no_reward(tokenizer):
    rows = [{"length": 2}, {"length": 2, "fails_at": 2}, {"fails_at": 0}]
    trajectories, report, _ = play(tokenizer, "hi", rows=rows)
    assert (report.failures, [t.failure is None for t in trajectories]) == (2, [True, False, False])
    assert "the wall fell" in report.first_failure and "no such level" in trajectories[2].failure
    assert [t.finish_reason for t in trajectories] == ["stop", "abort", "abort"]
    assert len(trajectories[2].turn_ids) == 0
    batch = Batch.from_trajectories(trajectories)
    assert batch.rewards[0] == 3 and np.isnan(batch.rewards[1:]).all()
    prompts = [Prompt(t.prompt_id, np.zeros(1, np.int32), "go") for t in trajectories]
    scored, score = Scorer(None).score(batch, prompts)
    assert scored.sample_mask.tolist() == [True, False, False]
    assert score.failed == {"environment": 2} and score.component_means == {"environment": 3.0}


def test_reward_functions_are_added_to_the_environment_s_rewards(tokenizer):
    [t], *_ = play(tokenizer, "hi", rows=[{"length": 2}])
    scorer = Scorer([{"function": lambda completions: [10.0], "name": "extra", "weight": 0.5}])
    scored, report = scorer.score(Batch.from_trajectories([t]), [Prompt("p0", np.zeros(1, np.int32), "go")])
    assert scored.rewards.tolist() == [8.0]
    assert scored.token_rewards[np.flatnonzero(scored.token_rewards)].tolist() == [1.0, 7.0]
    assert report.component_means == {"extra": 10.0, "environment": 3.0}


def test_a_first_turn_without_tokens_is_a_failure_and_a_later_one_ends_what_was_earned(tokenizer):
    [empty], report, _ = play(tokenizer, None)
    assert (empty.failure, len(empty.turn_ids), report.failures) == (NO_TOKENS, 0, 1)
    assert np.isnan(Batch.from_trajectories([empty]).rewards).all()
    [later], report, _ = play(tokenizer, "hi", None)
    assert (later.finish_reason, later.terminated, later.turn_rewards.tolist()) == ("abort", False, [1.0])
    assert report.failures == 0
    assert Batch.from_trajectories([later]).rewards.tolist() == [1.0]


def test_a_first_observation_that_is_too_long_fails_its_episode(tokenizer):
    rows = [{"observation": "x" * 80}, {"length": 1}]
    trajectories, report, engine = play(tokenizer, "hi", rows=rows)
    assert "expected at most 64; raise data.max_prompt_tokens" in report.first_failure
    assert [t.failure is None for t in trajectories] == [False, True]
    assert len(engine.asked[0]) == 1


def test_episodes_reach_credit_as_turns_with_their_own_bootstrap(tokenizer):
    """Two turns of three tokens, gamma 0.5, all values 0: the first turn's advantage is 1 + 0.5 * (2 + 0.5 * bootstrap)."""
    [cut], *_ = play(tokenizer, "hi", max_turns=2, rows=[{"length": 9}])
    batch = Batch.from_trajectories([cut])
    batch.values = np.zeros(len(batch.action_mask), np.float32)
    batch.bootstrap_values = np.array([8.0], np.float32)
    credit = Poad(gamma=0.5, gae_lambda=1.0)(credit_input(batch))
    advantages = credit.advantages_BT[0].numpy()
    assert advantages[batch.action_mask].tolist() == [4.0] * 3 + [6.0] * 3
    assert not advantages[~batch.action_mask].any()
    assert credit.metrics["credit/actions_per_response"] == 2.0
