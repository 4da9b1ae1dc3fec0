"""The composition root of the preference stages: from a configuration to running ranks and back to nothing running."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from apportion.actors.preference import PreferenceSpec, PreferenceWorker
from apportion.algorithms import registry
from apportion.algorithms.preference import Dpo, Objective, RewardModel, Sft
from apportion.assembly.downloads import fetch_here, fetch_on_nodes, from_cache, stage_models
from apportion.assembly.hosts import cores_environment, device_environment, thread_count, training_environment
from apportion.assembly.report import device_summary, print_device_memory
from apportion.assembly.starting import join
from apportion.conf.checks import check_warmup
from apportion.conf.defaults import engine_settings
from apportion.conf.layout import check_layout, layout_of
from apportion.conf.models import read_limits, read_model
from apportion.conf.preference_schema import (
    DpoRunConfig,
    PreferenceConfig,
    RewardModelRunConfig,
    SftRunConfig,
    check_reference,
)
from apportion.conf.teachers import check_same_tokenizer
from apportion.conf.unwanted import unwanted
from apportion.data.builtin import resolve_model
from apportion.data.errors import DataError as SourceError
from apportion.data.pair_tokens import EncodedExample, ExampleEncoder, PreferenceData, encode_sources, hold_out, pack
from apportion.data.pairs import PairColumns, read_demonstration, read_pair, row_check
from apportion.data.prompts import PromptEncoder, load_tokenizer, template_text
from apportion.data.sources import load_sources
from apportion.edges import closing, refusals, terminated_as_interrupt, told_first
from apportion.loop.device_memory import DevicePeaks
from apportion.loop.resume import check_steps_left
from apportion.platform.checkpoint import Checkpoint, CheckpointStore
from apportion.platform.cluster import STARTING, Actor, ActorRequest, Cluster, gather
from apportion.platform.console_lines import ConsoleLines
from apportion.platform.known_secrets import redacted
from apportion.platform.messages import say
from apportion.platform.plots import plot_run
from apportion.platform.run_lock import held
from apportion.platform.runs import RunFolder, make_run_folder, run_of
from apportion.platform.tracking import MultiTracker, TrackedRun, open_trackers
from apportion.preference_trainer import (
    PreferenceTrainer,
    StageProgress,
    StageSettings,
    cautions,
    check_position,
    total_steps,
)
from apportion.saved import taken_up


def train(config: PreferenceConfig, resolved: dict[str, Any]) -> int:
    """Run a whole stage; whatever happens, nothing is left running."""
    with ExitStack() as locks:
        return _train(config, resolved, locks)


def _train(config: PreferenceConfig, resolved: dict[str, Any], locks: ExitStack) -> int:
    with refusals():
        checkpoint = taken_up(config, locks)
        if checkpoint:
            check_layout(checkpoint.path, layout_of(config))
        objective, settings = objective_of(config), _settings(config)
        fetch_here(config, stage_models(config))
        model = resolve_model(config.model.path)
        if isinstance(config, DpoRunConfig) and config.dpo.reference:
            _check_reference(config, config.dpo.reference)
        examples, held_out, left_out = _examples(config, model)
        steps = total_steps(settings, len(examples))
        check_warmup("policy", config.policy.warmup_steps, steps)
        if checkpoint:
            check_position(settings, examples, checkpoint.state)  # before a rank starts
            check_steps_left(checkpoint.state, steps, run_of(checkpoint).path)
            folder = run_of(checkpoint)
        else:
            folder = make_run_folder(config.runs_folder, config.run_name, config.recipe)
            locks.enter_context(held(folder.path))
            folder.save_config(resolved)
        tracker = _tracker(config, resolved, folder, checkpoint, steps)
        for line in cautions(checkpoint.state) if checkpoint else []:
            tracker.warn(line)
    say(f"run folder: {folder.path}\n{_sizes(len(examples), held_out, left_out, steps)}")
    for note in unwanted(config):
        say(f"note: {note}")
    with (
        terminated_as_interrupt(),
        closing(tracker),  # of a start that fails; otherwise they are closed before the cluster is torn down
        _cluster(config, folder) as cluster,
        closing(tracker),
        told_first(tracker),
    ):
        ranks = _ranks(config, cluster, _spec(config, objective, model, steps))
        cluster.check_shared(ranks, folder.path, config.cluster.start_timeout_seconds)
        store = CheckpointStore(folder.checkpoints, config.checkpoint.keep)
        trainer = PreferenceTrainer(ranks, examples, held_out, settings, tracker, store)
        trainer.device_peaks = DevicePeaks(cluster.on_gpus(), config.cluster.call_timeout_seconds)
        trainer.prepare()
        if checkpoint:
            with refusals():
                trainer.restore(checkpoint.path, checkpoint.state)
            folder.save_config(resolved)  # not before: a resume that is refused leaves the run as it was
            say(f"resumed from {checkpoint.path} at step {checkpoint.step}")
        start = time.perf_counter()
        progress = trainer.run()
        summary = _summary(config, progress, left_out, time.perf_counter() - start) | {
            "examples": len(examples),
            "held_out_examples": len(held_out) if held_out else 0,
            "peak_memory_mib": cluster.peak_memory_mib(),
            **device_summary(trainer.device_peaks),
        }
        folder.write_summary(summary)
        tracker.log_summary(summary)
    if config.tracking.plots and config.tracking.jsonl:
        plot_run(folder.path)
    _report(progress)
    print_device_memory(summary)
    say(f"model: {folder.checkpoints / f'step-{progress.step:06d}' / 'model'}")
    return 0


def _tracker(
    config: PreferenceConfig, resolved: dict[str, Any], folder: RunFolder, checkpoint: Checkpoint | None, steps: int
) -> MultiTracker:
    state, step = (checkpoint.state.trackers, checkpoint.step) if checkpoint else ({}, None)
    run = TrackedRun(folder.path, folder.name, steps, redacted(resolved), step, state)
    return open_trackers(config.tracking, run, ConsoleLines(steps) if config.tracking.console else None)


@contextmanager
def _cluster(config: PreferenceConfig, folder: RunFolder) -> Iterator[Cluster]:
    c = config.cluster
    cluster = Cluster(c.address, folder.name, c.policy_ranks, folder.path / "logs", c.object_store_gib)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def _check_reference(config: DpoRunConfig, path: str) -> None:
    remote = config.model.trust_remote_code
    own = load_tokenizer(config.model.path, None, remote)
    try:
        other = load_tokenizer(path, None, remote)
    except SourceError:  # it only reads the policy's ids: it needs none, and then nothing is known of it
        other = None
    check_reference(config, path)  # again: what was not on this machine may have come with its tokenizer
    if other is not None:
        check_same_tokenizer(own, other, "dpo.reference", "it reads the policy's token ids", only_own=True)


def objective_of(config: PreferenceConfig) -> Objective:
    """The loss that the stage's own section describes. ValueError for one that cannot be."""
    if isinstance(config, DpoRunConfig):
        d = config.dpo
        return Dpo(d.beta, d.loss, d.label_smoothing, d.length_normalized, d.reverse)
    if isinstance(config, RewardModelRunConfig):
        return RewardModel(config.reward_model.margin, config.reward_model.center)
    return Sft()


