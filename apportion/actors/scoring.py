"""Rewards for a batch: every component asked, its answers checked, weighed and put into the batch.

A component may say of a sample: a number; nothing (None: no opinion); a list with one number a response token, or one a
turn, or one a step (placed at its last action token). Anything else is a failed sample: its reward is NaN, it takes no
part in credit or loss, and it is counted with the first traceback. Nothing that failed ever becomes 0.
"""

from __future__ import annotations

import math
import numbers
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from apportion.actors.failure_kinds import first_of_each_kind
from apportion.actors.reward_call import Failure, RewardCall
from apportion.actors.reward_sources import (
    RESERVED,
    FunctionSource,
    RewardEntry,
    RewardSource,
    columns_problem,
    function_source,
    parse_entries,
)
from apportion.actors.reward_steps import PolicySteps
from apportion.batch import Batch, Prompt
from apportion.data.columns import nested_paths
from apportion.data.response_text import prompt_ending
from apportion.platform.errors import ConfigError, RewardError

ENVIRONMENT = "environment"  # the component of rewards that a batch already has
LARGEST_REWARD = 1e18  # of a sample, and of a token where rewards are dense


@dataclass
class ScoreReport:
    """What one scoring was. `samples = scored + sum(failed.values()) + no_opinion`."""

    samples: int = 0
    scored: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # reason -> samples, each under its first failing component
    failed_components: Counter[str] = field(default_factory=Counter)  # component -> samples
    no_opinion: int = 0  # every component said None: masked, but nothing went wrong
    first_traceback: str | None = None
    kinds: dict[str, str] = field(default_factory=dict)  # the first text of each kind of failure
    component_sums: dict[str, float] = field(default_factory=dict)  # before weights and clipping
    component_counts: dict[str, int] = field(default_factory=dict)  # samples it gave a number or a list for
    hung_threads: int = 0  # calls given up that are still busy in this process
    seconds: float = 0.0

    @property
    def failed_share(self) -> float:
        return sum(self.failed.values()) / self.samples if self.samples else 0.0

    @property
    def component_means(self) -> dict[str, float]:
        """Mean reward of each component over the samples it judged, NaN for none; a list counts as its sum."""
        counts = self.component_counts
        return {n: total / counts[n] if counts[n] else math.nan for n, total in self.component_sums.items()}

    @staticmethod
    def merge(reports: Sequence[ScoreReport]) -> ScoreReport:
        """One report of shards that were scored side by side; seconds are the slowest one's."""
        whole = ScoreReport()
        for report in reports:
            whole.samples += report.samples
            whole.scored += report.scored
            whole.failed += report.failed
            whole.failed_components += report.failed_components
            whole.no_opinion += report.no_opinion
            whole.first_traceback = whole.first_traceback or report.first_traceback
            whole.kinds = report.kinds | whole.kinds
            for name, total in report.component_sums.items():
                whole.component_sums[name] = whole.component_sums.get(name, 0.0) + total
                whole.component_counts[name] = whole.component_counts.get(name, 0) + report.component_counts[name]
            whole.hung_threads += report.hung_threads
            whole.seconds = max(whole.seconds, report.seconds)
        return whole


