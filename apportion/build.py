"""The composition root: from a configuration to running actors and back to nothing running."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from apportion.actors.credit import CreditSpec, CreditWorker
from apportion.actors.critic import CriticSpec, CriticWorker
from apportion.actors.distillation import DistillationSpec
from apportion.actors.engine import World
from apportion.actors.engines import EngineSpec, Sampling
from apportion.actors.environment import EnvironmentSpec, EnvironmentWorker
from apportion.actors.environment_client import share
from apportion.actors.episodes import EpisodeLimits, EpisodeSpec
from apportion.actors.judge import JudgeWorker
from apportion.actors.policy import LossSpec, PolicySpec, PolicyWorker
from apportion.actors.reference import ReferenceSpec, ReferenceWorker
from apportion.actors.reward import RewardWorker
from apportion.actors.reward_check import check_columns, check_functions
from apportion.actors.rollout import RolloutSpec, RolloutWorker
from apportion.algorithms import registry
from apportion.algorithms.kl import KlCoefficient
from apportion.batch import Prompt
from apportion.conf.judges import check_judge, judge_spec, own_model
from apportion.conf.schema import Config
from apportion.conf.teachers import check_same_tokenizer, teacher_paths
from apportion.data.builtin import resolve_model
from apportion.data.prompts import PromptEncoder, PromptStream, every_prompt, load_tokenizer
from apportion.data.sources import Source, load_sources
from apportion.data.turns import TurnEncoder
from apportion.edges import closing, refusals, terminated_as_interrupt
from apportion.platform.checkpoint import Checkpoint, CheckpointStore
from apportion.platform.cluster import Actor, ActorRequest, Call, Cluster, gather
from apportion.platform.errors import ConfigError
from apportion.platform.plots import plot_run
from apportion.platform.runs import RunFolder, find_checkpoint, make_run_folder, redacted, run_of
from apportion.platform.tracking import MultiTracker, TrackedRun, open_trackers
from apportion.trainer import Actors, EvaluationSettings, LoopSettings, Progress, Trainer


@dataclass
class Needs:
    """What the algorithm asks the platform for."""

    policy_signals: bool
    reference: bool
    critic: bool
    groups_together: bool
    judge: bool = False


def needs_of(config: Config) -> Needs:
    algorithm = config.algorithm
    asked = registry.build("credit", algorithm.credit).needs
    in_reward = algorithm.kl.place == "reward"
    return Needs(
        policy_signals=bool(asked & {"old_logprobs", "entropies", "influences"})
        or in_reward
        or (algorithm.updates_per_batch * algorithm.epochs > 1 and algorithm.distillation is None),
        reference=algorithm.kl.place != "none" or "reference_logprobs" in asked,
        critic="values" in asked,
        groups_together="influences" in asked,
        judge="critiques" in asked,
    )


def train(config: Config, resolved: dict[str, Any]) -> int:
    """Run a whole training job; whatever happens, nothing is left running."""
    with refusals():
        checkpoint = find_checkpoint(config.resume, config.runs_folder) if config.resume else None
        needs = needs_of(config)
        if needs.judge:
            check_judge(config, joined=_joins(config))
        model = resolve_model(config.model.path)
        tokenizer = load_tokenizer(model, config.model.chat_template, config.model.trust_remote_code)
        for key, path in teacher_paths(config).items():
            check_same_tokenizer(tokenizer, load_tokenizer(path, None, config.model.trust_remote_code), key)
        prompts, held_out = _prompts(config, tokenizer)
        folder = run_of(checkpoint) if checkpoint else _new_folder(config, resolved)
        folder.save_config(resolved)
        tracker = _tracker(config, resolved, folder, checkpoint)
    _say(f"run folder: {folder.path}")
    with terminated_as_interrupt(), closing(tracker), _cluster(config, needs, folder) as cluster:
        _say("starting actors (vLLM and DeepSpeed take some tens of seconds)")
        trainer = _trainer(config, needs, model, cluster, prompts, tracker, folder)
        trainer.evaluation, trainer.evaluation_prompts = _evaluation(config, held_out), held_out
        if checkpoint:
            trainer.restore(checkpoint.path, checkpoint.state)
            _say(f"resumed from {checkpoint.path} at step {checkpoint.step}")
        start = time.perf_counter()
        progress = trainer.run()
        memory = cluster.peak_memory_mib()
        summary = _summary(config, progress, memory, time.perf_counter() - start, held_out)
        folder.write_summary(summary)
        tracker.log_summary(summary)
    if config.tracking.plots and config.tracking.jsonl:
        plot_run(folder.path)
    _report(summary, folder)
    return 0


def evaluate(config: Config, checkpoint: str) -> int:
    """Score a checkpoint's model on the held-out prompts."""
    with refusals():
        found = find_checkpoint(checkpoint, config.runs_folder)
        model = str(found.path / "model")
        tokenizer = load_tokenizer(model, config.model.chat_template, config.model.trust_remote_code)
        _, held_out = _prompts(config, tokenizer)
        if not held_out:
            raise ConfigError("data.eval: got none, expected a source to evaluate on")
    folder = run_of(found)
    with terminated_as_interrupt(), _cluster(config, Needs(False, False, False, False), folder) as cluster:
        actors = _start(config, cluster, _serving_requests(config, model))
        trainer = Trainer(
            cluster, actors, _NoPrompts(), _loop_settings(config, Needs(False, False, False, False)),
            KlCoefficient(0.0), MultiTracker([]), CheckpointStore(folder.checkpoints),
        )  # fmt: skip
        trainer.evaluation, trainer.evaluation_prompts = _evaluation(config, held_out), held_out
        report = trainer._evaluate()
    for name, value in sorted(report.metrics.items()):
        print(f"{name:32s} {value:.4f}")
    for row in _examples(report.answers, held_out):
        print(f"\n{row['prompt']}\n  -> {row['answer']!r} (reward {row['reward']:g})")
    return 0