# data


def _examples(config: PreferenceConfig, model: str) -> tuple[PreferenceData, PreferenceData | None, Counter[str]]:
    """Training and held-out examples as tokens, and what was left out, by reason."""
    data = config.data
    tokenizer = load_tokenizer(model, config.model.chat_template, config.model.trust_remote_code)
    prompts = PromptEncoder(
        tokenizer, data.system_prompt, data.chat, dict(data.chat_template_kwargs), data.max_prompt_tokens,
        data.tools_column, read_limits(config.model.path).vocabulary,
    )  # fmt: skip
    encoder = ExampleEncoder(prompts, data.max_tokens, data.too_long)
    train, left_out = _encoded(config, encoder, "train")
    held_out: list[EncodedExample] = []
    if data.eval is not None:
        held_out, skipped = _encoded(config, encoder, "eval")
        left_out += skipped
    elif data.eval_share > 0:
        train, held_out = hold_out(train, data.eval_share, config.seed)
        held_out = held_out[: data.eval_limit]
    if prompts.reasoning_left_out:
        say(
            f"data: the chat template leaves out the reasoning of earlier turns in {prompts.reasoning_left_out} prompts; "
            "nothing is learned from these turns"
        )
    return pack(train), pack(held_out) if held_out else None, left_out


def _encoded(
    config: PreferenceConfig, encoder: ExampleEncoder, split: str
) -> tuple[list[EncodedExample], Counter[str]]:
    data = config.data
    columns = PairColumns(
        data.prompt_column, data.chosen_column, data.rejected_column, data.completion_column, data.messages_column,
        data.margin_column, data.tools_column, data.label_column,
    )  # fmt: skip
    read = read_pair if config.pairs else read_demonstration
    given, limit = (data.train, data.limit) if split == "train" else (data.eval, data.eval_limit)
    sources = load_sources(
        given,
        split=split,
        prompt_column=data.prompt_column,
        on_bad_row=data.on_bad_row,
        limit=limit,
        check=row_check(read, columns),
    )
    return encode_sources(sources, read, columns, encoder, data.on_bad_row)