class Scorer:
    """The weighted sum of the components in `entries`, and of the environment's rewards where a batch brings some.

    `clip` clamps a plain reward, and each token's where rewards are dense, to [-clip, clip]. `tokenizer` (the policy's,
    or a `TokenizerPath`) lets a reward model that shares it read token ids, and finds the steps, parted by
    `step_delimiter`, of lists with one number a step; without it there are none. One `score` at a time, and a batch
    only once: rewards that a batch comes with count as the environment's.
    """

    def __init__(
        self,
        entries: Any,
        timeout_seconds: float = 60.0,
        clip: float | None = None,
        tokenizer: Any = None,
        step_delimiter: str = "\n\n",
    ) -> None:
        self._clip = clip
        self._steps = None if tokenizer is None else PolicySteps(tokenizer, step_delimiter)
        self.components: dict[str, RewardSource] = {}
        for entry in parse_entries(entries, timeout_seconds):
            source = _build(entry, tokenizer)
            count, name = 2, source.name
            while source.name in (*self.components, ENVIRONMENT):
                source.name, count = f"{name}_{count}", count + 1
            self.components[source.name] = source

    def close(self) -> None:
        for source in self.components.values():
            source.close()

    def check_columns(self, prompts: Sequence[Prompt]) -> None:
        """ConfigError if a function needs a column that none of `prompts` has, or a column has a reserved name."""
        columns = sorted({name for prompt in prompts for name in prompt.columns})
        paths = nested_paths([prompt.columns for prompt in prompts])
        if taken := sorted(set(columns) & set(RESERVED)):
            raise ConfigError(
                f"data: got a column named {taken[0]!r}, reward functions get something else of that name; rename it"
            )
        for source in self.components.values():
            if problem := columns_problem(source, columns, paths, "the data"):
                raise ConfigError(problem)

    def score(self, batch: Batch, prompts: Sequence[Prompt]) -> tuple[Batch, ScoreReport]:
        """The batch with `rewards` and `sample_mask`, and `token_rewards` if any component is dense; and what happened.

        `prompts` holds the prompt of every trajectory, found by its id. In a dense batch a plain reward stands at the
        last action token.
        """
        start = time.monotonic()
        call = replace(_call(batch, prompts), prompt_endings=self._prompt_endings(batch))
        said = self._ask(call)
        report = ScoreReport(samples=len(batch), hung_threads=sum(s.hung for s in self.components.values()))
        weights = {name: source.weight for name, source in self.components.items()}
        if batch.rewards is not None:
            weights[ENVIRONMENT] = 1.0
            said[ENVIRONMENT] = _environment_elements(batch)
        judged = {name: _judged(name, elements, batch, self._steps) for name, elements in said.items()}
        dense = any(isinstance(e, np.ndarray) for elements in judged.values() for e in elements)
        rows = [
            self._combine(batch, i, {n: e[i] for n, e in judged.items()}, weights, dense) for i in range(len(batch))
        ]
        _count(report, judged, rows)
        report.seconds = time.monotonic() - start
        return self._filled(batch, rows, dense), report

    def _prompt_endings(self, batch: Batch) -> list[str] | None:
        """The text that each rendered prompt ends with, where a verifier reads it."""
        read = any(isinstance(s, FunctionSource) and not s.is_users for s in self.components.values())
        if self._steps is None or not read:
            return None
        known: dict[str, str] = {}
        for index, prompt_id in enumerate(batch.prompt_ids):
            if prompt_id not in known:
                prompt = batch.sequence(index)[: batch.prompt_lengths[index]]
                known[prompt_id] = prompt_ending(self._steps.tokenizer, prompt.tolist())
        return [known[prompt_id] for prompt_id in batch.prompt_ids]

    def _ask(self, call: RewardCall) -> dict[str, list[Any]]:
        """What every component says, asked side by side; each keeps its own time limit."""
        if len(self.components) <= 1:
            return {name: source.score(call) for name, source in self.components.items()}
        with ThreadPoolExecutor(max_workers=len(self.components)) as pool:
            asked = {name: pool.submit(source.score, call) for name, source in self.components.items()}
            return {name: future.result() for name, future in asked.items()}

    def _combine(
        self, batch: Batch, index: int, elements: dict[str, Any], weights: dict[str, float], dense: bool
    ) -> float | np.ndarray | Failure | None:
        """The weighted sum for one sample: a number, a row [R_i] in a dense batch, a Failure, or None."""
        given: dict[str, float | np.ndarray] = {}
        for name, element in elements.items():
            if isinstance(element, Failure):
                return element
            if element is not None:
                given[name] = element
        if not given:
            return None
        if not dense:
            return _within(self._clamped(sum(weights[name] * element for name, element in given.items())))
        total = np.zeros(int(batch.response_lengths[index]), np.float64)
        for name, element in given.items():
            row = element if isinstance(element, np.ndarray) else _at_end(batch, index, float(element), name)
            if isinstance(row, Failure):
                return row
            total += weights[name] * row
        return _within(self._clamped(total))

    def _clamped(self, reward: Any) -> Any:
        if self._clip is None:
            return reward
        clamped = np.clip(reward, -self._clip, self._clip)
        return clamped if isinstance(reward, np.ndarray) else float(clamped)

    def _filled(self, batch: Batch, rows: list[Any], dense: bool) -> Batch:
        known = np.array([row is not None and not isinstance(row, Failure) for row in rows], bool)
        mask = known if batch.sample_mask is None else known & batch.sample_mask
        rewards = np.array(
            [float(np.sum(row)) if k else np.nan for row, k in zip(rows, known, strict=True)], np.float64
        )
        if not dense:
            return replace(batch, rewards=rewards, token_rewards=None, sample_mask=mask)
        lengths = batch.response_lengths
        whole = [row if k else np.full(n, np.nan) for row, k, n in zip(rows, known, lengths, strict=True)]
        return replace(batch.with_token_rewards(whole), rewards=rewards, sample_mask=mask)


