"""Whole sequences one behind the other in one row, none of which sees another: no padding at all.

A packed row is a `Tree` without a shared prompt: every sequence begins at position 0 and attends to itself alone. What
comes out is in the order of the sequences, as from `microbatch.make`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from apportion.actors.microbatch import MicroBatch, Tree, make
from apportion.batch import Batch


def plan_bins(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Which lengths share a row of `capacity` tokens: first fit, longest first. A longer one has a row for itself.

    >>> plan_bins([4, 9, 5, 1, 6], 10)
    [[1, 3], [4, 0], [2]]
    """
    bins: list[list[int]] = []
    rooms: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i)):
        length = int(lengths[index])
        place = next((i for i, room in enumerate(rooms) if room >= length), None)
        if place is None:
            bins.append([])
            rooms.append(capacity)
            place = len(bins) - 1
        bins[place].append(index)
        rooms[place] -= length
    return bins


def make_packed(batch: Batch, indices: np.ndarray) -> MicroBatch:
    """One row of all trajectories at `indices`."""
    padded = make(batch, indices)
    lengths = (batch.prompt_lengths + batch.response_lengths)[indices].astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    owners = torch.from_numpy(np.repeat(np.arange(len(indices)), lengths))
    positions = torch.from_numpy(np.arange(lengths.sum()) - np.repeat(starts, lengths))
    members = padded.rows
    return MicroBatch(
        input_ids=torch.from_numpy(np.concatenate([batch.sequence(int(i)) for i in indices]).astype(np.int64))[None],
        rows=torch.zeros_like(members),
        columns=padded.columns + torch.from_numpy(starts)[members],
        steps=padded.steps,
        targets=padded.targets,
        width=padded.width,
        packed_index=padded.packed_index,
        real_tokens=padded.real_tokens,
        tree=Tree(members, len(indices), positions[None], owners[None] + 1),
    )