# inputs


def _prompts(config: Config, tokenizer: Any) -> tuple[PromptStream, list[Prompt]]:
    data = config.data
    encoder = PromptEncoder(
        tokenizer, data.system_prompt, data.chat, dict(data.chat_template_kwargs), data.max_prompt_tokens
    )
    if config.environment.cls is not None:
        TurnEncoder(encoder, config.environment.observation_role)  # refuses a chat template that cannot show turns
    common: dict[str, Any] = {"prompt_column": data.prompt_column, "on_bad_row": data.on_bad_row}
    sources = load_sources(data.train, split="train", limit=data.limit, **common)
    functions = check_functions(config.reward.functions, config.reward.timeout_seconds)
    check_columns(functions, _columns(sources), "data.train")
    stream = PromptStream(
        sources, encoder, config.train.prompts_per_step, config.seed, data.shuffle, on_bad_row=data.on_bad_row
    )
    held_out: list[Prompt] = []
    left_out = Counter(stream.skipped)
    if data.eval is not None:
        held_sources = load_sources(data.eval, split="eval", limit=data.eval_limit, **common)
        check_columns(functions, _columns(held_sources), "data.eval")
        held_out, skipped = every_prompt(held_sources, encoder, data.on_bad_row)
        left_out += skipped
    if left_out:
        reasons = ", ".join(f"{reason} {count}" for reason, count in left_out.items())
        _say(f"data: {left_out.total()} rows left out ({reasons})")
    return stream, held_out


def _columns(sources: list[Source]) -> set[str]:
    """Columns beside the prompt, as the first rows of each source have them."""
    return {name for s in sources for row in s.rows[:8] for name in row.values if name != s.prompt_column}


class _NoPrompts:
    def next_batch(self, prompts: int | None = None) -> list[Prompt]:
        raise ConfigError("data.train: evaluation draws no training prompts")

    def state(self) -> dict[str, int]:
        return {}

    def load_state(self, state: dict[str, int]) -> None:
        return None


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


# actors


def _trainer(
    config: Config,
    needs: Needs,
    model: str,
    cluster: Cluster,
    prompts: PromptStream,
    tracker: MultiTracker,
    folder: RunFolder,
) -> Trainer:
    requests = _serving_requests(config, model, needs)
    requests["policy"] = _policy_requests(config, model)
    if needs.reference:
        requests["reference"] = _reference_requests(config, model)
    if needs.critic:
        requests["critic"] = _critic_requests(config, model)
    if needs.judge:
        requests["judge"] = _judge_requests(config, model, folder)
    actors = _start(config, cluster, requests)
    kl = config.algorithm.kl
    store = CheckpointStore(folder.checkpoints, config.checkpoint.keep)
    coefficient = KlCoefficient(kl.coefficient, kl.target, kl.horizon)
    return Trainer(cluster, actors, prompts, _loop_settings(config, needs), coefficient, tracker, store)


