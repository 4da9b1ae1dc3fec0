"""The loop: prompts -> rollout -> score -> cut -> signals -> credit -> update -> sync. One short method a stage.

The driver holds prompts, references and reports; batches stay in Ray's object store. Every wait has a deadline.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apportion.actors.credit import AdmitReport, CreditReport, CutReport, EvaluationReport
from apportion.actors.policy import UpdateReport
from apportion.actors.rollout import RolloutReport
from apportion.algorithms.kl import KlCoefficient
from apportion.batch import Prompt, Totals
from apportion.data.errors import DataError as SourceError
from apportion.loop.calls import deal, longest, start_judging, with_refs
from apportion.loop.device_memory import DevicePeaks
from apportion.loop.evaluation import Evaluator
from apportion.loop.failures import Failures
from apportion.loop.metrics import StepReports, data_metrics, speed_metrics, step_metrics
from apportion.loop.rescue import save_after_loss
from apportion.loop.resume import kept, progress_of
from apportion.loop.schedule import CheckpointSchedule
from apportion.loop.state import Actors, Experience, LoopSettings, Progress, PromptSource
from apportion.loop.sync_check import SyncCheck
from apportion.platform.checkpoint import CheckpointStore, RunState
from apportion.platform.cluster import Call, gather
from apportion.platform.errors import ClusterLost, DataError, RewardError
from apportion.platform.health import finishing
from apportion.platform.tracking import Tracker
from apportion.platform.weights import SyncReceipt, proof_metrics, prove

MAX_ROUNDS = 8  # of sampling for one step, when selection drops groups


class Trainer:
    """Runs steps over actors that others have started."""

    def __init__(
        self,
        actors: Actors,
        prompts: PromptSource,
        settings: LoopSettings,
        kl: KlCoefficient,
        tracker: Tracker,
        store: CheckpointStore,
    ) -> None:
        self.actors = actors
        self.prompts = prompts
        self.settings = settings
        self.kl = kl
        self.tracker = tracker
        self.store = store
        self.progress = Progress()
        self.evaluator: Evaluator | None = None
        self.sync_check = SyncCheck.off(actors)
        self.device_peaks = DevicePeaks()
        self._schedule = CheckpointSchedule(settings.checkpoint_every, settings.checkpoint_minutes)
        self._timing: dict[str, float] = {}
        self.failures = Failures(settings.max_failed_share, settings.max_failed_critiques, tracker.warn)
        self._started = self._resumed = time.perf_counter()
        self._position: dict[str, int] = {}  # of the prompts, after the last whole step

    # the run

    def run(self) -> Progress:
        """From where `progress` stands to the last step. Data that stop the run leave a checkpoint of what was trained."""
        self._resumed = time.perf_counter()
        self._schedule.restart(self._resumed)
        self._started = self._resumed - self.progress.wall_seconds
        self._position = self.prompts.state()
        last = self._finished()
        try:
            self._begin()
            while not last:
                last = self.step()
        except (SourceError, DataError, RewardError):  # found by the driver, or by an actor
            if self.progress.step:
                self._checkpoint_at_end()
            raise
        except ClusterLost as lost:
            if self.progress.step:
                save_after_loss(lost, self._checkpoint_at_end, self.tracker.warn)
            raise
        self._checkpoint_at_end()
        self.progress.wall_seconds = self._elapsed()
        return self.progress

    def _begin(self) -> None:
        self.sync_check.measure_baseline(self.progress)
        self._sync()
        if self.evaluator and self.evaluator.settings.before and self.progress.step == 0:
            report = self._evaluate(self.evaluator)
            self.progress.accuracy_before = report.metrics.get("eval/greedy_accuracy")
            self.progress.answers_before = report.answers
            timing = {"timing/evaluate": self._timing["evaluate"]}
            self.tracker.log(0, report.metrics | self.sync_check.taken() | timing)
        self._timing = {}

    def step(self) -> bool:
        """One step; its metrics are logged once, when it is whole. True if it was the run's last."""
        written, self._timing = self._timing.get("checkpoint"), {}
        self.failures.new_step()
        start = time.perf_counter()
        experience = self._collect()
        if not experience.groups:  # `check_groups` has said that the run goes on
            return self._step_without_rewards(start)
        shards, cut = self._cut(experience)
        signals = self._signals(shards)
        shards, credit = self._credit(shards, signals)
        with finishing():  # until the step counts, the ranks hold weights of no step
            updates, critic = self._update(shards, cut.minibatches)
            self.progress.policy_version += 1
            self._sync()
            self.progress.step += 1
        self._position = self.prompts.state()
        self._timing["step"] = time.perf_counter() - start
        # Asked once: time that runs out during the evaluation or the checkpoint leaves room for a whole step more.
        last = self._finished()
        metrics = self._metrics(self._reports(experience, cut, credit, updates, critic))
        metrics |= {} if written is None else {"timing/checkpoint": written}
        try:
            metrics |= self._evaluate_if_due(last)
        finally:
            self.tracker.log(self.progress.step, metrics)
            self.tracker.log_samples(self.progress.step, credit.samples)
            self.progress.metrics = metrics
        if self._schedule.due(self.progress.step, time.perf_counter()):
            self.checkpoint()
        return last

    def _step_without_rewards(self, start: float) -> bool:
        """A step whose samples have no reward trains nothing; what is known of it is logged."""
        p = self.progress
        p.step += 1
        self._position = self.prompts.state()
        self.tracker.warn(f"step {p.step}: no sample has a reward, so nothing is trained")
        known = self.failures.totals.means() | data_metrics(self.prompts)
        p.metrics = known | {"weights/version": p.policy_version, "timing/step": time.perf_counter() - start}
        self.tracker.log(p.step, p.metrics)
        if self._schedule.due(p.step, time.perf_counter()):
            self.checkpoint()
        return self._finished()

    def _elapsed(self) -> float:
        """Seconds of the whole run, those before a resume included."""
        return time.perf_counter() - self._started

    def _finished(self) -> bool:
        """All steps are done, or the minutes that this start of the run has."""
        limit, seconds = self.settings.max_minutes, time.perf_counter() - self._resumed
        return self.progress.step >= self.settings.steps or (limit is not None and seconds > 60 * limit)

    # stages

    def _collect(self) -> Experience:
        """Sample and score until there are enough groups. Produces references to admitted batches."""
        wanted, experience = self.settings.prompts_per_step, Experience([], 0, Totals(), 0.0)
        for round_ in range(MAX_ROUNDS if self.settings.selects else 1):
            prompts = self.prompts.next_batch(wanted)
            first_group = round_ * wanted
            chunks = deal(prompts, len(self.actors.rollout) * self.settings.parts)
            batches = self._rollout(chunks, first_group, experience)
            scored = self._score(batches, chunks)
            marks = self._judged(experience)
            calls = [self.actors.credit.call("admit", s, *m, returns=2) for s, m in zip(scored, marks, strict=True)]
            with self._timed("cut"):
                for report, ref in self._call_all(calls):
                    self._admit(experience, report, ref)
            if experience.groups >= wanted:
                break
        self.failures.check()
        self.failures.check_groups(experience.groups, experience.totals.weights["reward/mean"])
        return experience

    def _rollout(self, chunks: list[list[Prompt]], first_group: int, experience: Experience) -> list[Any]:
        settings, engines = self.settings, self.actors.rollout
        calls, group = [], first_group
        for place, chunk in enumerate(chunks):
            actor = engines[place * len(engines) // len(chunks)]  # an engine makes its parts one after the other
            arguments = (chunk, group, settings.responses_per_prompt, settings.sampling)
            calls.append(actor.call("generate", *arguments, returns=2))
            group += len(chunk)
        experience.judging = start_judging(self.actors.judge, calls, chunks)
        with self._timed("rollout"):
            answers = self._call_all(calls)
        reports: list[RolloutReport] = [report for report, _ in answers]
        experience.seconds_sampling += longest(calls, [r.seconds for r in reports])
        sampled = sum(r.sampled_tokens for r in reports)
        experience.sampled_tokens += sampled
        self.progress.rollout_tokens += sampled
        experience.totals.add("rollout/trajectories", sum(r.trajectories for r in reports), 1)
        experience.totals.add("rollout/prompts", sum(map(len, chunks)), 1)
        if self.actors.environment:
            self.failures.count_episodes(reports, longest(calls, [r.environment_seconds for r in reports]))
        return [ref for _, ref in answers]

    def _score(self, batches: list[Any], chunks: list[list[Prompt]]) -> list[Any]:
        workers = self.actors.reward
        calls = [
            workers[i % len(workers)].call("score", batch, chunk, returns=2)
            for i, (batch, chunk) in enumerate(zip(batches, chunks, strict=True))
        ]
        with self._timed("score"):
            answers = self._call_all(calls)
        for report, _ in answers:
            self.failures.count_rewards(report)
        return [ref for _, ref in answers]

    def _judged(self, experience: Experience) -> list[list[Any]]:
        """References to the marks of each batch of this round; none where nothing is judged."""
        if not self.actors.judge:
            return [[] for _ in experience.judging]
        with self._timed("judge"):
            answers = iter(self._call_all([call for calls in experience.judging for call in calls]))
        marks = []
        for calls in experience.judging:
            mine = [next(answers) for _ in calls]
            marks.append([ref for _, ref in mine])
            for report, _ in mine:
                self.failures.count_critiques(report)
        return marks

    def _admit(self, experience: Experience, report: AdmitReport, ref: Any) -> None:
        experience.totals.merge(report.totals)
        experience.totals.add("rollout/groups_dropped", report.groups_dropped, 1)
        experience.groups += report.groups_kept
        if report.groups_kept:
            experience.admitted.append(ref)

    def _cut(self, experience: Experience) -> tuple[list[Any], CutReport]:
        shards, wanted = len(self.actors.policy), self.settings.prompts_per_step
        arguments = (wanted, shards, self.settings.minibatches, *experience.admitted)
        with self._timed("cut"):
            [(report, *refs)] = self._call_all([self.actors.credit.call("cut", *arguments, returns=shards + 1)])
        if self.settings.selects:
            experience.totals.add("rollout/groups_surplus", report.groups_surplus, 1)
        return refs, report

    def _signals(self, shards: list[Any]) -> list[Any]:
        """References to Signals, pass by pass, shard by shard; only the passes that are needed."""
        actors, calls = self.actors, []
        if self.settings.policy_signals:
            calls += [a.call("signals", s, returns=2) for a, s in zip(actors.policy, shards, strict=True)]
        if actors.reference:
            ranks = len(actors.reference)
            calls += [actors.reference[i % ranks].call("signals", s, returns=2) for i, s in enumerate(shards)]
        calls += [a.call("signals", s, returns=2) for a, s in zip(actors.critic, shards, strict=False)]
        with self._timed("signals"):
            return [ref for _, ref in self._call_all(calls)]

    def _credit(self, shards: list[Any], signals: list[Any]) -> tuple[list[Any], CreditReport]:
        arguments = (len(shards), self.kl.coefficient, self.settings.samples_shown, *shards, *signals)
        with self._timed("credit"):
            [(report, *refs)] = self._call_all([self.actors.credit.call("credit", *arguments, returns=len(shards) + 1)])
        return refs, report

    def _update(self, shards: list[Any], minibatches: int) -> tuple[list[UpdateReport], list[UpdateReport]]:
        """Policy and critic ranks; an update that fails on one rank stops the run."""
        policy = self.actors.policy if self.progress.step >= self.settings.critic_only_steps else []
        calls = [a.call("update", s, minibatches) for a, s in zip(self.actors.critic, shards, strict=False)]
        calls += [a.call("update", s, minibatches, self.kl.coefficient) for a, s in zip(policy, shards, strict=False)]
        with self._timed("update"):
            reports = self._gather(calls, "update")
        split = len(self.actors.critic)
        return reports[split:], reports[:split]

    def _sync(self) -> None:
        """Every engine gets the trainer's weights and proves it; only then does the version count."""
        version, check = self.progress.policy_version, self.settings.sync_check
        with self._timed("sync"):
            sent = self._gather([a.call("weights", version) for a in self.actors.policy], "sync")[0]
            entries, bundle = sent
            if bundle is None:  # over the channel, from rank 0 to all at once
                send = [self.actors.policy[0].call("send_weights")]
                calls = [a.call("receive_weights", entries, version, check) for a in self.actors.rollout]
            else:
                send, calls = [], [a.call("load_weights", bundle, check) for a in self.actors.rollout]
            receipts: list[SyncReceipt] = self._gather(send + calls, "sync")[len(send) :]
            prove(receipts, entries, version, self.settings.sync_unproved)
            self.sync_check.after_sync(self.progress)
        self._sent = {"weights/bytes": sum(e.size for e in entries), **proof_metrics(receipts, entries)}

    # evaluation

    def _evaluate_if_due(self, last: bool) -> dict[str, float]:
        """Every so many steps, and after the last: then the answers are kept for the summary."""
        self.progress.accuracy_after, self.progress.answers_after = None, []  # of an earlier end are no longer true
        if self.evaluator is None:
            return {}
        settings, last = self.evaluator.settings, last and self.evaluator.settings.after
        if not last and not (settings.every_steps and self.progress.step % settings.every_steps == 0):
            return {}
        try:
            report = self._evaluate(self.evaluator)
        except RewardError as error:
            # Of held-out answers alone: what is trained goes on; the rewards that it learns from are judged apart.
            self.tracker.warn(str(error))
            return {"timing/evaluate": self._timing["evaluate"]}
        if last:
            self.progress.accuracy_after = report.metrics.get("eval/greedy_accuracy")
            self.progress.answers_after = report.answers
        return report.metrics | {"timing/evaluate": self._timing["evaluate"]}

    def _evaluate(self, evaluator: Evaluator) -> EvaluationReport:
        with self._timed("evaluate"):
            return evaluator.evaluate(f"evaluation after step {self.progress.step}")

    # checkpoints

    def _checkpoint_at_end(self) -> None:
        if self.settings.checkpoint_final and self.progress.step != self.store.current:
            self.checkpoint()

    def checkpoint(self) -> Path:
        """Everything a resumed run needs, under a name only once it is whole."""
        with self._timed("checkpoint"), self.store.writing(self.progress.step) as folder:
            calls = [a.call("save", str(folder.resolve())) for a in [*self.actors.policy, *self.actors.critic]]
            self._wait(calls, f"checkpoint of step {self.progress.step}")
            self._state().save(folder)
        self._schedule.restart(time.perf_counter())
        return self.store.root / f"step-{self.progress.step:06d}"

    def _state(self) -> RunState:
        p = self.progress
        p.wall_seconds = self._elapsed()
        return RunState(
            step=p.step,
            policy_version=p.policy_version,
            data=self._position,
            seeds=self.settings.seeds,
            trackers=self.tracker.state(),
            kl=self.kl.state_dict(),
            extra=kept(p),
            ranks=self.settings.ranks,
        )

    def restore(self, folder: Path, state: RunState) -> None:
        """Take up where the checkpoint in `folder` was written."""
        progress = progress_of(state)
        # An earlier version's checkpoint has no baseline. Until the ranks load it, both sides hold the original files.
        self.sync_check.measure_baseline(progress)
        calls = [a.call("load", str(folder.resolve())) for a in [*self.actors.policy, *self.actors.critic]]
        self._wait(calls, f"resume from step {state.step}")
        self.prompts.load_state(state.data)
        if state.kl is not None:
            self.kl.load_state_dict(state.kl)
        self.progress, self.store.current = progress, state.step

    # waiting and counting

    def _gather(self, calls: list[Call], what: str) -> list[Any]:
        return self._wait(calls, f"{what} of step {self.progress.step + 1}")

    def _wait(self, calls: list[Call], what: str) -> list[Any]:
        return gather(calls, self.settings.call_timeout_seconds, what)

    def _call_all(self, calls: list[Call]) -> list[tuple]:
        """For calls with several results: the first of each fetched, the others left in the store."""
        return with_refs(self._gather(calls, calls[0].method if calls else "nothing"), calls)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._timing[stage] = self._timing.get(stage, 0.0) + seconds
            self.progress.stage_seconds[stage] = self.progress.stage_seconds.get(stage, 0.0) + seconds

    def _reports(
        self,
        experience: Experience,
        cut: CutReport,
        credit: CreditReport,
        policy: list[UpdateReport],
        critic: list[UpdateReport],
    ) -> StepReports:
        e = experience
        e.totals.merge(self.failures.totals)
        return StepReports(
            e.totals, credit.metrics, cut.trajectories, e.seconds_sampling, e.sampled_tokens, policy, critic
        )

    def _metrics(self, reports: StepReports) -> dict[str, float]:
        """The step's row; what is counted over the whole run and the KL's coefficient move on."""
        metrics, p = step_metrics(reports) | data_metrics(self.prompts) | self.sync_check.taken(), self.progress
        metrics |= {"policy/kl_coefficient": self.kl.coefficient, "weights/version": p.policy_version, **self._sent}
        # While the critic learns alone the policy is its reference, which says nothing about the coefficient.
        if "policy/kl_reference" in metrics and p.step > self.settings.critic_only_steps:
            self.kl.update(metrics["policy/kl_reference"], reports.trajectories)
        p.samples += reports.trajectories
        p.update_tokens += reports.update_tokens
        p.step_seconds += self._timing["step"]
        return metrics | speed_metrics(reports, self._timing) | self.device_peaks.measure()
