"""The nouns that travel between actors: Prompt, Trajectory, Batch, StepReport.

Everything ragged is packed: one flat numpy array and offsets, so that Ray's object store maps it into a reader without
a copy. Padding appears only where `Batch.pad` makes the small `[B, T]` tensors that credit and losses read.

Axes: B trajectory, N every token of a batch, R every response token of a batch (what follows the prompt, environment
tokens included), T padded response length.

What a field does not know is None (the whole field) or NaN (one element), never 0.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

FINISH_REASONS = ("stop", "length", "abort")


@dataclass
class Prompt:
    """One row of a data source, ready to be sampled from.

    `prompt` is what the user wrote (text or messages); `columns` holds every other column and reaches the reward
    functions untouched.
    """

    prompt_id: str  # unique within a run
    token_ids: np.ndarray  # [L] int32
    prompt: Any  # str or list of {"role", "content"}
    columns: dict[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass
class Trajectory:
    """One sampled response, with whatever an environment put between its turns. The sampled ids are kept as sampled."""

    prompt_id: str
    group_id: int  # trajectories of a group share their baseline
    sample_index: int  # place within the group
    token_ids: np.ndarray  # [S] int32, prompt then response
    prompt_length: int
    action_mask: np.ndarray  # [S - prompt_length] bool, True where the policy chose the token
    turn_ids: np.ndarray  # [S - prompt_length] int32, 0-based turn of each token; environment tokens carry -1
    behavior_logprobs: np.ndarray  # [S - prompt_length] float32, NaN where the policy did not choose
    policy_version: int
    finish_reason: str  # one of FINISH_REASONS
    text: str  # the response as text, for people and verifiers
    terminated: bool = True  # False: cut by a limit, the value of what would follow is unknown
    turn_rewards: np.ndarray | None = None  # [turns] float64, when an environment gave them
    failure: str | None = None  # why its environment gave no reward

    def __post_init__(self) -> None:
        response = len(self.token_ids) - self.prompt_length
        for name in ("action_mask", "turn_ids", "behavior_logprobs"):
            got = len(getattr(self, name))
            if got != response:
                raise ValueError(f"{name}: got {got} values for {response} response tokens of prompt {self.prompt_id}")
        if self.finish_reason not in FINISH_REASONS:
            raise ValueError(f"finish_reason: got {self.finish_reason!r}, expected one of {FINISH_REASONS}")


@dataclass
class Critique:
    """What a judge said of one response. Without a vote (`wrong_steps` is None) `failure` says why."""

    wrong_steps: list[int] | None  # from 0, increasing
    failure: str = ""  # one of the words of `actors.judge_client`
    answer: str = ""  # the judge's own text
    detail: str = ""  # of a failure, for people


def _axis(axis: str, **kwargs: Any) -> Any:
    return field(metadata={"axis": axis}, **kwargs)


@dataclass
class Batch:
    """Trajectories in packed form. `axis` in a field's metadata says along what it is cut: B, N or R."""

    prompt_ids: list[str] = _axis("B")
    group_ids: np.ndarray = _axis("B")  # int64
    sample_indices: np.ndarray = _axis("B")  # int32
    prompt_lengths: np.ndarray = _axis("B")  # int32
    response_lengths: np.ndarray = _axis("B")  # int32
    policy_versions: np.ndarray = _axis("B")  # int32
    finish_reasons: list[str] = _axis("B")
    terminated: np.ndarray = _axis("B")  # bool
    texts: list[str] = _axis("B")
    token_ids: np.ndarray = _axis("N")  # int32
    action_mask: np.ndarray = _axis("R")  # bool
    turn_ids: np.ndarray = _axis("R")  # int32
    behavior_logprobs: np.ndarray = _axis("R")  # float32
    # scored
    rewards: np.ndarray | None = _axis("B", default=None)  # float64, NaN where the reward failed
    token_rewards: np.ndarray | None = _axis("R", default=None)  # float32; where there is one, rewards is its sum
    sample_mask: np.ndarray | None = _axis("B", default=None)  # bool, False: takes no part in credit or loss
    # signals
    old_logprobs: np.ndarray | None = _axis("R", default=None)  # float32, trainer's log-probs before the update
    reference_logprobs: np.ndarray | None = _axis("R", default=None)  # float32
    values: np.ndarray | None = _axis("R", default=None)  # float32, value of the state before each token
    bootstrap_values: np.ndarray | None = _axis("B", default=None)  # float32, value after the last token
    entropies: np.ndarray | None = _axis("R", default=None)  # float32
    influences: np.ndarray | None = _axis("R", default=None)  # float32, per-token scores made beside the hidden states
    step_ids: np.ndarray | None = _axis("R", default=None)  # int32, reasoning step of each token
    wrong_steps: list[list[int]] | None = _axis("B", default=None)  # voted wrong step ids
    critiques: list[list[Critique]] | None = _axis("B", default=None)  # what the vote was taken over
    # credited
    advantages: np.ndarray | None = _axis("R", default=None)  # float32
    returns: np.ndarray | None = _axis("R", default=None)  # float32
    loss_weights: np.ndarray | None = _axis("R", default=None)  # float32; the loss is sum(loss_weights * token loss)
    value_weights: np.ndarray | None = _axis("R", default=None)  # float32; likewise for the critic's loss
    segment_ids: np.ndarray | None = _axis("R", default=None)  # int32, macro action of each token, -1 for none
    minibatch_ids: np.ndarray | None = _axis("B", default=None)  # int32, optimiser step of this batch that uses it

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def token_offsets(self) -> np.ndarray:
        """[B + 1] int64, where each trajectory starts on the N axis."""
        return np.concatenate([[0], np.cumsum(self.prompt_lengths + self.response_lengths, dtype=np.int64)])

    @property
    def response_offsets(self) -> np.ndarray:
        """[B + 1] int64, where each response starts on the R axis."""
        return np.concatenate([[0], np.cumsum(self.response_lengths, dtype=np.int64)])

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def action_tokens(self) -> int:
        return int(self.action_mask.sum())

    def sequence(self, index: int) -> np.ndarray:
        """Prompt and response ids of one trajectory, a view [S] int32."""
        start, end = self.token_offsets[index : index + 2]
        return self.token_ids[start:end]

    def response_slice(self, index: int) -> slice:
        offsets = self.response_offsets
        return slice(int(offsets[index]), int(offsets[index + 1]))

    @staticmethod
    def from_trajectories(trajectories: Sequence[Trajectory]) -> Batch:
        """Pack trajectories. Turn rewards, where given, become token rewards at the last action token of each turn.

        >>> t = Trajectory("p", 0, 0, np.array([5, 6, 7], np.int32), 1, np.ones(2, bool), np.zeros(2, np.int32),
        ...                np.array([-1., -2.], np.float32), 0, "stop", "ab")
        >>> Batch.from_trajectories([t, t]).response_offsets.tolist()
        [0, 2, 4]
        """
        if not trajectories:
            raise ValueError("trajectories: got none, expected at least one")
        cat = np.concatenate
        lengths = [len(t.token_ids) - t.prompt_length for t in trajectories]
        batch = Batch(
            prompt_ids=[t.prompt_id for t in trajectories],
            group_ids=np.array([t.group_id for t in trajectories], np.int64),
            sample_indices=np.array([t.sample_index for t in trajectories], np.int32),
            prompt_lengths=np.array([t.prompt_length for t in trajectories], np.int32),
            response_lengths=np.array(lengths, np.int32),
            policy_versions=np.array([t.policy_version for t in trajectories], np.int32),
            finish_reasons=[t.finish_reason for t in trajectories],
            terminated=np.array([t.terminated for t in trajectories], bool),
            texts=[t.text for t in trajectories],
            token_ids=cat([np.asarray(t.token_ids, np.int32) for t in trajectories]),
            action_mask=cat([np.asarray(t.action_mask, bool) for t in trajectories]),
            turn_ids=cat([np.asarray(t.turn_ids, np.int32) for t in trajectories]),
            behavior_logprobs=cat([np.asarray(t.behavior_logprobs, np.float32) for t in trajectories]),
        )
        if any(t.turn_rewards is not None for t in trajectories):
            batch = batch.with_token_rewards([_turn_rewards_on_tokens(t) for t in trajectories])
            assert batch.rewards is not None
            batch.rewards[[t.failure is not None for t in trajectories]] = np.nan  # a row may have no token to say so
        return batch

    def with_token_rewards(self, rows: Sequence[np.ndarray]) -> Batch:
        """Replace `token_rewards` by one row [R_i] a trajectory, and `rewards` by their sums."""
        for index, (row, length) in enumerate(zip(rows, self.response_lengths, strict=True)):
            if len(row) != length:
                raise ValueError(f"token_rewards: got {len(row)} values for {length} response tokens in sample {index}")
        packed = np.concatenate(rows).astype(np.float32)
        return replace(self, token_rewards=packed, rewards=np.array([float(np.sum(row)) for row in rows], np.float64))

    def select(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The trajectories at `indices`, in that order."""
        chosen = np.asarray(indices, np.int64)
        spans = {"N": self.token_offsets, "R": self.response_offsets}
        pick: dict[str, np.ndarray] = {}
        for axis, offsets in spans.items():
            parts = [np.arange(offsets[i], offsets[i + 1]) for i in chosen]
            pick[axis] = np.concatenate(parts) if parts else np.empty(0, np.int64)
        out: dict[str, Any] = {}
        for f in fields(self):
            value, axis = getattr(self, f.name), f.metadata["axis"]
            if value is None:
                out[f.name] = None
            elif axis == "B":
                out[f.name] = [value[i] for i in chosen] if isinstance(value, list) else value[chosen]
            else:
                out[f.name] = value[pick[axis]]
        return Batch(**out)

    @staticmethod
    def concat(batches: Sequence[Batch]) -> Batch:
        """Batches one after the other. A field that only some of them have is an error."""
        if not batches:
            raise ValueError("batches: got none, expected at least one")
        if len(batches) == 1:
            return batches[0]
        out: dict[str, Any] = {}
        for f in fields(Batch):
            values = [getattr(b, f.name) for b in batches]
            missing = sum(v is None for v in values)
            if missing == len(values):
                out[f.name] = None
            elif missing:
                raise ValueError(
                    f"{f.name}: known in {len(values) - missing} of {len(values)} batches, expected all or none"
                )
            else:
                out[f.name] = (
                    functools.reduce(operator.iadd, values, [])
                    if isinstance(values[0], list)
                    else np.concatenate(values)
                )
        return Batch(**out)

    def pad(self, name: str, fill: float = 0.0) -> torch.Tensor:
        """A field on the R axis as a padded tensor `[B, T]`, right-padded with `fill`; ValueError if it is None."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{name}: this batch does not have it; declare it in the method's `needs`")
        return pad_rows(value, self.response_lengths, fill)

    def unpad(self, padded: torch.Tensor) -> np.ndarray:
        """The inverse of `pad`: `[B, T]` to a packed array [R]."""
        valid = torch.arange(padded.shape[1])[None, :] < torch.as_tensor(self.response_lengths)[:, None]
        return padded.detach().cpu()[valid].numpy()


