"""Judges the steps of responses: cuts them, asks for critiques, lets the credit method's own vote decide.

It needs the rollout's batch alone, so it works beside scoring and beside the sampling of other engines. Several workers
share a batch by rows. A response is never tokenised again: steps are found by decoding the sampled ids.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from apportion.actors.failure_kinds import MOST_KINDS, kind_of
from apportion.actors.judge_cache import CritiqueCache, critique_key
from apportion.actors.judge_client import (
    ANSWERED,
    Case,
    FunctionJudge,
    JudgeSource,
    ModelJudge,
    ModelJudgeSpec,
    ServiceJudge,
    ServiceJudgeSpec,
)
from apportion.algorithms import registry
from apportion.algorithms.interface import judged_method
from apportion.algorithms.steps import split_steps, step_of_tokens, token_starts
from apportion.batch import Batch, Critique, Marks, Prompt, Totals
from apportion.data.columns import value_at
from apportion.data.prompts import load_tokenizer
from apportion.platform import progress
from apportion.platform.device_memory import DeviceMemory
from apportion.platform.process import ActorBase

COUNTED = ("judge/critiques", "judge/failed/")  # metrics of a step that are sums; names that begin so
Vote = Callable[[Sequence[Collection[int] | None]], list[int]]


@dataclass
class JudgeSpec:
    """What a judge's worker needs to start. Exactly one of `function`, `model` and `service` is given."""

    credit: dict[str, Any]  # the method that votes
    tokenizer: str  # the policy's, which spells the sampled ids
    trust_remote_code: bool
    delimiter: str
    answer_column: str | None
    critiques: int | None  # None: as many as the credit method wants
    timeout_seconds: float  # of one critique
    batch_timeout_seconds: float  # of one call
    cache_folder: str | None
    function: str | None = None
    model: ModelJudgeSpec | None = None
    service: ServiceJudgeSpec | None = None


@dataclass
class JudgeReport:
    """What one call was. Critiques are counted once for each response that they serve.

    `critiques = k x (responses - without_steps)`; of those `cached` were known before or asked for an equal response
    of the same call, and `sum(failed.values())` have no vote.
    """

    responses: int = 0
    without_steps: int = 0  # nothing but special tokens: not asked
    steps: int = 0
    wrong_steps: int = 0  # by the vote
    critiques: int = 0
    cached: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    unjudged: int = 0  # responses with steps and no critique left: no penalty
    seconds: float = 0.0
    first_failure: str | None = None
    kinds: dict[str, str] = field(default_factory=dict)  # the first text of each kind of failure
    cache_problem: str | None = None

    def totals(self) -> Totals:
        """What a step logs under `judge/`."""
        totals = Totals()
        totals.add("judge/critiques", self.critiques, 1)
        totals.add("judge/cached_share", self.cached, self.critiques)
        totals.add("judge/failed_share", sum(self.failed.values()), self.critiques)
        for reason, count in self.failed.items():
            totals.add(f"judge/failed/{reason}", count, 1)
        totals.add("judge/unjudged_share", self.unjudged, self.responses - self.without_steps)
        totals.add("judge/wrong_step_share", self.wrong_steps, self.steps)
        totals.add("judge/steps_mean", self.steps, self.responses)
        totals.maximum("judge/seconds", self.seconds)
        return totals


class Judge:
    """The work without the actor. `decode` spells ids as the policy's tokenizer does, special tokens as nothing."""

    def __init__(
        self,
        spec: JudgeSpec,
        source: JudgeSource,
        decode: Callable[[list[int]], str],
    ) -> None:
        method = judged_method(registry.build("credit", spec.credit))
        self._vote: Vote = method.vote
        self._count = spec.critiques or method.critiques
        self._spec, self._source, self._decode = spec, source, decode
        folder = Path(spec.cache_folder) if spec.cache_folder is not None and source.durable else None
        self._cache = CritiqueCache(folder)

    def judge(self, batch: Batch, prompts: Sequence[Prompt], rows: Sequence[int]) -> tuple[JudgeReport, Marks]:
        """Marks of the trajectories at `rows`; `prompts` holds each one's prompt, found by its id."""
        start = time.monotonic()
        by_id = {prompt.prompt_id: prompt for prompt in prompts}
        marks, cases = Marks(list(rows), [], [], []), []
        for row in rows:
            span = batch.response_slice(row)
            response = batch.sequence(row)[batch.prompt_lengths[row] :]
            steps, step_ids = steps_of_response(response, batch.turn_ids[span], self._decode, self._spec.delimiter)
            marks.step_ids.append(np.asarray(step_ids, np.int32))
            cases.append(self._case(by_id[batch.prompt_ids[row]], steps))
        report = JudgeReport(responses=len(cases), steps=sum(len(case.steps) for case in cases))
        marks.critiques = self._critiques(cases, report, start + self._spec.batch_timeout_seconds)
        marks.wrong_steps = [self._vote([c.wrong_steps for c in critiques]) for critiques in marks.critiques]
        _count(report, marks, cases)
        report.cache_problem = self._cache.problem
        report.seconds = time.monotonic() - start
        return report, marks

    def _case(self, prompt: Prompt, steps: list[str]) -> Case:
        columns, answer = dict(prompt.columns), None
        column = self._spec.answer_column
        if column is not None:
            answer = value_at(columns, column)
            columns.pop(column, None)
        return Case(question_text(prompt.prompt), steps, None if answer is None else str(answer), columns)

    def _critiques(self, cases: list[Case], report: JudgeReport, deadline: float) -> list[list[Critique]]:
        """Of every case; none where it has no steps. Equal cases are asked once."""
        keys = [
            critique_key(self._source.name, self._source.content(case), self._count) if case.steps else ""
            for case in cases
        ]
        known: dict[str, list[Critique]] = {"": []}
        wanted: dict[str, Case] = {}
        for key, case in zip(keys, cases, strict=True):
            if key in known or key in wanted:
                continue
            kept = self._cache.get(key, self._count, len(case.steps))
            if kept is None:
                wanted[key] = case
            else:
                known[key] = kept
        asked = self._source.ask(list(wanted.values()), self._count, deadline)
        for key, critiques in zip(wanted, asked, strict=True):
            known[key] = critiques
            if all(critique.failure in ANSWERED for critique in critiques):
                self._cache.put(key, critiques)
        report.cached = self._count * (sum(key != "" for key in keys) - len(wanted))
        return [known[key] for key in keys]