def _start(config: Config, cluster: Cluster, requests: dict[str, list[ActorRequest]]) -> Actors:
    """Every actor of every role at once, since each spends its start on imports and on loading; and wait for all."""
    started = {role: cluster.launch(asked) for role, asked in requests.items()}
    joining = [call for role in ("policy", "critic") for call in _join(config, cluster, started.get(role, []))]
    if environments := started.get("environment", []):
        engines = started["rollout"]
        joining += [a.call("connect", share(environments, i, len(engines))) for i, a in enumerate(engines)]
    joining += [actor.call("prepare") for actor in started["credit"]]
    everyone = [actor for actors in started.values() for actor in actors]
    cluster.ready(everyone, config.cluster.start_timeout_seconds, joining)
    [credit] = started.pop("credit")
    return Actors(credit=credit, **{"policy": [], **started})


def _serving_requests(config: Config, model: str, needs: Needs | None = None) -> dict[str, list[ActorRequest]]:
    """Rollout engines, reward workers and the credit worker."""
    reward, c = config.reward, config.cluster
    gpus = c.gpus_per_rollout_engine
    rollouts = [
        ActorRequest(f"rollout-{i}", RolloutWorker, (_rollout_spec(config, model, i), f"rollout-{i}"), 1, gpus,
                     _threads_environment(config))
        for i in range(c.rollout_engines)
    ]  # fmt: skip
    arguments = (reward.functions, reward.timeout_seconds, reward.clip, model)
    rewards = [ActorRequest(f"reward-{i}", RewardWorker, arguments) for i in range(reward.workers)]
    credit = ActorRequest("credit-0", CreditWorker, (_credit_spec(config, model, needs),))
    environments = _environment_requests(config)
    return {"rollout": rollouts, "reward": rewards, "credit": [credit], "environment": environments}


def _environment_requests(config: Config) -> list[ActorRequest]:
    e = config.environment
    if e.cls is None:
        return []
    spec = EnvironmentSpec(e.cls, dict(e.params), e.step_timeout_seconds, e.threads)
    return [ActorRequest(f"environment-{i}", EnvironmentWorker, (spec,)) for i in range(e.workers)]


def _episodes(config: Config, model: str) -> EpisodeSpec | None:
    e, d, m = config.environment, config.data, config.model
    if e.cls is None:
        return None
    return EpisodeSpec(
        limits=EpisodeLimits(e.max_turns, e.max_turn_tokens),
        step_timeout_seconds=e.step_timeout_seconds,
        threads=e.threads,
        role=e.observation_role,
        tokenizer=model,
        chat_template=m.chat_template,
        trust_remote_code=m.trust_remote_code,
        system_prompt=d.system_prompt,
        chat=d.chat,
        chat_template_kwargs=dict(d.chat_template_kwargs),
        max_prompt_tokens=d.max_prompt_tokens,
    )


def _joins(config: Config) -> bool:
    return config.cluster.address is not None or bool(os.environ.get("RAY_ADDRESS"))


def _threads(config: Config) -> int:
    return config.cluster.threads or os.cpu_count() or 1


def _threads_environment(config: Config) -> dict[str, str]:
    # Ray would set it to num_cpus; compute actors take turns on all cores.
    return {"OMP_NUM_THREADS": str(_threads(config)), "TOKENIZERS_PARALLELISM": "false"}


def _training_environment(config: Config, gpus: float) -> dict[str, str]:
    environment = _threads_environment(config)
    if gpus == 0:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def _rollout_spec(config: Config, model: str, index: int) -> RolloutSpec:
    r = config.rollout
    threads = _threads(config)
    longest = config.data.max_prompt_tokens + max(r.max_response_tokens, config.evaluation.max_response_tokens or 0)
    spec = EngineSpec(
        model=model,
        dtype=config.model.dtype,
        seed=config.seed + index,
        max_model_len=longest,
        max_sequences=r.max_sequences,
        tensor_parallel_size=r.tensor_parallel_size,
        gpu_memory_utilization=r.gpu_memory_utilization,
        kv_cache_gib=r.kv_cache_gib,
        compile=r.compile,
        prefix_caching=r.prefix_caching,
        trust_remote_code=config.model.trust_remote_code,
        threads=threads,
        first_thread=0,
    )
    return RolloutSpec(r.engine, spec, config.seed, config.train.deterministic, _episodes(config, model))