def pad_rows(packed: np.ndarray, lengths: np.ndarray, fill: float = 0.0) -> torch.Tensor:
    """Packed [R] and lengths [B] to `[B, T]`, right-padded with `fill`."""
    width = int(lengths.max()) if len(lengths) else 0
    out = torch.full((len(lengths), width), fill, dtype=torch.from_numpy(packed[:0].copy()).dtype)
    valid = torch.arange(width)[None, :] < torch.as_tensor(np.asarray(lengths))[:, None]
    out[valid] = torch.from_numpy(np.array(packed))
    return out


def _turn_rewards_on_tokens(t: Trajectory) -> np.ndarray:
    row = np.zeros(len(t.turn_ids), np.float64)
    if t.failure is not None:
        return row * np.nan
    if t.turn_rewards is None:
        raise ValueError(f"turn_rewards: missing for prompt {t.prompt_id} while others of its batch have them")
    for turn, reward in enumerate(t.turn_rewards):
        places = np.flatnonzero(t.turn_ids == turn)
        if len(places):
            row[places[-1]] = reward
        elif reward != 0:
            raise ValueError(
                f"turn_rewards: turn {turn} of prompt {t.prompt_id} has reward {reward} but no action token"
            )
    return row


@dataclass
class Signals:
    """What a model pass adds to a shard: arrays on the shard's own axes, None where the pass does not make them."""

    old_logprobs: np.ndarray | None = None  # [R]
    reference_logprobs: np.ndarray | None = None  # [R]
    entropies: np.ndarray | None = None  # [R]
    influences: np.ndarray | None = None  # [R]
    values: np.ndarray | None = None  # [R]
    bootstrap_values: np.ndarray | None = None  # [B]

    def apply(self, batch: Batch) -> Batch:
        known = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(batch, **known)


