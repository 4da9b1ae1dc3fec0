"""Answers to all held-out prompts, scored: during training, after it, and of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apportion.actors.credit import EvaluationReport
from apportion.actors.engines import Sampling
from apportion.batch import Prompt
from apportion.loop.calls import deal, with_refs
from apportion.loop.state import Actors
from apportion.platform.cluster import Call, gather


@dataclass
class EvaluationSettings:
    every_steps: int
    before: bool
    after: bool
    greedy: bool
    samples: int
    ks: list[int]
    temperature: float
    max_tokens: int
    correct_at: float
    show: int


@dataclass
class Evaluator:
    """Greedy answers, and sampled ones for avg@k and pass@k, by the weights that the engines hold."""

    actors: Actors
    settings: EvaluationSettings
    prompts: list[Prompt]
    stop: list[str]
    call_timeout_seconds: float

    def evaluate(self, when: str) -> EvaluationReport:
        """`when` is for the error of a call that is late: "evaluation of step 3"."""
        settings = self.settings
        greedy, sampled = [], []
        if settings.greedy:
            greedy = self._scored(Sampling(0.0, max_tokens=settings.max_tokens, stop=self.stop), 1, when)
        if settings.samples:
            sampling = Sampling(settings.temperature, max_tokens=settings.max_tokens, stop=self.stop)
            sampled = self._scored(sampling, settings.samples, when)
        arguments = (settings.correct_at, settings.ks, settings.show, len(greedy), *greedy, *sampled)
        [report] = self._gather([self.actors.credit.call("evaluate_refs", *arguments)], when)
        return report

    def _scored(self, sampling: Sampling, responses: int, when: str) -> list[Any]:
        """References to scored batches, one an engine."""
        chunks = deal(self.prompts, len(self.actors.rollout))
        calls, group = [], 0
        for actor, chunk in zip(self.actors.rollout, chunks, strict=False):
            calls.append(actor.call("generate", chunk, group, responses, Sampling(**vars(sampling)), returns=2))
            group += len(chunk)
        batches = [ref for _, ref in with_refs(self._gather(calls, when), calls)]
        workers = self.actors.reward
        scoring = [
            workers[i % len(workers)].call("score", batch, chunk, returns=2)
            for i, (batch, chunk) in enumerate(zip(batches, chunks, strict=True))
        ]
        return [ref for _, ref in with_refs(self._gather(scoring, when), scoring)]

    def _gather(self, calls: list[Call], when: str) -> list[Any]:
        return gather(calls, self.call_timeout_seconds, when)
