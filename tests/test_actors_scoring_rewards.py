"""Rewards: what is accepted, how components add up, and rewards by token and by turn."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scoring_parts import NAN, batch_of, lengths, score, trajectory

from apportion.batch import Batch, Prompt
from apportion.platform.errors import RewardError


def test_a_plain_reward_reaches_the_batch_with_a_mask_of_what_is_usable():
    batch, report = score(lengths, *batch_of("ab", "c"))
    assert batch.rewards.tolist() == [2.0, 1.0]
    assert batch.sample_mask.tolist() == [True, True]
    assert batch.token_rewards is None
    assert (report.samples, report.scored, sum(report.failed.values()), report.no_opinion) == (2, 2, 0, 0)
    assert report.component_means == {"lengths": 1.5}
    assert report.first_traceback is None


def test_functions_are_given_what_trl_gives_them():
    seen = {}

    def keep(prompts, completions, answer, completion_ids, **rest):
        seen.update(prompts=prompts, completions=completions, answer=answer, completion_ids=completion_ids, rest=rest)
        return [0.0] * len(prompts)

    batch, prompts = batch_of("ab", "c")
    prompts[1].columns["level"] = 3
    score(keep, batch, prompts)
    assert seen["prompts"] == ["q0", "q1"]
    assert seen["completions"] == ["ab", "c"]
    assert seen["answer"] == ["0", "1"]
    assert seen["completion_ids"] == [[20, 21], [20]]
    assert seen["rest"] == {"prompt_ids": [[7, 8], [7, 8]], "level": [None, 3]}


def test_prompts_as_messages_give_completions_as_messages():
    seen = []

    def keep(prompts, completions):
        seen.extend([*prompts, *completions])
        return [1.0]

    batch, [prompt] = batch_of("hi")
    messages = [{"role": "user", "content": "q"}]
    score(keep, batch, [replace(prompt, prompt=messages)])
    assert seen == [messages, [{"role": "assistant", "content": "hi"}]]


def test_trajectories_of_one_prompt_share_it_and_a_lost_prompt_is_an_error():
    _, prompts = batch_of("a", "b")
    group = Batch.from_trajectories([trajectory("rows:1:0", t) for t in ("x", "yy")])
    batch, _ = score(lambda completions, answer: [float(a) for a in answer], group, prompts)
    assert batch.rewards.tolist() == [1.0, 1.0]
    with pytest.raises(RewardError, match="prompts: got none for 'rows:1:0' and 1 more"):
        score(lengths, group, prompts[:1])


def test_components_are_weighted_and_their_means_are_reported_before_weights():
    def ones(completions):
        return [1] * len(completions)

    entries = [{"function": lengths, "weight": 0.5}, {"function": ones, "weight": -2.0, "name": "penalty"}, ones]
    batch, report = score(entries, *batch_of("abcd", "ab"))
    assert batch.rewards.tolist() == [1.0, 0.0]
    assert report.component_means == {"lengths": 3.0, "penalty": 1.0, "ones": 1.0}


def test_two_components_of_one_name_stay_apart():
    _, report = score([lengths, {"function": lengths, "weight": 2.0}], *batch_of("ab"))
    assert report.component_means == {"lengths": 2.0, "lengths_2": 2.0}


def test_none_is_no_opinion_and_only_masks_where_nobody_has_one():
    def odd(completions):
        return [1.0 if len(c) % 2 else None for c in completions]

    def long(completions):
        return [10.0 if len(c) > 2 else None for c in completions]

    batch, report = score([odd, long], *batch_of("a", "abc", "ab"))
    np.testing.assert_array_equal(batch.rewards, [1.0, 11.0, NAN])
    assert batch.sample_mask.tolist() == [True, True, False]
    assert (report.scored, report.no_opinion, report.failed) == (2, 1, {})
    assert report.component_counts == {"odd": 2, "long": 1}


def test_numpy_and_torch_rewards_are_numbers_too():
    import torch

    def both(completions):
        return torch.tensor([1.5, 2.5])

    batch, _ = score([both, lambda completions: [np.float32(1.0), True]], *batch_of("a", "b"))
    assert batch.rewards.tolist() == [2.5, 3.5]


def test_clipping_bounds_the_weighted_sum():
    batch, report = score(lengths, *batch_of("abcd", "a"), clip=2.0)
    assert batch.rewards.tolist() == [2.0, 1.0]
    assert report.component_means == {"lengths": 2.5}


# Dense rewards


def test_one_number_a_token_stays_where_it_is_and_a_plain_reward_stands_at_the_end():
    def dense(completions):
        return [[0.0, 1.0, 0.5][: len(c)] for c in completions]

    batch, report = score([{"function": dense, "weight": 2.0}, lengths], *batch_of("abc", "ab"))
    assert batch.token_rewards.tolist() == [0.0, 2.0, 4.0, 0.0, 4.0]
    assert batch.rewards.tolist() == [6.0, 4.0]
    assert report.component_means == {"dense": 1.25, "lengths": 2.5}


def test_one_number_a_turn_is_placed_at_the_last_token_the_policy_chose_in_it():
    prompts = [Prompt("rows:0:0", np.array([7, 8], np.int32), "q")]
    batch = Batch.from_trajectories([trajectory("rows:0:0", "answer", [0, 0, -1, -1, 1, 1, 1, -1])])
    scored, _ = score(lambda completions: [[1.0, 3.0]], batch, prompts)
    assert scored.token_rewards.tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0]
    assert scored.rewards.tolist() == [4.0]
    plain, _ = score([lambda completions: [[1.0, 3.0]], lambda completions: [10.0]], batch, prompts)
    assert plain.token_rewards.tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 13.0, 0.0]


def test_a_reward_that_no_action_token_can_carry_is_a_failure():
    prompts = [Prompt("rows:0:0", np.array([7, 8], np.int32), "q")]
    batch = Batch.from_trajectories([trajectory("rows:0:0", "answer", [0, -1, 2])])
    on_environment, report = score(lambda completions: [[1.0, 1.0, 0.0]], batch, prompts)
    assert report.failed == {"misplaced": 1} and math.isnan(on_environment.rewards[0])
    both = Batch.from_trajectories([trajectory("rows:0:0", "answer", [0, -1, -1, 2])])
    _, report = score(lambda completions: [[1.0, 5.0, 2.0]], both, prompts)
    assert report.failed == {"misplaced": 1}
    assert "got reward 5.0 for turn 1, which has no action token" in report.first_traceback
    fine, _ = score(lambda completions: [[1.0, 0.0, 2.0]], both, prompts)
    assert fine.token_rewards.tolist() == [1.0, 0.0, 0.0, 2.0]


def test_a_failed_sample_of_a_dense_batch_has_nan_on_every_token():
    def dense(completions):
        return [[1.0, 1.0], "no"]

    batch, _ = score(dense, *batch_of("ab", "abc"))
    np.testing.assert_array_equal(batch.token_rewards, [1.0, 1.0, NAN, NAN, NAN])
    np.testing.assert_array_equal(batch.rewards, [2.0, NAN])


def test_empty_responses_bear_zero_and_nothing_else_in_a_dense_batch():
    def dense(completions):
        return [[1.0] * len(c) for c in completions]

    batch, report = score([dense, lengths], *batch_of("ab", ""))
    assert batch.rewards.tolist() == [4.0, 0.0]
    assert report.scored == 2
    batch, report = score([dense, lambda completions: [1.0, 1.0]], *batch_of("ab", ""))
    np.testing.assert_array_equal(batch.rewards, [3.0, NAN])
    assert report.failed == {"misplaced": 1}


def test_rewards_of_an_environment_are_a_component_of_their_own():
    prompts = [Prompt("rows:0:0", np.array([7, 8], np.int32), "q")]
    played = replace(trajectory("rows:0:0", "answer", [0, -1, 1]), turn_rewards=np.array([0.5, 1.0]))
    batch, report = score(lambda completions: [2.0], Batch.from_trajectories([played]), prompts)
    assert batch.token_rewards.tolist() == [0.5, 0.0, 3.0]
    assert report.component_means["environment"] == 1.5
