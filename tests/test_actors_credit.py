"""What the credit worker does with a batch: leaves out, cuts, deals, credits; every denominator is of the whole step."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from apportion.actors.credit import CreditSpec, CreditWorker, deal
from apportion.batch import Batch, Signals, Trajectory


def worker(**changes) -> CreditWorker:
    spec = {
        "credit": {"name": "grpo", "normalize": "none", "eps": 1e-6},
        "reduction": {"name": "token_mean"},
        "shaping": [],
        "selection": [],
        "kl_in_reward": False,
        "kl_estimator": "k1",
        "tokenizer": "",
    }
    return CreditWorker(CreditSpec(**(spec | changes)))


@pytest.fixture
def scored(credited) -> Batch:
    bare = {"advantages": None, "returns": None, "loss_weights": None, "value_weights": None, "minibatch_ids": None}
    bare |= {"old_logprobs": None, "reference_logprobs": None, "values": None}
    return replace(credited, **bare, rewards=np.array([1.0, 0.0, 1.0, 1.0, 0.0, 4.0, 2.0, 1.0]))


def test_a_trajectory_whose_reward_failed_is_left_out_and_not_averaged(scored):
    failed = replace(
        scored,
        finish_reasons=["stop", "abort", "stop", "length", "length", "abort", "stop", "stop"],
        terminated=np.array([True, False, True, False, True, False, True, True]),
        rewards=np.array([1.0, np.nan, 1.0, 1.0, np.nan, np.nan, 2.0, 1.0]),
        sample_mask=np.array([True, False, True, True, False, False, True, True]),
    )
    report, kept = worker().admit(failed)
    assert kept.sample_indices.tolist() == [0, 0, 1, 0, 1]
    assert kept.group_ids.tolist() == [0, 1, 1, 3, 3]
    assert (report.groups_kept, report.groups_dropped) == (3, 0)  # the fourth failed: no selection has dropped it
    means = report.totals.means()
    assert means["reward/mean"] == pytest.approx(6 / 5)
    assert means["rollout/response_tokens_mean"] == pytest.approx(56 / 8)  # without the environment's two
    assert means["rollout/truncated_share"] == 2 / 8


@pytest.mark.parametrize(
    ("credit", "expected"),
    [
        ({"name": "grpo", "normalize": "none"}, [0.0, 0.0, 0.0, 0.5, -0.5]),
        ({"name": "rloo"}, [0.0, 0.0, 0.0, 1.0, -1.0]),
        # THR: what is left of groups 0 and 1 are right answers alone, so they keep the base's credit of 0.
        (
            {"name": "hidden_reward", "base": {"name": "rloo"}, "p": 0.5, "tau": -1.0, "correct_at": 1.5},
            [0.0, 0.0, 0.0, 1.5, -0.5],
        ),
    ],
)
def test_groups_that_lost_members_are_compared_over_who_is_left(scored, credit, expected):
    """Rows 1, 4 and 5 are lost: group 0 has one left, group 1 two that are alike, group 2 none."""
    failed = replace(
        scored,
        rewards=np.array([1.0, np.nan, 1.0, 1.0, np.nan, np.nan, 2.0, 1.0]),
        sample_mask=np.array([True, False, True, True, False, False, True, True]),
    )
    own = worker(credit=credit)
    _, kept = own.admit(failed)
    _, shard = own.cut(4, 1, 1, kept)
    influences = np.ones(int(shard.response_lengths.sum()), np.float32)
    credited, metrics = own.assign(replace(shard, influences=influences), 0.0)
    firsts = [float(credited.advantages[credited.response_slice(row)][0]) for row in range(5)]
    assert credited.group_ids.tolist() == [0, 1, 1, 3, 3] and firsts == pytest.approx(expected)
    assert (metrics["credit/groups"], metrics["credit/singleton_groups"]) == (3, 1)
    assert float(credited.loss_weights.sum()) == pytest.approx(1.0)


def test_a_reward_for_a_turn_without_tokens_has_no_place_and_is_refused_unless_it_is_nothing():
    def trajectory(rewards):
        mask = np.array([True, True, False, True])
        ids, turns = np.arange(5, dtype=np.int32), np.array([0, 0, -1, 2], np.int32)
        logprobs = np.where(mask, -1.0, np.nan).astype(np.float32)
        return Trajectory("p", 0, 0, ids, 1, mask, turns, logprobs, 0, "stop", "", turn_rewards=np.array(rewards))

    batch = Batch.from_trajectories([trajectory([0.5, 0.0, 2.0])])
    assert batch.token_rewards.tolist() == [0.0, 0.5, 0.0, 2.0] and batch.rewards.tolist() == [2.5]
    with pytest.raises(ValueError, match=r"turn 1 of prompt p has reward 1.0 but no action token"):
        Batch.from_trajectories([trajectory([0.5, 1.0, 2.0])])


def test_selection_drops_groups_and_says_how_many(scored):
    equal = replace(scored, rewards=np.array([1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 2.0, 1.0]))
    report, kept = worker(selection=[{"name": "dynamic_sampling"}]).admit(equal)
    assert sorted(set(kept.group_ids.tolist())) == [2, 3]
    assert (report.groups_kept, report.groups_dropped) == (2, 2)


@pytest.mark.parametrize(
    "order", [("drop_truncated", "dynamic_sampling"), ("drop_truncated", "dynamic_sampling")[::-1]]
)
def test_selections_come_one_after_the_other_so_that_a_group_is_judged_by_what_is_left(scored, order):
    """Group 3 is left with one kind of reward once its truncated member is gone: sampled again, if that is asked last."""
    members = np.flatnonzero(scored.group_ids == 3).tolist()
    ended = np.ones(len(scored), bool)
    ended[members[0]] = False
    _, kept = worker(selection=[{"name": name} for name in order]).admit(replace(scored, terminated=ended))
    left = [] if order[-1] == "dynamic_sampling" else members[1:]
    assert np.flatnonzero(kept.group_ids == 3).size == len(left)
    assert set(kept.group_ids.tolist()) == {
        g for g in (0, 1, 2) if len(set(scored.rewards[scored.group_ids == g])) > 1
    } | ({3} if left else set())


@pytest.mark.parametrize("continues", [True, False])
def test_only_an_episode_in_an_environment_goes_on_with_the_critics_value_where_a_limit_cut_it(scored, continues):
    tokens = len(scored.action_mask)
    batch = replace(
        scored,
        rewards=np.zeros(len(scored)),
        values=np.full(tokens, 0.5, np.float32),
        bootstrap_values=np.full(len(scored), 0.5, np.float32),
        terminated=np.zeros(len(scored), bool),
        minibatch_ids=np.zeros(len(scored), np.int32),
    )
    spec = {"name": "gae", "gamma": 1.0, "gae_lambda": 1.0, "whiten": "none"}
    credited, _ = worker(credit=spec, continues=continues).assign(batch, 0.0)
    np.testing.assert_allclose(credited.advantages[batch.action_mask], 0.0 if continues else -0.5, atol=1e-6)
    np.testing.assert_allclose(credited.returns[batch.action_mask], 0.5 if continues else 0.0, atol=1e-6)


def test_a_cut_keeps_the_first_groups_whole_and_assigns_optimiser_steps_by_group(scored):
    report, one, two = worker().cut(3, 2, 2, scored)
    assert (report.trajectories, report.minibatches) == (6, 2)
    whole = Batch.concat([one, two])
    assert sorted(zip(whole.group_ids.tolist(), whole.sample_indices.tolist(), strict=True)) == [
        (g, s) for g in range(3) for s in range(2)
    ]
    steps = {g: set(whole.minibatch_ids[whole.group_ids == g].tolist()) for g in range(3)}
    assert steps == {0: {0}, 1: {0}, 2: {1}}
    assert report.tokens == one.tokens + two.tokens
    assert report.groups_surplus == 1  # of four


def test_there_are_never_more_optimiser_steps_than_groups(scored):
    report, shard = worker().cut(2, 1, 5, scored)
    assert report.minibatches == 2
    assert sorted(set(shard.minibatch_ids.tolist())) == [0, 1]


def test_ranks_get_about_equal_tokens_of_each_optimiser_step(scored):
    # Tokens a trajectory: 13 7 19 12 11 13 10 13; the longest first, each to the rank with the least.
    parts = deal(replace(scored, minibatch_ids=np.zeros(8, np.int32)), 2, together=False)
    assert [p.tolist() for p in parts] == [[1, 2, 4, 7], [0, 3, 5, 6]]
    steps = deal(replace(scored, minibatch_ids=np.array([0, 0, 0, 0, 1, 1, 1, 1], np.int32)), 2, together=False)
    assert [p.tolist() for p in steps] == [[1, 2, 4, 5], [0, 3, 6, 7]]


def test_groups_stay_on_one_rank_where_a_method_needs_them_whole(scored):
    parts = deal(replace(scored, minibatch_ids=np.zeros(8, np.int32)), 3, together=True)
    groups = [set(scored.group_ids[p].tolist()) for p in parts]
    assert groups == [{1}, {2}, {0, 3}] or groups == [{1}, {3}, {0, 2}] or groups == [{1}, {2, 0}, {3}]
    assert sorted(np.concatenate(parts).tolist()) == list(range(8))


def test_a_group_larger_than_a_ranks_even_share_is_split_and_the_others_stay_whole(scored):
    one = replace(scored, minibatch_ids=np.zeros(8, np.int32))
    assert [p.tolist() for p in deal(one.select([2, 3]), 2, together=True)] == [[0], [1]]
    # Tokens a group: 20 31 24; ranks' share of 75 is 37.5, then 25.
    assert [p.tolist() for p in deal(one.select(range(6)), 2, together=True)] == [[2, 3], [0, 1, 4, 5]]
    parts = deal(one.select(range(6)), 3, together=True)
    assert [p.tolist() for p in parts] == [[4, 5], [0, 1], [2, 3]]


def test_more_ranks_than_trajectories_leaves_a_rank_with_none(scored):
    report, *shards = worker().cut(1, 3, 1, scored)
    assert [len(s) for s in shards] == [1, 1, 0]
    credit, *out = worker().credit(3, 0.0, 0, *shards)
    assert [len(s) for s in out] == [1, 1, 0]
    assert report.trajectories == 2
    assert credit.samples == []


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize(("name", "total"), [("token_mean", 1.0), ("sequence_mean", 1.0)])
def test_loss_weights_of_an_optimiser_step_sum_to_one_however_many_ranks_there_are(scored, shards, name, total):
    credit = worker(reduction={"name": name})
    report, *parts = credit.cut(4, shards, 2, scored)
    _, *out = credit.credit(shards, 0.0, 0, *parts)
    whole = Batch.concat([s for s in out if len(s)])
    step_of_token = np.repeat(whole.minibatch_ids, whole.response_lengths)
    for step in range(report.minibatches):
        assert whole.loss_weights[step_of_token == step].sum() == pytest.approx(total, rel=1e-5)
        assert whole.value_weights[step_of_token == step].sum() == pytest.approx(1.0, rel=1e-5)
    assert not whole.loss_weights[~whole.action_mask].any()


@pytest.mark.parametrize("shards", [2, 3])
def test_credit_does_not_depend_on_the_ranks(scored, shards):
    def by_token(count: int) -> dict:
        credit = worker()
        _, *parts = credit.cut(4, count, 2, scored)
        _, *out = credit.credit(count, 0.0, 0, *parts)
        whole = Batch.concat(out)
        return {
            (g, s): (
                whole.advantages[whole.response_slice(i)].tolist(),
                whole.loss_weights[whole.response_slice(i)].tolist(),
            )
            for i, (g, s) in enumerate(zip(whole.group_ids.tolist(), whole.sample_indices.tolist(), strict=True))
        }

    assert by_token(shards) == by_token(1)


def test_advantages_are_the_reward_less_the_groups_mean_on_every_action_token(scored):
    credited, _ = worker().assign(replace(scored, minibatch_ids=np.zeros(8, np.int32)), 0.0)
    expected = np.repeat(np.array([0.5, -0.5, 0, 0, -2, 2, 0.5, -0.5], np.float32), scored.response_lengths)
    np.testing.assert_allclose(credited.advantages, np.where(scored.action_mask, expected, 0), atol=1e-6)


def test_signals_of_each_pass_reach_their_own_shard(scored):
    credit = worker(kl_in_reward=True, credit={"name": "reinforce_pp"})
    _, *parts = credit.cut(4, 2, 1, scored)
    old = [
        Signals(old_logprobs=np.full(int(p.response_lengths.sum()), -float(i + 1), np.float32))
        for i, p in enumerate(parts)
    ]
    reference = [Signals(reference_logprobs=np.zeros(int(p.response_lengths.sum()), np.float32)) for p in parts]
    report, *out = credit.credit(2, 0.1, 0, *parts, *old, *reference)
    assert [set(s.old_logprobs.tolist()) for s in out] == [{-1.0}, {-2.0}]
    tokens = [int(s.action_mask.sum()) for s in out]
    k3 = [np.exp(1.0) - 1 - 1.0, np.exp(2.0) - 1 - 2.0]
    assert report.metrics["policy/kl_reference"] == pytest.approx(np.dot(tokens, k3) / sum(tokens), rel=1e-5)


@pytest.mark.parametrize("name", ["grpo", "reinforce_pp"])
def test_kl_in_the_reward_reaches_methods_that_read_the_outcome_and_those_that_read_tokens(scored, name):
    """k1 of 1 on each of n action tokens, coefficient 0.1: the first token carries -0.1 n, the last -0.1."""
    credit = {"name": "grpo", "normalize": "none"} if name == "grpo" else {"name": name, "whiten": "none"}
    batch = replace(
        scored,
        rewards=np.zeros(8),
        minibatch_ids=np.zeros(8, np.int32),
        old_logprobs=np.full(58, -1.0, np.float32),
        reference_logprobs=np.full(58, -2.0, np.float32),
    )
    credited, _ = worker(credit=credit, kl_in_reward=True).assign(batch, 0.1)
    for row in range(8):
        mask = batch.action_mask[batch.response_slice(row)]
        got = credited.advantages[batch.response_slice(row)][mask]
        np.testing.assert_allclose(got, -0.1 * np.arange(mask.sum(), 0, -1), rtol=1e-5)


def test_a_critics_explained_variance_is_reported_once_whatever_the_method(scored):
    """Rewards at the last token, lambda 1: returns are the reward on each token. Values that say so explain it all."""
    perfect = np.repeat(scored.rewards, scored.response_lengths).astype(np.float32)
    batch = replace(
        scored, minibatch_ids=np.zeros(8, np.int32), values=perfect, bootstrap_values=np.zeros(8, np.float32)
    )
    for spec in (
        {"name": "gae"},
        {"name": "poad", "gamma": 1.0, "gae_lambda": 1.0},
        {"name": "macro_actions", "n_gram": 3, "gae_lambda": 1.0},
    ):
        _, metrics = worker(credit=spec).assign(batch, 0.0)
        assert metrics["critic/explained_variance"] == pytest.approx(1.0), spec
        assert [name for name in metrics if "explained_variance" in name] == ["critic/explained_variance"]


def test_kl_in_the_reward_without_its_signals_is_refused(scored):
    with pytest.raises(ValueError, match=r"kl\.place=reward: got no old or reference log-probs, expected both signals"):
        worker(kl_in_reward=True).assign(replace(scored, minibatch_ids=np.zeros(8, np.int32)), 0.1)


def test_selected_concatenated_and_padded_batches_keep_every_value(scored):
    parts = [scored.select([5, 0]), scored.select([]), scored.select([3])]
    joined = Batch.concat([p for p in parts if len(p)])
    assert joined.rewards.tolist() == [4.0, 1.0, 1.0]
    assert joined.prompt_ids == ["p2", "p0", "p1"]
    for place, index in enumerate([5, 0, 3]):
        np.testing.assert_array_equal(joined.sequence(place), scored.sequence(index))
        np.testing.assert_array_equal(
            joined.behavior_logprobs[joined.response_slice(place)],
            scored.behavior_logprobs[scored.response_slice(index)],
        )
    padded = joined.pad("turn_ids", -7)
    assert padded.shape == (3, 10)
    assert padded[0].tolist() == [0, 0, 0, 0, -1, -1, 0, 0, 0, 0]
    assert padded[2].tolist() == [0, 0, 0, 0, 0, -7, -7, -7, -7, -7]
    np.testing.assert_array_equal(joined.unpad(padded), joined.turn_ids)


def test_joining_batches_of_which_some_lack_a_field_is_refused(scored):
    with pytest.raises(ValueError, match="rewards: known in 1 of 2 batches, expected all or none"):
        Batch.concat([scored, replace(scored, rewards=None)])


def test_padding_a_field_that_is_missing_says_how_to_get_it(scored):
    with pytest.raises(ValueError, match="values: this batch does not have it; declare it in the method's `needs`"):
        scored.pad("values")


def test_joining_batches_changes_none_of_them(scored):
    first, second = scored.select([0]), scored.select([1])
    Batch.concat([first, second])
    assert (first.prompt_ids, len(first.texts), second.prompt_ids) == (["p0"], 1, ["p0"])


def test_an_outcome_stands_at_the_last_action_token(scored):
    from apportion.actors.credit import credit_input

    inputs = credit_input(scored)
    assert inputs.token_rewards_BT[5].tolist() == [0.0] * 9 + [4.0] + [0.0] * 2
    assert torch.equal(inputs.token_rewards_BT.sum(1), inputs.rewards_B)