# ranks


def _spec(config: PreferenceConfig, objective: Objective, model: str, steps: int) -> PreferenceSpec:
    m = config.model
    reference = config.dpo.reference if isinstance(config, DpoRunConfig) else None
    return PreferenceSpec(
        model=model,
        dtype=m.dtype,
        attention=m.attention,
        trust_remote_code=m.trust_remote_code,
        lora=config.policy.lora,
        settings=engine_settings(config.policy, config.cluster.gpus_per_policy_rank, read_model(m.path)),
        objective=objective,
        reference_model=resolve_model(reference) if reference else None,
        total_optimizer_steps=steps,
        seed=config.seed,
        chat_template=template_text(m.chat_template),
        packing=config.data.packing,
    )


def _ranks(config: PreferenceConfig, cluster: Cluster, spec: PreferenceSpec) -> list[Actor]:
    """Ranks that train together. The first says where it can be met, then all of them load and join."""
    c = config.cluster
    gpus = c.gpus_per_policy_rank
    threads = thread_count(c, gpus)
    environment = cores_environment(threads) | device_environment(gpus)
    environment |= training_environment(gpus, config.train.deterministic)
    if not cluster.joined:
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    requests = [
        ActorRequest(f"{config.stage}-{i}", PreferenceWorker, (spec,), 1, gpus, environment)
        for i in range(c.policy_ranks)
    ]
    cluster.expect(requests)
    models = stage_models(config)
    fetch_on_nodes(cluster, models, {"policy": requests}, c.download_timeout_seconds)
    requests = from_cache({"policy": requests}, models, cluster.joined, own_judge=False)["policy"]
    actors = cluster.start(requests, c.start_timeout_seconds)
    calls = join(cluster, actors, c, config.seed, config.train.deterministic, threads)
    gather(calls, c.start_timeout_seconds, STARTING)
    return actors


def _settings(config: PreferenceConfig) -> StageSettings:
    t, e = config.train, config.evaluation
    reduction = registry.build("reduction", config.sft.reduction) if isinstance(config, SftRunConfig) else None
    return StageSettings(
        name=config.stage,
        epochs=t.epochs,
        steps=t.steps,
        batch_size=t.batch_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
        needs_reference=objective_of(config).needs_reference,
        reduction=reduction,
        evaluate_every=e.every_steps,
        evaluate_before=e.before,
        evaluate_after=e.after,
        call_timeout_seconds=config.cluster.call_timeout_seconds,
        max_minutes=t.max_minutes,
        checkpoint_every=config.checkpoint.every_steps,
        checkpoint_minutes=config.checkpoint.every_minutes,
        checkpoint_final=config.checkpoint.final,
        ranks=layout_of(config),
    )


# the end


def _summary(
    config: PreferenceConfig, progress: StageProgress, left_out: Counter[str], seconds: float
) -> dict[str, Any]:
    return {
        "stage": config.stage,
        "steps": progress.step,
        "held_out_before": progress.before,
        "held_out_after": progress.after,
        "rows_left_out": dict(left_out),
        "examples_seen": progress.examples,
        "tokens_per_second": progress.tokens / progress.step_seconds if progress.step_seconds else None,
        "wall_seconds": progress.wall_seconds or seconds,
        "last_metrics": progress.metrics,
        "seed": config.seed,
    }


def _sizes(examples: int, held_out: PreferenceData | None, left_out: Counter[str], steps: int) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
    words = f"{examples} examples, {len(held_out) if held_out else 0} held out, {steps} steps"
    return f"{words}; rows left out: {reasons}" if reasons else words


def _report(progress: StageProgress) -> None:
    for name, after in progress.after.items():
        if name in progress.before and name.startswith("eval/"):
            before = progress.before[name]
            say(
                f"held-out {name.removeprefix('eval/')}: {before:.4f} before, {after:.4f} after ({after - before:+.4f})"
            )