def _credit_spec(config: Config, model: str, needs: Needs | None) -> CreditSpec:
    a = config.algorithm
    return CreditSpec(
        credit=dict(a.credit),
        reduction=dict(a.reduction),
        shaping=[dict(s) for s in a.shaping],
        selection=[dict(s) for s in a.selection],
        kl_in_reward=a.kl.place == "reward",
        kl_estimator=a.kl.estimator,
        tokenizer=model,
        keep_groups_together=bool(needs and needs.groups_together),
    )


def _rank_requests(config: Config, role: str, cls: type, spec: Any, gpus: float) -> list[ActorRequest]:
    """Ranks that train together, as many as the policy has."""
    environment = _training_environment(config, gpus)
    if not _joins(config):
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # a Ray of our own: all ranks are on this machine
    ranks = range(config.cluster.policy_ranks)
    return [ActorRequest(f"{role}-{i}", cls, (spec,), 1, gpus, environment) for i in ranks]


def _join(config: Config, cluster: Cluster, actors: list[Actor]) -> list[Call]:
    """The first rank says where it can be met, then all of them load and join: the calls under way."""
    if not actors:
        return []
    [(address, port)] = gather(
        [actors[0].call("free_port", not cluster.joined)], config.cluster.start_timeout_seconds, "start of actors"
    )
    worlds = [
        World(rank, len(actors), address, port, _threads(config), config.seed, config.train.deterministic)
        for rank in range(len(actors))
    ]
    return [actor.call("setup", world) for actor, world in zip(actors, worlds, strict=True)]


def _judge_requests(config: Config, model: str, folder: RunFolder) -> list[ActorRequest]:
    spec = judge_spec(config, model, folder.path, _threads(config))
    cpus = float(own_model(config.judge) is not None)
    environment = _threads_environment(config)
    return [
        ActorRequest(f"judge-{i}", JudgeWorker, (spec,), cpus, config.cluster.gpus_per_judge, environment)
        for i in range(config.judge.workers)
    ]


def _optimizer_steps(config: Config) -> int:
    return config.train.steps * config.algorithm.updates_per_batch * config.algorithm.epochs


def _policy_requests(config: Config, model: str) -> list[ActorRequest]:
    a, m = config.algorithm, config.model
    loss = LossSpec(
        surrogate=None if a.surrogate is None else dict(a.surrogate),
        temperature=config.rollout.temperature,
        kl_in_loss=a.kl.place == "loss",
        kl_estimator=a.kl.estimator,
        entropy_coefficient=a.entropy_coefficient,
        correction_method=a.correction.method,
        correction_level=a.correction.level,
        correction_cap=a.correction.cap,
        mismatch_bound=a.correction.bound,
        epochs=a.epochs,
    )
    spec = PolicySpec(
        model, m.dtype, m.attention, m.trust_remote_code, config.policy.lora, config.policy, loss,
        _optimizer_steps(config), credit=dict(a.credit) if needs_of(config).groups_together else None,
        distillation=_distillation(config), share_prompts=config.policy.share_prompts,
    )  # fmt: skip
    return _rank_requests(config, "policy", PolicyWorker, spec, config.cluster.gpus_per_policy_rank)


def _distillation(config: Config) -> DistillationSpec | None:
    part, m = config.algorithm.distillation, config.model
    if part is None:
        return None
    dpo, other = (resolve_model(path) for path in teacher_paths(config).values())
    return DistillationSpec(dict(part), dpo, other, m.dtype, m.attention, m.trust_remote_code)


def _critic_requests(config: Config, model: str) -> list[ActorRequest]:
    m = config.model
    path = resolve_model(config.critic.model) if config.critic.model else model
    spec = CriticSpec(
        path, m.dtype, m.attention, m.trust_remote_code, config.critic, config.critic.value_clip,
        config.algorithm.epochs, _optimizer_steps(config), share_prompts=config.policy.share_prompts,
    )  # fmt: skip
    return _rank_requests(config, "critic", CriticWorker, spec, config.cluster.gpus_per_critic_rank)