def _count(report: JudgeReport, marks: Marks, cases: list[Case]) -> None:
    for critiques, case, wrong in zip(marks.critiques, cases, marks.wrong_steps, strict=True):
        failures = [c for c in critiques if c.wrong_steps is None]
        report.critiques += len(critiques)
        report.failed.update(c.failure for c in failures)
        report.without_steps += not case.steps
        report.unjudged += bool(case.steps) and len(failures) == len(critiques)
        report.wrong_steps += len(wrong)
        for failed in failures:
            said = failed.detail or f"the answer ends with {failed.answer[-200:]!r}"
            told = f"a critique is {failed.failure}, has no vote and is counted: {said}"
            report.first_failure = report.first_failure or told
            kind = f"{failed.failure} {kind_of(failed.detail)}"
            if len(report.kinds) < MOST_KINDS:
                report.kinds.setdefault(kind, told)


def steps_of_response(
    token_ids: Sequence[int] | np.ndarray,
    turn_ids: np.ndarray,
    decode: Callable[[list[int]], str],
    delimiter: str,
) -> tuple[list[str], list[int]]:
    """The texts of a response's steps, and the step of each token [R].

    What the policy wrote and what an environment put between are cut apart first, so that no step holds both; a turn's
    end token belongs to the turn's last step. Tokens before any text (special ones) are of the first step.

    >>> steps_of_response([0, 1, 2], np.zeros(3), lambda ids: "".join("ab c"[2 * i : 2 * i + 2] for i in ids), " ")
    (['ab ', 'c'], [0, 0, 1])
    """
    text, starts = token_starts(list(token_ids), decode)
    cuts = [0, *(np.flatnonzero(np.diff(turn_ids)) + 1).tolist(), len(starts)]
    steps: list[str] = []
    step_ids: list[int] = []
    for first, last in pairwise(cuts):
        begin = starts[first] if first < len(starts) else len(text)
        end = starts[last] if last < len(starts) else len(text)
        spans = split_steps(text[begin:end], delimiter)
        if not text[begin:end].strip():  # of the step before: nothing was said
            step_ids += [max(0, len(steps) - 1)] * (last - first)
            continue
        inside = step_of_tokens(spans, [start - begin for start in starts[first:last]])
        step_ids += [len(steps) + step for step in inside]
        steps += [text[begin + a : begin + b] for a, b in spans]
    return steps, step_ids


def question_text(prompt: Any) -> str:
    """What the user asked, as the judge reads it; of several messages each under its role.

    >>> question_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}])
    'system: Be brief.\\n\\nuser: 1+1?'
    >>> call = {"function": {"name": "add", "arguments": {"a": 1}}}
    >>> question_text([{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "1"}])
    'assistant: {"name": "add", "arguments": {"a": 1}}\\n\\ntool: 1'
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role']}: {_said(message)}" for message in prompt)


def _said(message: Mapping[str, Any]) -> str:
    """The text of a message, and its tool calls as JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join([text for text in (str(message["content"]),) if text or not calls] + calls)


def make_source(spec: JudgeSpec, count_tokens: Callable[[str], int]) -> JudgeSource:
    if spec.function is not None:
        return FunctionJudge(spec.function, spec.timeout_seconds)
    if spec.service is not None:
        return ServiceJudge(spec.service, count_tokens)
    assert spec.model is not None
    return ModelJudge(spec.model)


class JudgeWorker(ActorBase):
    """The Ray actor around `Judge`. It holds nothing that another could not take over."""

    def __init__(self, spec: JudgeSpec) -> None:
        tokenizer = load_tokenizer(spec.tokenizer, trust_remote_code=spec.trust_remote_code)

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

        self._source = make_source(spec, lambda text: len(tokenizer(text)["input_ids"]))
        self._judge = Judge(spec, self._source, decode)

    def judge(self, batch: Batch, prompts: list[Prompt], part: int, parts: int) -> tuple[JudgeReport, Marks]:
        """Every `parts`-th trajectory, from `part` on."""
        progress.begin("engine steps")
        return self._judge.judge(batch, prompts, range(part, len(batch), parts))

    def device_memory(self) -> DeviceMemory | None:
        """Of its engine, if it has one, whose workers may be processes of their own."""
        source = self._source
        return source.engine.device_memory() if isinstance(source, ModelJudge) else super().device_memory()
