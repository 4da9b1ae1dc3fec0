"""Cutting a shard into right-padded micro-batches, and putting per-token results back in packed order.

Rows are sorted by length so that padding stays small, and never exceed `micro_batch_tokens` padded tokens, except a row that
is longer alone. No attention mask is made: under causal attention a right-padded position is never seen by a real one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from apportion.batch import Batch


@dataclass
class MicroBatch:
    """b whole trajectories. r counts the tokens the policy chose, over all rows; T is the longest response here."""

    input_ids: Tensor  # [b, S] int64, right-padded with 0
    rows: Tensor  # [r] int64, row of each action token
    columns: Tensor  # [r] int64, position whose hidden state predicts it
    steps: Tensor  # [r] int64, its place on the response axis
    targets: Tensor  # [r] int64, its id
    width: int  # T
    packed_index: np.ndarray  # [r] int64, its place on the shard's R axis
    real_tokens: int  # unpadded tokens of input_ids

    def spread(self, values: Tensor) -> Tensor:
        """[r] to [b, T], 0 where no action token stands; keeps the gradient."""
        out = values.new_zeros(self.input_ids.shape[0], self.width)
        return out.index_put((self.rows, self.steps), values)

    def gather(self, packed: np.ndarray, device: torch.device | str) -> Tensor:
        """Values on the shard's R axis to [b, T], 0 where no action token stands."""
        return self.spread(torch.from_numpy(packed[self.packed_index]).to(device))

    @property
    def mask(self) -> Tensor:
        """[b, T] bool, where an action token stands."""
        return self.spread(torch.ones_like(self.targets, dtype=torch.bool))

    def to(self, device: torch.device | str) -> MicroBatch:
        moved = {n: getattr(self, n).to(device) for n in ("input_ids", "rows", "columns", "steps", "targets")}
        return MicroBatch(**moved, width=self.width, packed_index=self.packed_index, real_tokens=self.real_tokens)


def plan_rows(lengths: Sequence[int] | np.ndarray, micro_batch_tokens: int) -> list[list[int]]:
    """Indices of rows for each micro-batch, longest first.

    >>> plan_rows([4, 9, 5, 5], 10)
    [[1], [2, 3], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i))
    plans: list[list[int]] = []
    for index in order:
        if plans and (len(plans[-1]) + 1) * int(lengths[plans[-1][0]]) <= micro_batch_tokens:
            plans[-1].append(index)
        else:
            plans.append([index])
    return plans


def cut(batch: Batch, indices: Sequence[int] | np.ndarray, micro_batch_tokens: int) -> list[MicroBatch]:
    """Micro-batches over the trajectories of `batch` at `indices`."""
    chosen = np.asarray(indices, np.int64)
    totals = (batch.prompt_lengths + batch.response_lengths)[chosen]
    return [make(batch, chosen[rows]) for rows in plan_rows(totals, micro_batch_tokens)]


def make(batch: Batch, indices: np.ndarray) -> MicroBatch:
    token_offsets, response_offsets = batch.token_offsets, batch.response_offsets
    lengths = (batch.prompt_lengths + batch.response_lengths)[indices]
    input_ids = np.zeros((len(indices), int(lengths.max())), np.int64)
    rows, columns, steps, targets, packed = [], [], [], [], []
    for row, index in enumerate(indices):
        sequence = batch.token_ids[token_offsets[index] : token_offsets[index + 1]]
        input_ids[row, : len(sequence)] = sequence
        start, end = response_offsets[index], response_offsets[index + 1]
        step = np.flatnonzero(batch.action_mask[start:end])
        column = step + int(batch.prompt_lengths[index]) - 1
        rows.append(np.full(len(step), row))
        columns.append(column)
        steps.append(step)
        targets.append(sequence[column + 1])
        packed.append(step + start)
    join = lambda parts: torch.from_numpy(np.concatenate(parts).astype(np.int64))  # noqa: E731
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        rows=join(rows),
        columns=join(columns),
        steps=join(steps),
        targets=join(targets),
        width=max(1, int(batch.response_lengths[indices].max())),
        packed_index=np.concatenate(packed).astype(np.int64),
        real_tokens=int(lengths.sum()),
    )