@dataclass
class Marks:
    """What a judge adds to the rows of a batch that it was given; several judges share a batch by rows."""

    rows: list[int]  # places in the batch
    step_ids: list[np.ndarray]  # of each row [R_i] int32
    wrong_steps: list[list[int]]
    critiques: list[list[Critique]]

    @staticmethod
    def apply(batch: Batch, parts: Sequence[Marks]) -> Batch:
        """The batch with the marks of all its rows; unchanged if there are no parts."""
        if not parts:
            return batch
        place = {row: (part, i) for part in parts for i, row in enumerate(part.rows)}
        if sorted(place) != list(range(len(batch))):
            raise ValueError(f"marks: got {len(place)} rows of {len(batch)} trajectories, expected each one's")
        found = [place[row] for row in range(len(batch))]
        return replace(
            batch,
            step_ids=np.concatenate([part.step_ids[i] for part, i in found]).astype(np.int32),
            wrong_steps=[part.wrong_steps[i] for part, i in found],
            critiques=[part.critiques[i] for part, i in found],
        )


@dataclass
class Totals:
    """Sums with their weights, and maxima, of many ranks and micro-batches; means are taken once, at the end."""

    sums: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: float, weight: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.weights[name] = self.weights.get(name, 0.0) + float(weight)

    def maximum(self, name: str, value: float) -> None:
        self.maxima[name] = max(self.maxima.get(name, float("-inf")), float(value))

    def merge(self, other: Totals) -> None:
        for name, total in other.sums.items():
            self.add(name, total, other.weights[name])
        for name, value in other.maxima.items():
            self.maximum(name, value)

    def means(self) -> dict[str, float]:
        """Means and maxima by name; a mean over nothing is left out."""
        out = {n: s / self.weights[n] for n, s in self.sums.items() if self.weights[n] > 0}
        return out | self.maxima
