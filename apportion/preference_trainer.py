"""The loop of the preference stages: order -> shares -> update -> (evaluate, checkpoint).

The driver knows each example's length and place, never its tokens' tensors: it says which examples a step has, which
rank takes which, and what each weighs, so that the loss of a step does not depend on the number of ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from apportion.actors.preference import StepReport, StepShare
from apportion.batch import Totals, pad_rows
from apportion.data.pair_tokens import PreferenceData
from apportion.loop.device_memory import DevicePeaks
from apportion.loop.rescue import save_after_loss
from apportion.loop.schedule import CheckpointSchedule
from apportion.platform.checkpoint import CheckpointStore, RunState
from apportion.platform.cluster import Actor, Call, gather, put
from apportion.platform.errors import CheckpointError, ClusterLost
from apportion.platform.health import finishing
from apportion.platform.run_state import check_values
from apportion.platform.tracking import Tracker

Reduction = Callable[[Any], Any]  # mask [B, T] of a step to weights [B, T], as algorithms.interface.Reduction


@dataclass
class StageSettings:
    name: str  # prefix of its metrics
    epochs: float
    steps: int | None  # instead of epochs
    batch_size: int
    seed: int
    shuffle: bool
    needs_reference: bool
    reduction: Reduction | None  # of demonstrations' tokens; pairs weigh the same each
    evaluate_every: int
    evaluate_before: bool
    evaluate_after: bool
    call_timeout_seconds: float
    max_minutes: float | None
    checkpoint_every: int
    checkpoint_minutes: float | None
    checkpoint_final: bool
    ranks: dict[str, dict[str, Any]]  # how the model is spread over ranks


@dataclass
class StageProgress:
    """Where the run stands; what a checkpoint carries beside the tensors."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    step_seconds: float = 0.0
    wall_seconds: float = 0.0
    before: dict[str, float] = field(default_factory=dict)  # held-out metrics
    after: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class BatchOrder:
    """Which examples each step has: epochs in an order that follows from (seed, epoch) alone, one after the other
    without a gap.

    >>> order = BatchOrder(examples=3, batch_size=2, total=6, seed=0, shuffle=False)
    >>> [order.step(i).tolist() for i in range(order.steps)]
    [[0, 1], [2, 0], [1, 2]]
    """

    examples: int
    batch_size: int
    total: int  # examples of the whole run, with repetitions
    seed: int
    shuffle: bool

    @property
    def steps(self) -> int:
        return math.ceil(self.total / self.batch_size)

    def step(self, index: int) -> np.ndarray:
        """[batch_size] int64, fewer in the last step where the epochs end within it."""
        places = np.arange(index * self.batch_size, min((index + 1) * self.batch_size, self.total))
        epochs = {int(e): self._epoch(int(e)) for e in np.unique(places // self.examples)}
        return np.array([epochs[int(p) // self.examples][int(p) % self.examples] for p in places], np.int64)

    def _epoch(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.examples)
        return np.random.default_rng([self.seed, epoch]).permutation(self.examples)


def total_steps(settings: StageSettings, examples: int) -> int:
    return make_order(settings, examples).steps


def make_order(settings: StageSettings, examples: int) -> BatchOrder:
    if settings.steps is not None:
        total = settings.steps * settings.batch_size
    else:
        total = max(1, round(settings.epochs * examples))
    return BatchOrder(examples, settings.batch_size, total, settings.seed, settings.shuffle)


def _position(settings: StageSettings, data: PreferenceData) -> dict[str, Any]:
    """What must be the same for the order of examples to go on where it stood."""
    s = settings
    return {"examples": len(data), "batch_size": s.batch_size, "seed": s.seed, "shuffle": s.shuffle}


def check_position(settings: StageSettings, data: PreferenceData, state: RunState) -> None:
    """ValueError where a checkpoint was written over other data, or another order of them; CheckpointError for progress
    that this version does not know."""
    _check_stage(state)
    for name, value in _position(settings, data).items():
        if state.data.get(name) != value:
            raise ValueError(
                f"resume: {name} is {value} here and {state.data.get(name)} in the checkpoint, expected the same data, "
                "train.batch_size and seed"
            )
    if state.data.get("digest", data.digest) != data.digest:
        raise ValueError(
            f"resume: the {len(data)} training examples are not those that the checkpoint was written with: as many, but "
            "other tokens or another order, expected the same rows of data.train, tokenizer, chat template and lengths; "
            "or start a new run"
        )


def _check_stage(state: RunState) -> None:
    check_values(state.extra, StageProgress, "state.json: extra")
    odd = sorted(set(state.extra) - ({f.name for f in fields(StageProgress)} - {"step"}))
    if odd:
        raise CheckpointError(
            f"state.json: got extra values {', '.join(odd)}, which a stage does not know: resume with the version that wrote it"
        )


def cautions(state: RunState) -> list[str]:
    """What a resumed stage should say of the checkpoint's `state`, a line each."""
    if "digest" in state.data:
        return []
    return [
        "the checkpoint is of an earlier version and has no digest of the training examples: only their number is "
        "compared; make sure that they are the same"
    ]


def deal_by_tokens(tokens: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Places [k] of each rank's examples: the longest first, each to whom has the fewest tokens so far.

    >>> [places.tolist() for places in deal_by_tokens(np.array([5, 9, 4]), 2)]
    [[1], [0, 2]]
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    held = np.zeros(ranks, np.int64)
    for place in np.argsort(-tokens, kind="stable"):
        rank = int(np.argmin(held))
        hands[rank].append(int(place))
        held[rank] += tokens[place]
    return [np.array(sorted(hand), np.int64) for hand in hands]


class PreferenceTrainer:
    """Runs the steps of one stage over ranks that others have started."""

    def __init__(
        self,
        ranks: list[Actor],
        train: PreferenceData,
        held_out: PreferenceData | None,
        settings: StageSettings,
        tracker: Tracker,
        store: CheckpointStore,
    ) -> None:
        self.ranks, self.train, self.held_out = ranks, train, held_out
        self.settings, self.tracker, self.store = settings, tracker, store
        self.order = make_order(settings, len(train))
        self.progress = StageProgress()
        self.device_peaks = DevicePeaks()
        self._schedule = CheckpointSchedule(settings.checkpoint_every, settings.checkpoint_minutes)
        self._started = self._resumed = time.perf_counter()

    # the run

    def prepare(self) -> None:
        """Hand out the data and have the reference's log-probs made; the ranks still hold the starting weights."""
        train, held_out = put(self.train), put(self.held_out)
        self._gather([rank.call("load_data", train, held_out) for rank in self.ranks], "loading of data")
        if self.settings.needs_reference:
            used = np.unique(
                np.concatenate([self.order.step(i) for i in range(self.order.steps)] or [np.zeros(0, int)])
            )
            shares = zip(self.ranks, self._deal(self.train, used), self._all_held_out(), strict=True)
            calls = [rank.call("reference_logprobs", own, other, returns=2) for rank, own, other in shares]
            self._gather(calls, "reference log-probs")
            refs = [call.refs[1] for call in calls]
            self._gather([rank.call("set_reference", *refs) for rank in self.ranks], "reference log-probs")

    def run(self) -> StageProgress:
        """From where `progress` stands to the last step."""
        self._resumed = time.perf_counter()
        self._schedule.restart(self._resumed)
        self._started = self._resumed - self.progress.wall_seconds
        if self.settings.evaluate_before and self.progress.step == 0 and self.held_out is not None:
            self.progress.before = self._evaluate()
            self.tracker.log(0, self.progress.before)
        last = self._finished()
        try:
            while not last:
                last = self.step()
        except ClusterLost as lost:
            if self.progress.step:
                save_after_loss(lost, self._checkpoint_at_end, self.tracker.warn)
            raise
        self._checkpoint_at_end()
        self.progress.wall_seconds = self._elapsed()
        return self.progress

    def _checkpoint_at_end(self) -> None:
        if self.settings.checkpoint_final and self.progress.step != self.store.current:
            self.checkpoint()

    def step(self) -> bool:
        """One optimiser step; its metrics are logged once, when it is whole. True if it was the stage's last."""
        start = time.perf_counter()
        examples = self.order.step(self.progress.step)
        shares = self._shares(examples)
        calls = [rank.call("update", share) for rank, share in zip(self.ranks, shares, strict=True)]
        with finishing():
            reports: list[StepReport] = self._gather(calls, f"update of step {self.progress.step + 1}")
        update = time.perf_counter() - start
        p = self.progress
        p.step, p.examples = p.step + 1, p.examples + len(examples)
        p.tokens += sum(report.tokens for report in reports)
        metrics = self._metrics(reports) | {"timing/update": update}
        metrics |= {"perf/update_tokens_per_second": sum(report.tokens for report in reports) / update}
        metrics["timing/step"] = time.perf_counter() - start
        p.step_seconds += metrics["timing/step"]
        # Asked once: time that runs out during the evaluation or the checkpoint leaves room for a whole step more.
        last = self._finished()
        p.metrics = metrics | self.device_peaks.measure() | self._evaluate_if_due(last)
        self.tracker.log(p.step, p.metrics)
        if self._schedule.due(p.step, time.perf_counter()):
            self.checkpoint()
        return last

    def _elapsed(self) -> float:
        return time.perf_counter() - self._started

    def _finished(self) -> bool:
        limit, seconds = self.settings.max_minutes, time.perf_counter() - self._resumed
        return self.progress.step >= self.order.steps or (limit is not None and seconds > 60 * limit)

    # stages

    def _shares(self, examples: np.ndarray) -> list[StepShare]:
        """Each rank's examples of a step, weighed by totals of the whole step."""
        places = deal_by_tokens(self.train.example_tokens()[examples], len(self.ranks))
        if self.settings.reduction is None:
            weight = 1.0 / len(examples)
            return [StepShare(examples[own], np.full(len(own), weight, np.float32)) for own in places]
        rows = self._token_weights(examples)
        empty = np.zeros(0, np.float32)
        return [StepShare(examples[own], np.concatenate([empty, *(rows[i] for i in own)])) for own in places]

    def _token_weights(self, examples: np.ndarray) -> list[np.ndarray]:
        """For each demonstration the weights of its tokens that carry a loss."""
        assert self.settings.reduction is not None
        batch = self.train.batch
        masks = [batch.action_mask[batch.response_slice(int(row))] for row in self.train.rows(examples)]
        lengths = np.array([len(mask) for mask in masks], np.int64)
        mask_BT = pad_rows(np.concatenate(masks), lengths, False)
        weights_BT = self.settings.reduction(mask_BT).numpy().astype(np.float32)
        return [weights_BT[i, : len(mask)][mask] for i, mask in enumerate(masks)]

    def _evaluate_if_due(self, last: bool) -> dict[str, float]:
        self.progress.after = {}  # of an earlier end it is no longer true
        s = self.settings
        last = s.evaluate_after and last
        due = last or (s.evaluate_every and self.progress.step % s.evaluate_every == 0)
        if self.held_out is None or not due:
            return {}
        metrics = self._evaluate()
        if last:
            self.progress.after = metrics
        return metrics

    def _evaluate(self) -> dict[str, float]:
        start, totals = time.perf_counter(), Totals()
        calls = [rank.call("evaluate", own) for rank, own in zip(self.ranks, self._all_held_out(), strict=True)]
        for report in self._gather(calls, f"evaluation after step {self.progress.step}"):
            totals.merge(report.totals)
        return totals.means() | {"timing/evaluate": time.perf_counter() - start}

    def _all_held_out(self) -> list[np.ndarray]:
        if self.held_out is None:
            return [np.zeros(0, np.int64) for _ in self.ranks]
        return self._deal(self.held_out, np.arange(len(self.held_out)))

    def _deal(self, data: PreferenceData, examples: np.ndarray) -> list[np.ndarray]:
        places = deal_by_tokens(data.example_tokens()[examples], len(self.ranks))
        return [examples[own].astype(np.int64) for own in places]

    def _metrics(self, reports: list[StepReport]) -> dict[str, float]:
        totals, name = Totals(), self.settings.name
        for report in reports:
            totals.merge(report.totals)
        step = reports[0].step
        assert step is not None
        norm = {} if step.grad_norm is None else {f"{name}/grad_norm": step.grad_norm}
        return (
            totals.means()
            | {f"{name}/loss": totals.sums[f"{name}/loss"]}
            | norm
            | {f"{name}/learning_rate": step.learning_rate}
        )

    # checkpoints

    def checkpoint(self) -> Path:
        """Everything a resumed run needs, and the model, under a name only once it is whole."""
        with self.store.writing(self.progress.step) as folder:
            p = self.progress
            calls = [rank.call("save", str(folder.resolve())) for rank in self.ranks]
            self._gather(calls, f"checkpoint of step {p.step}")
            extra = {
                "examples": p.examples,
                "tokens": p.tokens,
                "step_seconds": p.step_seconds,
                "wall_seconds": self._elapsed(),
                "before": p.before,
                "after": p.after,
                "metrics": p.metrics,
            }
            RunState(
                p.step,
                p.step,
                _position(self.settings, self.train) | {"digest": self.train.digest},
                {"run": self.settings.seed},
                self.tracker.state(),
                None,
                extra,
                self.settings.ranks,
            ).save(folder)
        self._schedule.restart(time.perf_counter())
        return self.store.root / f"step-{self.progress.step:06d}"

    def restore(self, folder: Path, state: RunState) -> None:
        """Take up where the checkpoint in `folder` was written; ValueError where the data are not the same."""
        check_position(self.settings, self.train, state)
        calls = [rank.call("load", str(folder.resolve())) for rank in self.ranks]
        self._gather(calls, f"resume from step {state.step}")
        self.progress = StageProgress(step=state.step, **state.extra)
        self.store.current = state.step

    def _gather(self, calls: list[Call], what: str) -> list[Any]:
        return gather(calls, self.settings.call_timeout_seconds, what)
