"""Several engines' batches: some with a reward for every token, others with one for the whole response; what they are
evaluated and counted as."""

from dataclasses import replace

import numpy as np
import pytest
from scoring_parts import NAN, batch_of, score, trajectory

from apportion.actors.credit import CreditSpec, CreditWorker, joined, rollout_totals
from apportion.batch import Batch

SPEC = CreditSpec({"name": "grpo", "normalize": "none"}, {"name": "token_mean"}, [], [], False, "k1", "")


def plain_and_dense() -> tuple[Batch, Batch]:
    """Two engines' batches, groups 0 and 1: numbers 2 and 1 (an environment's token last), lists for 'ab' and 'c'."""
    plain = Batch.from_trajectories([trajectory("rows:0:0", "abc"), trajectory("rows:1:0", "ab", [0, 0, -1])])
    batch, prompts = batch_of("ab", "c")
    plain, _ = score(lambda completions: [2.0, 1.0], plain, prompts)
    dense, _ = score(lambda completions: [[0.5, 0.25], [4.0]], batch, prompts)
    return plain, replace(dense, group_ids=np.ones(2, np.int64))


def test_plain_rewards_stand_at_the_last_action_token_beside_dense_ones():
    plain, dense = plain_and_dense()
    whole = joined([plain, dense])
    assert whole.token_rewards.tolist() == [0, 0, 2, 0, 1, 0, 0.5, 0.25, 4]
    assert whole.rewards.tolist() == [2, 1, 0.75, 4]
    assert whole.token_rewards.dtype == dense.token_rewards.dtype
    assert plain.token_rewards is None


def test_plain_batches_alone_stay_plain_and_dense_ones_stay_as_they_are():
    plain, dense = plain_and_dense()
    assert joined([plain, plain]).token_rewards is None
    assert joined([dense, dense]).token_rewards.tolist() == [0.5, 0.25, 4] * 2


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_engines_with_lists_and_engines_with_numbers_make_one_step(order):
    worker, batches = CreditWorker(SPEC), plain_and_dense()
    admitted = [worker.admit(batches[i])[1] for i in order]
    report, shard = worker.cut(2, 1, 1, *admitted)
    _, credited = worker.credit(1, 0.0, 0, shard)
    assert report.trajectories == 4
    firsts = {
        (g, n): credited.advantages[credited.response_slice(i)][0]
        for i, (g, n) in enumerate(zip(credited.group_ids.tolist(), credited.response_lengths.tolist(), strict=True))
    }  # both of group 0 have three response tokens, so its last one, or its first, is read
    assert firsts[(1, 2)] == pytest.approx(-1.625) and firsts[(1, 1)] == pytest.approx(1.625)
    assert abs(firsts[(0, 3)]) == pytest.approx(0.5)


def test_an_engine_all_of_whose_lists_failed_is_evaluated_beside_the_others():
    plain, dense = plain_and_dense()
    batch, prompts = batch_of("ab", "c")
    failed, _ = score(lambda completions: [[NAN, 0.0], [NAN]], batch, prompts)
    assert failed.token_rewards is None
    whole = joined([failed, dense])
    np.testing.assert_array_equal(whole.token_rewards, np.array([NAN] * 3 + [0.5, 0.25, 4], np.float32))
    report = CreditWorker(SPEC).evaluate(4.0, [1], 0, [failed, dense, plain], [failed, dense])
    assert report.metrics["eval/greedy_accuracy"] == pytest.approx(1 / 4)
    assert report.metrics["eval/mean_reward"] == pytest.approx((2 + 1 + 0.75 + 4) / 4)
    assert report.metrics["eval/avg_at_k"] == pytest.approx(1 / 2)


def answers(*given: tuple[str, float], turn_ids: dict[int, list[int]] | None = None) -> Batch:
    """One engine's scored answers: (prompt, reward) each, of one token where `turn_ids` says nothing else."""
    rows = [trajectory(name, "a", (turn_ids or {}).get(place)) for place, (name, _) in enumerate(given)]
    rewards = np.array([reward for _, reward in given])
    return replace(Batch.from_trajectories(rows), rewards=rewards, sample_mask=~np.isnan(rewards))


def test_answers_of_several_engines_are_evaluated_prompt_by_prompt_without_failed_rewards():
    """p0 is right in its one known answer, p1 in one of four: shares of 1 and 1/4. Two of p1's answers, drawn without
    replacement, have the right one in half of the draws; p0 has not two. Pooled, 2 of 5 would be right."""
    greedy = [answers(("p0", 1.0), turn_ids={0: [0, 0, 0]}), answers(("p1", NAN), turn_ids={0: [0, -1]})]
    sampled = [
        answers(("p0", 1.0), ("p0", NAN), ("p1", 0.0), ("p1", 0.0)),
        answers(("p0", NAN), ("p0", NAN), ("p1", 0.0), ("p1", 1.0)),
    ]
    report = CreditWorker(SPEC).evaluate_refs(1.0, [1, 2, 4], 1, 2, *greedy, *sampled)
    metrics = report.metrics
    assert metrics["eval/avg_at_k"] == (1 + 1 / 4) / 2
    assert metrics["eval/pass_at_1"] == pytest.approx((1 + 1 / 4) / 2)
    assert metrics["eval/pass_at_2"] == pytest.approx(1 / 2)
    assert metrics["eval/pass_at_4"] == 1.0
    assert metrics["eval/greedy_accuracy"] == metrics["eval/mean_reward"] == 1.0
    assert metrics["eval/response_tokens_mean"] == 2.0  # 3 and 1: the environment's token is not the policy's
    assert report.answers == [{"prompt_id": "p0", "answer": "a", "reward": 1.0}]


def test_the_longest_response_is_counted_in_the_policys_own_tokens():
    batch = answers(("p0", 1.0), ("p1", NAN), turn_ids={0: [0, -1, -1, -1], 1: [0, 0]})
    means = rollout_totals(batch).means()
    assert (means["rollout/response_tokens_max"], means["rollout/response_tokens_mean"]) == (2, 1.5)
