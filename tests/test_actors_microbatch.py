"""Micro-batches: what goes in comes out at its own place, whatever the cut."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.actors.microbatch import cut, make, plan_rows
from apportion.batch import Batch, Trajectory

ROWS = st.lists(st.tuples(st.integers(1, 6), st.lists(st.booleans(), min_size=0, max_size=7)), min_size=1, max_size=8)


def batch_of(rows: list[tuple[int, list[bool]]]) -> Batch:
    """One trajectory a row of (prompt length, action mask); every token id is different."""
    trajectories, next_id = [], 1
    for index, (prompt, mask) in enumerate(rows):
        size = prompt + len(mask)
        trajectories.append(
            Trajectory(
                prompt_id=f"p{index}",
                group_id=index,
                sample_index=0,
                token_ids=np.arange(next_id, next_id + size, dtype=np.int32),
                prompt_length=prompt,
                action_mask=np.array(mask, bool),
                turn_ids=np.where(np.array(mask, bool), 0, -1).astype(np.int32),
                behavior_logprobs=np.zeros(len(mask), np.float32),
                policy_version=0,
                finish_reason="stop",
                text="",
            )
        )
        next_id += size
    return Batch.from_trajectories(trajectories)


def test_a_row_carries_prompt_and_response_and_points_at_the_states_that_predict_its_action_tokens():
    batch = batch_of([(2, [True, False, True]), (3, [True])])
    micro = make(batch, np.array([0, 1]))
    assert micro.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]
    assert micro.rows.tolist() == [0, 0, 1]
    assert micro.columns.tolist() == [1, 3, 2]
    assert micro.targets.tolist() == [3, 5, 9]
    assert micro.steps.tolist() == [0, 2, 0]
    assert micro.packed_index.tolist() == [0, 2, 3]
    assert micro.mask.tolist() == [[True, False, True], [True, False, False]]
    assert micro.real_tokens == 9


def test_spread_and_gather_put_values_at_their_step_and_zero_elsewhere():
    micro = make(batch_of([(2, [True, False, True]), (3, [True])]), np.array([1, 0]))
    gathered = micro.gather(np.array([10.0, 11.0, 12.0, 13.0], np.float32), "cpu")
    assert gathered.tolist() == [[13.0, 0.0, 0.0], [10.0, 0.0, 12.0]]
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    spread = micro.spread(values)
    assert spread.tolist() == [[1.0, 0.0, 0.0], [2.0, 0.0, 3.0]]
    (spread * torch.tensor([[5.0, 9.0, 9.0], [6.0, 9.0, 7.0]])).sum().backward()
    assert values.grad.tolist() == [5.0, 6.0, 7.0]


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, limit=st.integers(1, 40))
def test_every_action_token_is_in_exactly_one_micro_batch_and_comes_back_to_its_place(rows, limit):
    batch = batch_of(rows)
    packed = np.arange(1, len(batch.action_mask) + 1, dtype=np.float32)
    restored = np.zeros_like(packed)
    for micro in cut(batch, np.arange(len(batch)), limit):
        np.testing.assert_array_equal(restored[micro.packed_index], 0)
        gathered = micro.gather(packed, "cpu")
        restored[micro.packed_index] = gathered[micro.rows, micro.steps].numpy()
        # The target is the token after the state that predicts it.
        assert torch.equal(micro.input_ids[micro.rows, micro.columns + 1], micro.targets)
    np.testing.assert_array_equal(restored, np.where(batch.action_mask, packed, 0))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=0, max_size=20), limit=st.integers(1, 60))
def test_no_plan_exceeds_the_limit_but_for_a_row_that_does_so_alone(lengths, limit):
    plans = plan_rows(lengths, limit)
    assert sorted(i for plan in plans for i in plan) == list(range(len(lengths)))
    for plan in plans:
        padded = len(plan) * max(lengths[i] for i in plan)
        assert padded <= limit or len(plan) == 1


def test_only_the_chosen_trajectories_are_cut():
    batch = batch_of([(1, [True] * 3), (1, [True] * 2), (1, [True] * 4)])
    micros = cut(batch, [2, 0], 100)
    assert [m.packed_index.tolist() for m in micros] == [[5, 6, 7, 8, 0, 1, 2]]
    assert cut(batch, np.array([], np.int64), 100) == []


def test_a_response_without_action_tokens_has_no_targets_and_an_all_false_mask():
    micro = make(batch_of([(2, [False, False]), (2, [])]), np.array([0, 1]))
    assert micro.targets.tolist() == []
    assert micro.mask.tolist() == [[False, False], [False, False]]


@pytest.mark.parametrize("width", [0, 3])
def test_a_micro_batch_is_never_narrower_than_one_column(width):
    assert make(batch_of([(2, [True] * width)]), np.array([0])).width == max(1, width)
