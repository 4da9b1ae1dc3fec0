"""Cutting a shard into right-padded micro-batches, and putting per-token results back in packed order.

Rows are sorted by length so that padding stays small, and never exceed `micro_batch_tokens` padded tokens, except a row that
is longer alone. No attention mask is made: under causal attention a right-padded position is never seen by a real one.

With `share_prompts` the responses of one group stand behind their prompt in ONE row: the prompt is computed once, and a
tree mask with the right positions lets each response see the prompt and itself alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.batch import Batch


@dataclass
class Tree:
    """What a micro-batch of shared prompts needs beside its ids; a row is a prompt and several responses to it."""

    members: Tensor  # [r] int64, trajectory (0 to b - 1) of each action token
    trajectories: int  # b
    positions: Tensor  # [rows, S] int64
    segments: Tensor  # [rows, S] int64: 0 what all of the row see (a prompt), 1.. what only itself sees, -1 padding

    @property
    def visible(self) -> Tensor:
        """[rows, 1, S, S] bool, which positions each position attends to: earlier ones of the prompt and of its own
        segment. Made for each pass: the masks of a whole data set would not fit. Padding sees itself, so that no softmax
        is over nothing."""
        ids = self.segments
        query, key = ids[:, :, None], ids[:, None, :]
        earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device)
        seen = earlier.tril() & (key >= 0) & ((key == 0) | (key == query))
        return (seen | torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device))[:, None]

    def to(self, device: torch.device | str) -> Tree:
        return Tree(self.members.to(device), self.trajectories, self.positions.to(device), self.segments.to(device))


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
    real_tokens: int  # tokens of the trajectories, a shared prompt counted in each
    tree: Tree | None = None  # None: a row is a trajectory

    @property
    def trajectories(self) -> int:
        """b"""
        return self.input_ids.shape[0] if self.tree is None else self.tree.trajectories

    @property
    def members(self) -> Tensor:
        """[r] int64, trajectory (0 to b - 1) of each action token"""
        return self.rows if self.tree is None else self.tree.members

    @property
    def layout(self) -> tuple[Tensor, Tensor] | None:
        """What a module's `tree` takes: positions, and which each attends to; None for rows of one trajectory each."""
        return None if self.tree is None else (self.tree.positions, self.tree.visible)

    def spread(self, values: Tensor) -> Tensor:
        """[r] to [b, T], 0 where no action token stands; keeps the gradient."""
        out = values.new_zeros(self.trajectories, self.width)
        return out.index_put((self.members, self.steps), values)

    def gather(self, packed: np.ndarray, device: torch.device | str) -> Tensor:
        """Values on the shard's R axis to [b, T], 0 where no action token stands."""
        return self.spread(torch.from_numpy(packed[self.packed_index]).to(device))

    @property
    def mask(self) -> Tensor:
        """[b, T] bool, where an action token stands."""
        return self.spread(torch.ones_like(self.targets, dtype=torch.bool))

    def to(self, device: torch.device | str) -> MicroBatch:
        moved: dict[str, Any] = {
            n: getattr(self, n).to(device) for n in ("input_ids", "rows", "columns", "steps", "targets")
        }
        return replace(self, **moved, tree=self.tree.to(device) if self.tree else None)


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


def cut(
    batch: Batch, indices: Sequence[int] | np.ndarray, micro_batch_tokens: int, share_prompts: bool = False
) -> list[MicroBatch]:
    """Micro-batches over the trajectories of `batch` at `indices`."""
    chosen = np.asarray(indices, np.int64)
    if share_prompts:
        families = _families(batch, chosen, micro_batch_tokens)
        lengths = [_family_length(batch, family) for family in families]
        return [make_tree(batch, [families[i] for i in rows]) for rows in plan_rows(lengths, micro_batch_tokens)]
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


def _family_length(batch: Batch, family: np.ndarray) -> int:
    return int(batch.prompt_lengths[family[0]] + batch.response_lengths[family].sum())


def _families(batch: Batch, indices: np.ndarray, micro_batch_tokens: int) -> list[np.ndarray]:
    """Trajectories with the same prompt, as many together as fit into one micro-batch."""
    offsets = batch.token_offsets
    groups: dict[tuple[int, bytes], list[int]] = {}
    for index in indices.tolist():
        prompt = batch.token_ids[offsets[index] : offsets[index] + batch.prompt_lengths[index]]
        groups.setdefault((int(batch.group_ids[index]), prompt.tobytes()), []).append(index)
    families: list[np.ndarray] = []
    for members in groups.values():
        room = 0
        family: list[int] = []
        for index in members:
            length = int(batch.response_lengths[index])
            if family and room + length > micro_batch_tokens:
                families.append(np.array(family, np.int64))
                family = []
            room = (room if family else int(batch.prompt_lengths[index])) + length
            family.append(index)
        families.append(np.array(family, np.int64))
    return families


def make_tree(batch: Batch, families: list[np.ndarray]) -> MicroBatch:
    """One row a family: its prompt, then its responses side by side."""
    width = max(_family_length(batch, family) for family in families)
    input_ids = np.zeros((len(families), width), np.int64)
    positions = np.zeros((len(families), width), np.int64)
    segments = np.full((len(families), width), -1, np.int64)  # 0 prompt, 1.. responses, -1 padding
    token_offsets, response_offsets = batch.token_offsets, batch.response_offsets
    parts: dict[str, list[np.ndarray]] = {n: [] for n in ("rows", "columns", "steps", "targets", "members", "packed")}
    member = 0
    for row, family in enumerate(families):
        prompt = int(batch.prompt_lengths[family[0]])
        first = token_offsets[family[0]]
        input_ids[row, :prompt] = batch.token_ids[first : first + prompt]
        positions[row, :prompt], segments[row, :prompt] = np.arange(prompt), 0
        end = prompt
        for branch, index in enumerate(family, start=1):
            start, length = end, int(batch.response_lengths[index])
            end = start + length
            input_ids[row, start:end] = batch.sequence(int(index))[prompt:]
            positions[row, start:end], segments[row, start:end] = prompt + np.arange(length), branch
            step = np.flatnonzero(batch.action_mask[response_offsets[index] : response_offsets[index + 1]])
            parts["steps"].append(step)
            parts["rows"].append(np.full(len(step), row))
            # The first token of a response is predicted by the prompt's last position, wherever the response stands.
            parts["columns"].append(np.where(step == 0, prompt - 1, start + step - 1))
            parts["targets"].append(input_ids[row, start + step])
            parts["members"].append(np.full(len(step), member))
            parts["packed"].append(step + response_offsets[index])
            member += 1
    joined = {name: np.concatenate(part).astype(np.int64) for name, part in parts.items()}
    tensors = {name: torch.from_numpy(joined[name]) for name in ("rows", "columns", "steps", "targets")}
    chosen = np.concatenate(families)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        **tensors,
        width=max(1, int(batch.response_lengths[chosen].max())),
        packed_index=joined["packed"],
        real_tokens=int((batch.prompt_lengths + batch.response_lengths)[chosen].sum()),
        tree=Tree(torch.from_numpy(joined["members"]), member, torch.from_numpy(positions), torch.from_numpy(segments)),
    )


def nothing() -> MicroBatch:
    """A pass that a rank makes only to keep pace with the others: one short row, none of whose tokens is in a batch."""
    zero = torch.zeros(1, dtype=torch.int64)
    return MicroBatch(
        input_ids=torch.zeros(1, 2, dtype=torch.int64),
        rows=zero,
        columns=zero,
        steps=zero,
        targets=zero,
        width=1,
        packed_index=np.zeros(0, np.int64),
        real_tokens=0,
    )