def _build(entry: RewardEntry, policy_tokenizer: Any) -> RewardSource:
    spec = entry.function
    if entry.is_service:
        from apportion.actors.reward_service import ServiceSource

        return ServiceSource(entry)
    if isinstance(spec, str) and spec.startswith("model:"):
        from apportion.actors.reward_model import ModelSource

        return ModelSource(entry, policy_tokenizer)
    return function_source(entry)


def _call(batch: Batch, prompts: Sequence[Prompt]) -> RewardCall:
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    if lost := [i for i in batch.prompt_ids if i not in by_id]:
        raise RewardError(
            f"prompts: got none for {lost[0]!r} and {len(lost) - 1} more trajectories, expected every one's"
        )
    mine = [by_id[i] for i in batch.prompt_ids]
    names = sorted({name for prompt in mine for name in prompt.columns})
    lengths = batch.prompt_lengths
    ids = [batch.sequence(i).tolist() for i in range(len(batch))]
    completions = [
        text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(mine, batch.texts, strict=True)
    ]
    return RewardCall(
        prompts=[prompt.prompt for prompt in mine],
        completions=completions,
        columns={n: [p.columns.get(n) for p in mine] for n in names},
        prompt_ids=[row[:n] for row, n in zip(ids, lengths, strict=True)],
        completion_ids=[row[n:] for row, n in zip(ids, lengths, strict=True)],
    )


def _environment_elements(batch: Batch) -> list[Any]:
    assert batch.rewards is not None
    elements: list[Any] = batch.rewards.tolist()
    if batch.token_rewards is not None:
        elements = [batch.token_rewards[batch.response_slice(i)].astype(np.float64) for i in range(len(batch))]
    failure = Failure("environment", "environment: it failed, so its episode has no reward")
    return [failure if math.isnan(r) else e for r, e in zip(batch.rewards.tolist(), elements, strict=True)]


def _judged(
    name: str, elements: Sequence[Any], batch: Batch, steps: PolicySteps | None
) -> list[float | np.ndarray | Failure | None]:
    """Each element as a finite number, a row [R_i] float64, None, or the Failure that it is."""
    return [_judge(name, element, batch, index, steps) for index, element in enumerate(elements)]


def _judge(
    name: str, element: Any, batch: Batch, index: int, steps: PolicySteps | None
) -> float | np.ndarray | Failure | None:
    if element is None or isinstance(element, Failure):
        return element
    if hasattr(element, "tolist"):  # numpy and torch, numbers as well as arrays
        element = element.tolist()
    if isinstance(element, numbers.Real):
        number = _float(element)
        return (
            number
            if math.isfinite(number)
            else Failure("not_finite", f"{name}: got {number}, expected a finite number")
        )
    if not isinstance(element, list | tuple):
        kind = type(element).__name__
        text = f"{name}: got a {kind} ({str(element)[:60]!r}), expected a number, None or a list of numbers"
        return Failure("wrong_type", text)
    if not all(isinstance(value, numbers.Real) for value in element):
        return Failure("wrong_type", f"{name}: got a list with {str(element)[:60]}, expected numbers alone")
    row = np.array([_float(value) for value in element], np.float64)
    if not np.isfinite(row).all():
        return Failure("not_finite", f"{name}: got a list with NaN or infinity, expected finite numbers")
    return _on_tokens(name, row, batch, index, steps)


