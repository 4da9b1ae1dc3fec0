"""The composition root: from a configuration to running actors and back to nothing running."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from apportion.algorithms.kl import KlCoefficient
from apportion.assembly.downloads import fetch_here, fetch_on_nodes, from_cache, hub_models, reward_models
from apportion.assembly.hosts import joins
from apportion.assembly.inputs import load_held_out, load_prompts
from apportion.assembly.loop_settings import evaluation_settings, loop_settings, sync_check
from apportion.assembly.needs import Needs, needs_of
from apportion.assembly.report import device_summary, examples, print_report, rewarded, summary_of
from apportion.assembly.serving import judge_requests, serving_requests
from apportion.assembly.starting import start
from apportion.assembly.training import critic_requests, policy_requests, reference_requests
from apportion.batch import Prompt
from apportion.conf.combinations import check_evaluation
from apportion.conf.devices import check_evaluation_devices
from apportion.conf.environment import check_environment
from apportion.conf.judges import check_judge, own_model
from apportion.conf.layout import check_layout, layout_of
from apportion.conf.schema import Config
from apportion.conf.teachers import check_same_tokenizer, check_teachers, teacher_paths
from apportion.data.builtin import resolve_model
from apportion.data.prompts import PromptStream, load_tokenizer
from apportion.edges import closing, refusals, row_errors, terminated_as_interrupt, told_first
from apportion.loop.device_memory import DevicePeaks
from apportion.loop.evaluation import Evaluator
from apportion.loop.resume import check_steps_left, progress_of
from apportion.loop.state import Actors
from apportion.plan import make_plan
from apportion.platform.checkpoint import Checkpoint, CheckpointStore
from apportion.platform.cluster import Cluster
from apportion.platform.console import plain_text
from apportion.platform.errors import ConfigError
from apportion.platform.known_secrets import redacted
from apportion.platform.messages import say
from apportion.platform.plots import plot_run
from apportion.platform.run_lock import held
from apportion.platform.runs import RunFolder, find_checkpoint, make_run_folder, run_of
from apportion.platform.token_page import has_samples, write_token_page
from apportion.platform.tracking import MultiTracker, TrackedRun, open_trackers
from apportion.saved import refuse_foreign_folder, taken_up
from apportion.trainer import Trainer


def train(config: Config, resolved: dict[str, Any]) -> int:
    """Run a whole training job; whatever happens, nothing is left running."""
    with ExitStack() as locks:
        return _train(config, resolved, locks)


def _train(config: Config, resolved: dict[str, Any], locks: ExitStack) -> int:
    with refusals():
        checkpoint = taken_up(config, locks)
        needs = needs_of(config)
        if checkpoint:
            check_layout(checkpoint.path, layout_of(config, needs.critic))
        if needs.judge:
            check_judge(config, joined=joins(config))
        fetch_here(config, hub_models(config))
        # Once more: sizes of what has come, or of what a stage of `before` has made, are known now.
        notes = make_plan(config).notes
        model = resolve_model(config.model.path)
        tokenizer = _tokenizer(config, model)
        prompts, held_out = load_prompts(config, tokenizer)
        if checkpoint:
            check_steps_left(checkpoint.state, config.train.steps, run_of(checkpoint).path)
            progress_of(checkpoint.state)
            prompts.load_state(checkpoint.state.data)  # refused now rather than when actors have started
        folder = run_of(checkpoint) if checkpoint else _new_folder(config, resolved)
        if not checkpoint:
            locks.enter_context(held(folder.path))
            folder.save_config(resolved)
        tracker = _tracker(config, resolved, folder, checkpoint)
        for line in prompts.cautions(checkpoint.state.data) if checkpoint else []:
            tracker.warn(line)
    say(f"run folder: {folder.path}")
    for note in notes:
        say(f"note: {note}")
    with (
        terminated_as_interrupt(),
        closing(tracker),  # of a start that fails; otherwise they are closed before the cluster is torn down
        _cluster(config, needs, folder) as cluster,
        closing(tracker),
        told_first(tracker),
    ):
        say("starting actors (vLLM and DeepSpeed take some tens of seconds)")
        actors = _actors(config, needs, model, cluster, folder, checkpoint.step if checkpoint else 0)
        writers = [*actors.policy, *actors.critic]
        cluster.check_shared(writers, folder.path, config.cluster.start_timeout_seconds)
        trainer = _trainer(config, needs, actors, prompts, tracker, folder)
        trainer.sync_check = sync_check(config, actors, tokenizer, model, tracker.warn)
        trainer.device_peaks = DevicePeaks(cluster.on_gpus(), config.cluster.call_timeout_seconds)
        trainer.evaluator = _evaluator(config, actors, held_out, tracker.warn) if held_out else None
        if checkpoint:
            with refusals():
                trainer.restore(checkpoint.path, checkpoint.state)
            folder.save_config(resolved)  # not before: a resume that is refused leaves the run as it was
            say(f"resumed from {checkpoint.path} at step {checkpoint.step}")
        started = time.perf_counter()
        with row_errors():
            progress = trainer.run()
        seconds = time.perf_counter() - started
        summary = summary_of(config, progress, cluster.peak_memory_mib(), seconds, held_out)
        summary |= device_summary(trainer.device_peaks)
        folder.write_summary(summary)
        tracker.log_summary(summary)
    print_report(summary, folder)
    if config.tracking.plots and config.tracking.jsonl:
        _draw(folder)
    return 0


def _tokenizer(config: Config, model: str) -> Any:
    """The policy's, which that of every teacher has to equal."""
    tokenizer = load_tokenizer(model, config.model.chat_template, config.model.trust_remote_code)
    teachers = teacher_paths(config)
    check_teachers(config, teachers)  # again: stages of `before` have made theirs by now
    for key, path in teachers.items():
        check_same_tokenizer(tokenizer, load_tokenizer(path, None, config.model.trust_remote_code), key)
    return tokenizer