def _reference_requests(config: Config, model: str) -> list[ActorRequest]:
    m, c = config.model, config.cluster
    spec = ReferenceSpec(
        model=resolve_model(config.reference.model) if config.reference.model else model,
        dtype=m.dtype,
        attention=m.attention,
        trust_remote_code=m.trust_remote_code,
        micro_batch_tokens=config.reference.micro_batch_tokens,
        logits_chunk_tokens=config.policy.logits_chunk_tokens,
        temperature=config.rollout.temperature,
        threads=_threads(config),
        share_prompts=config.policy.share_prompts,
    )
    environment = _threads_environment(config)
    return [
        ActorRequest(f"reference-{i}", ReferenceWorker, (spec,), 1, c.gpus_per_reference_rank, environment)
        for i in range(c.reference_ranks)
    ]


# settings of the loop


def _loop_settings(config: Config, needs: Needs) -> LoopSettings:
    r, t = config.rollout, config.train
    return LoopSettings(
        steps=t.steps,
        prompts_per_step=t.prompts_per_step,
        responses_per_prompt=r.responses_per_prompt,
        sampling=Sampling(r.temperature, r.top_p, r.top_k, r.max_response_tokens, list(r.stop), r.response_column),
        minibatches=config.algorithm.updates_per_batch,
        policy_signals=needs.policy_signals,
        selects=bool(config.algorithm.selection),
        max_failed_share=config.reward.max_failed_share,
        sync_check=t.sync_check,
        call_timeout_seconds=config.cluster.call_timeout_seconds,
        critic_only_steps=config.critic.warmup_steps_without_policy if needs.critic else 0,
        samples_shown=config.tracking.samples_per_step,
        max_minutes=t.max_minutes,
        checkpoint_every=config.checkpoint.every_steps,
        checkpoint_final=config.checkpoint.final,
        seeds={"run": config.seed},
        max_failed_critiques=config.judge.max_failed_share,
    )


def _evaluation(config: Config, held_out: list[Prompt]) -> EvaluationSettings | None:
    e = config.evaluation
    if not held_out:
        return None
    tokens = e.max_response_tokens or config.rollout.max_response_tokens
    return EvaluationSettings(
        e.every_steps, e.before, e.after, e.greedy, e.samples, list(e.k), e.temperature, tokens, e.correct_at, e.show
    )


# the end


def _summary(
    config: Config, progress: Progress, memory: dict[str, float], seconds: float, held_out: list[Prompt]
) -> dict[str, Any]:
    stages = progress.stage_seconds
    rollout, update = stages.get("rollout", 0.0), stages.get("update", 0.0)
    return {
        "accuracy_before": progress.accuracy_before,
        "accuracy_after": progress.accuracy_after,
        "steps": progress.step,
        "wall_seconds": progress.wall_seconds or seconds,
        "samples_per_second": _rate(progress.samples, progress.step_seconds),
        "rollout_tokens_per_second": _rate(progress.rollout_tokens, rollout),
        "update_tokens_per_second": _rate(progress.update_tokens, update),
        "seconds_per_stage": {k: v for k, v in stages.items() if k != "step"},
        "peak_memory_mib": memory,
        "answers_before": _examples(progress.answers_before, held_out),
        "answers_after": _examples(progress.answers_after, held_out),
        "last_metrics": progress.metrics,
        "seed": config.seed,
    }


def _rate(count: float, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None


def _examples(answers: list[dict[str, Any]], held_out: list[Prompt]) -> list[dict[str, Any]]:
    asked = {p.prompt_id: _last_question(p.prompt) for p in held_out}
    return [{"prompt": asked[a["prompt_id"]], "answer": a["answer"], "reward": a["reward"]} for a in answers]


def _last_question(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _report(summary: dict[str, Any], folder: RunFolder) -> None:
    from apportion.platform.console import plain_text

    before, after = summary["accuracy_before"], summary["accuracy_after"]
    if before is not None and after is not None and not math.isnan(after):
        print(f"\nheld-out greedy accuracy: {before:.3f} before, {after:.3f} after ({after - before:+.3f})")
    for old, new in zip(summary["answers_before"], summary["answers_after"], strict=False):
        print(f"\n{plain_text(old['prompt'])}")
        print(f"  before: {plain_text(old['answer'])!r} (reward {old['reward']:g})")
        print(f"  after:  {plain_text(new['answer'])!r} (reward {new['reward']:g})")
    print(f"\nrun folder: {folder.path} (summary.json, metrics.jsonl, samples.jsonl, plots, logs, checkpoints)")


# edges


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


def _say(text: str) -> None:
    print(text, flush=True)