def _within(reward: float | np.ndarray) -> float | np.ndarray | Failure:
    """The reward of a sample; a Failure where its square would exceed what float32 holds, in which credit is computed."""
    largest = float(np.abs(reward).max(initial=0.0))
    if largest <= LARGEST_REWARD:
        return reward
    return Failure(
        "not_finite",
        f"reward: the weighted sum of its components is {largest:g} in size, expected at most {LARGEST_REWARD:g}",
    )


def _float(number: Any) -> float:
    try:
        return float(number)
    except OverflowError:  # a whole number past what a float holds
        return math.inf


def _on_tokens(name: str, row: np.ndarray, batch: Batch, index: int, steps: PolicySteps | None) -> np.ndarray | Failure:
    """A list of one number a token, a turn, or a step, whichever fits first, as one number a token [R_i]."""
    span = batch.response_slice(index)
    action_mask, turn_ids = batch.action_mask[span], batch.turn_ids[span]
    turns = int(turn_ids.max()) + 1 if len(turn_ids) else 0
    if len(row) == len(turn_ids):
        if row[~action_mask].any():
            text = f"{name}: got a reward for an environment's token, expected 0 where the policy did not choose"
            return Failure("misplaced", text)
        return row
    if len(row) == turns:
        return _at_ends(name, row, np.where(action_mask, turn_ids, -1), "turn")
    expected = f"{len(turn_ids)} (response tokens) or {turns} (turns)"
    if steps is not None:
        count, step_ids = steps.of(batch, index)
        if len(row) == count:
            return _at_ends(name, row, np.where(action_mask, step_ids, -1), "step")
        expected = f"{len(turn_ids)} (response tokens), {turns} (turns) or {count} (steps)"
    return Failure("wrong_length", f"{name}: got a list of {len(row)}, expected {expected}")


def _at_ends(name: str, row: np.ndarray, part_ids: np.ndarray, part: str) -> np.ndarray | Failure:
    """Each number of `row` at the last token whose id [R_i] is its place in `row`; -1 is no part's."""
    placed = np.zeros(len(part_ids), np.float64)
    for number, reward in enumerate(row):
        places = np.flatnonzero(part_ids == number)
        if len(places):
            placed[places[-1]] = reward
        elif reward != 0:
            return Failure("misplaced", f"{name}: got reward {reward} for {part} {number}, which has no action token")
    return placed


def _at_end(batch: Batch, index: int, reward: float, name: str) -> np.ndarray | Failure:
    """A plain reward as a row [R_i], at the last action token."""
    action_mask = batch.action_mask[batch.response_slice(index)]
    row = np.zeros(len(action_mask), np.float64)
    places = np.flatnonzero(action_mask)
    if len(places):
        row[places[-1]] = reward
    elif reward != 0:
        return Failure(
            "misplaced", f"{name}: got reward {reward} for a response without action tokens, in a dense batch"
        )
    return row


def _count(report: ScoreReport, judged: dict[str, list[Any]], rows: list[Any]) -> None:
    for name, elements in judged.items():
        with np.errstate(over="ignore"):  # of rewards that are too large, which are failures
            known = [float(np.sum(e)) for e in elements if e is not None and not isinstance(e, Failure)]
        report.component_sums[name], report.component_counts[name] = float(sum(known)), len(known)
        failed = sum(isinstance(e, Failure) for e in elements)
        if failed:
            report.failed_components[name] = failed
    failures = [row for row in rows if isinstance(row, Failure)]
    report.failed = Counter(failure.reason for failure in failures)
    report.first_traceback = failures[0].text if failures else None
    # The engine that spoke to the environment reports why it failed.
    report.kinds = first_of_each_kind(failure.text for failure in failures if failure.reason != ENVIRONMENT)
    report.no_opinion = sum(row is None for row in rows)
    report.scored = len(rows) - len(failures) - report.no_opinion