def _draw(folder: RunFolder) -> None:
    plot_run(folder.path)
    if has_samples(folder.path):
        write_token_page(folder.path)


def evaluate(config: Config, checkpoint: str) -> int:
    """Score a checkpoint's model on the held-out prompts."""
    with refusals():
        check_evaluation_devices(config)
        found = _evaluated(checkpoint, config.runs_folder)
        refuse_foreign_folder(run_of(found).path, config.trust_run, "logs", config.model.trust_remote_code)
        model = str(found.path / "model")
        if config.data.eval is None:
            raise ConfigError("data.eval: got none, expected a source to evaluate on")
        check_evaluation(config, model)
        check_environment(config, joins(config))
        fetch_here(config, reward_models(config))
        held_out = load_held_out(
            config, load_tokenizer(model, config.model.chat_template, config.model.trust_remote_code)
        )
    serving = Needs(policy_signals=False, reference=False, critic=False, groups_together=False)
    with terminated_as_interrupt(), _cluster(config, serving, run_of(found)) as cluster, told_first():
        actors = start(config, cluster, serving_requests(config, model))
        report = _evaluator(config, actors, held_out, say).evaluate("evaluation")
    for name, value in sorted(report.metrics.items()):
        say(f"{name:32s} {value:.4f}")
    for row in examples(report.answers, held_out):
        say(f"\n{plain_text(row['prompt'])}\n  -> {plain_text(row['answer'])!r} ({rewarded(row['reward'])})")
    return 0


def _evaluated(argument: str, runs_folder: str) -> Checkpoint:
    """What the command's argument names, which is called as the command calls it."""
    try:
        return find_checkpoint(argument, runs_folder)
    except ConfigError as error:
        raise ConfigError(f"checkpoint: {str(error).removeprefix('resume: ').removeprefix('checkpoint: ')}") from error


def _actors(config: Config, needs: Needs, model: str, cluster: Cluster, folder: RunFolder, step: int) -> Actors:
    """Every actor that the run needs, started; `step` is the one after which it goes on."""
    requests = serving_requests(config, model, needs, step)
    requests["policy"] = policy_requests(config, model)
    if needs.reference:
        requests["reference"] = reference_requests(config, model)
    if needs.critic:
        requests["critic"] = critic_requests(config, model)
    if needs.judge:
        requests["judge"] = judge_requests(config, model, folder)
    models = hub_models(config)
    fetch_on_nodes(cluster, models, requests, config.cluster.download_timeout_seconds)
    own_judge = own_model(config.judge) is not None
    return start(config, cluster, from_cache(requests, models, cluster.joined, own_judge))


def _trainer(
    config: Config, needs: Needs, actors: Actors, prompts: PromptStream, tracker: MultiTracker, folder: RunFolder
) -> Trainer:
    kl = config.algorithm.kl
    coefficient = KlCoefficient(kl.coefficient, kl.target, kl.horizon)
    store = CheckpointStore(folder.checkpoints, config.checkpoint.keep)
    return Trainer(actors, prompts, loop_settings(config, needs), coefficient, tracker, store)


def _evaluator(config: Config, actors: Actors, held_out: list[Prompt], warn: Callable[[str], None]) -> Evaluator:
    seconds = config.cluster.call_timeout_seconds
    return Evaluator(actors, evaluation_settings(config), held_out, list(config.rollout.stop), seconds, warn)


def _new_folder(config: Config, resolved: dict[str, Any]) -> RunFolder:
    recipe = resolved.get("recipe") or config.algorithm.name
    return make_run_folder(config.runs_folder, config.run_name, str(recipe))


def _tracker(
    config: Config, resolved: dict[str, Any], folder: RunFolder, checkpoint: Checkpoint | None
) -> MultiTracker:
    state = checkpoint.state.trackers if checkpoint else {}
    step = checkpoint.step if checkpoint else None
    run = TrackedRun(folder.path, folder.name, config.train.steps, redacted(resolved), step, state)
    return open_trackers(config.tracking, run)


@contextmanager
def _cluster(config: Config, needs: Needs, folder: RunFolder) -> Iterator[Cluster]:
    c = config.cluster
    ranks = c.policy_ranks * (2 if needs.critic else 1) + c.rollout_engines
    ranks += c.reference_ranks if needs.reference else 0
    ranks += config.judge.workers if needs.judge else 0
    cluster = Cluster(c.address, folder.name, ranks, folder.path / "logs", c.object_store_gib)
    try:
        yield cluster
    finally:
        cluster.shutdown()
