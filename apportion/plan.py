"""What a run will do, worked out from its configuration alone: batch sizes with their arithmetic, which actor runs
where, and an estimate of each one's memory. `make_plan` refuses what cannot run; nothing is started and nothing heavy
imported.

Memory is what weights, optimiser and caches need by design plus rough terms for activations and the processes; it is
there to see what fits, to a factor of about 1.3.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from math import ceil

from apportion.actors.reward_check import check_functions, check_outages, has_models
from apportion.conf.before import stages
from apportion.conf.combinations import check_combinations, longest_sampled
from apportion.conf.companions import check_companions, check_reward_models
from apportion.conf.defaults import Choice, engine_settings, left_to_device, policy_settings, rollout_settings
from apportion.conf.devices import in_use
from apportion.conf.environment import check_environment
from apportion.conf.families import check_family
from apportion.conf.gpu_plan import plan_gpus
from apportion.conf.judges import check_judge, judge_urls, own_model
from apportion.conf.layout import check_resume
from apportion.conf.machine import Machine, this_machine, threads_of
from apportion.conf.memory import GIB, frozen_memory, rollout_memory, teacher_memory, training_memory
from apportion.conf.models import VALUE_BYTES, ModelFacts, check_own_tokenizer, read_model
from apportion.conf.parts import check_parts
from apportion.conf.placement import GpuUse, firm_bytes, gpu_lines
from apportion.conf.placement import size as _size
from apportion.conf.schema import CheckpointConfig, Config
from apportion.conf.sources import check_sources
from apportion.conf.teachers import check_distillation
from apportion.conf.unwanted import unwanted
from apportion.edges import refusals
from apportion.platform import start
from apportion.platform.errors import ConfigError

_PROCESS_BYTES = {"policy": 1.1, "critic": 1.1, "reference": 1.0, "rollout": 1.6, "credit": 0.5, "reward": 0.4}  # GiB


@dataclass(frozen=True)
class Quantity:
    """One number of a run and the arithmetic that gives it."""

    name: str
    value: int
    arithmetic: str


@dataclass(frozen=True)
class ActorPlan:
    """`count` actors of one role. `memory` is bytes of each one in main memory, by what they are for."""

    role: str
    count: int
    cpus: float  # of each, Ray's accounting
    gpus: float
    threads: int | None  # None: its share of the cores of a node that is not known yet
    memory: dict[str, int] = field(default_factory=dict)
    on_gpu: bool = False  # where the model is
    memory_known: bool = True

    @property
    def bytes_each(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """The whole picture. `needs` are the signals that credit and KL ask for."""

    title: str
    quantities: list[Quantity]
    actors: list[ActorPlan]
    needs: frozenset[str]
    notes: list[str]
    gpus: list[GpuUse] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)  # what the configuration leaves to the device

    @property
    def needs_reference(self) -> bool:
        return "reference_logprobs" in self.needs

    @property
    def needs_critic(self) -> bool:
        return "values" in self.needs

    def actor(self, role: str) -> ActorPlan | None:
        """The actors of a role, or None where the run has none."""
        return next((actor for actor in self.actors if actor.role == role), None)

    def value(self, name: str) -> int:
        """The quantity of that name; KeyError if there is none."""
        return {quantity.name: quantity.value for quantity in self.quantities}[name]

    def render(self) -> str:
        """For people, about fifty lines."""
        width = max(len(quantity.name) for quantity in self.quantities)
        lines = [self.title, "", "batches"]
        lines += [f"  {q.name:<{width}}  {q.value:>11,}  = {q.arithmetic}" for q in self.quantities]
        lines += ["", "actors", f"  {'role':<11} {'count':>5} {'CPUs':>5} {'GPUs':>5} {'threads':>8}  memory of each"]
        for a in self.actors:
            threads = ("share" if a.gpus else "all") if a.threads is None else str(a.threads)
            lines.append(f"  {a.role:<11} {a.count:>5} {a.cpus:>5g} {a.gpus:>5g} {threads:>8}  {_memory_text(a)}")
        lines += gpu_lines(self.gpus)
        if self.choices:
            lines += ["", "left to the device", *_choice_lines(self.choices)]
        if self.notes:
            lines += ["", "notes", *(f"  - {note}" for note in self.notes)]
        return "\n".join(lines)


def make_plan(config: Config, machine: Machine | None = None) -> Plan:
    """The plan of a run; ConfigError where it cannot run, saying what to change.

    `machine` is the one that an embedded Ray would use (default: this one); it does not count when a cluster is joined,
    unless it is a description, which then stands for the cluster.
    """
    joined = config.cluster.address is not None or bool(os.environ.get("RAY_ADDRESS"))
    described = machine is not None and machine.assumed is not None
    here = machine if described else None if joined else machine or this_machine()
    session = None if joined else start.session_folder(os.environ)
    needs = check_parts(config.algorithm)
    model = read_model(config.model.path)
    check_own_tokenizer(config.model.path, chat_template=config.model.chat_template)
    check_family(config.model.path, config.rollout.engine)
    stages(config)
    teachers = check_distillation(config)
    actors = _actors(config, needs, model, here)
    actors[0].memory.update(teacher_memory(config, teachers))
    gpus = [actor.gpus for actor in actors for _ in range(actor.count)]
    check_combinations(config, needs, model, here, gpus)
    check_companions(config, needs)
    check_resume(config, critic="values" in needs)
    if "critiques" in needs:
        check_judge(config, joined, here)
    judge_urls(config.judge)  # of an address that no algorithm asks, too: a typing error is one
    check_environment(config, joined)
    reward = config.reward
    check_functions(reward.functions, reward.timeout_seconds)
    check_outages(reward.functions, reward.timeout_seconds, reward.outage_seconds, config.cluster.call_timeout_seconds)
    check_reward_models(config)
    with refusals():
        check_sources(config)
    _check_memory(config, actors, here)
    gpu_plan = plan_gpus(config, needs, model, teachers, here)
    taken = None if here is None else in_use(here, firm_bytes(gpu_plan.uses))
    busy = [] if taken is None else [f"{taken}; `apportion train` refuses to start until then"]
    return Plan(
        title=f"{config.recipe}: {config.algorithm.name} on {config.model.path}, {config.train.steps} steps",
        quantities=_quantities(config, "influences" in needs),
        actors=actors,
        needs=needs,
        notes=_notes(config, needs, model, here, actors)
        + gpu_plan.notes
        + busy
        + start.session_notes(session, os.environ),
        gpus=gpu_plan.uses,
        choices=left_to_device(config, needs, model),
    )


def _quantities(config: Config, whole_groups: bool) -> list[Quantity]:
    prompts, responses = config.train.prompts_per_step, config.rollout.responses_per_prompt
    ranks, engines = config.cluster.policy_ranks, config.cluster.rollout_engines
    updates, epochs = config.algorithm.updates_per_batch, config.algorithm.epochs
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    total = prompts * responses
    engine_rows = ceil(prompts / engines) * responses
    side_by_side = rollout_settings(config.rollout, config.cluster.gpus_per_rollout_engine).max_sequences
    update_rows = total // updates
    groups = prompts // updates
    rank_rows, dealt = ceil(update_rows / ranks), f"about ceil({update_rows} / {ranks} ranks), balanced by tokens"
    if whole_groups and groups >= ranks:
        rank_rows, dealt = (
            ceil(groups / ranks) * responses,
            f"about ceil({groups} groups / {ranks} ranks) x {responses}",
        )
    fitting = config.policy.micro_batch_tokens // longest
    rows = [
        ("trajectories a step", total, f"{prompts} prompts x {responses} responses"),
        ("trajectories an engine", engine_rows, f"ceil({prompts} prompts / {engines} engines) x {responses} responses"),
        ("decoding rounds", ceil(engine_rows / side_by_side), f"ceil({engine_rows} / {side_by_side} side by side)"),
        (
            "tokens a trajectory",
            longest,
            f"at most {config.data.max_prompt_tokens} prompt + {longest - config.data.max_prompt_tokens} response",
        ),
        ("tokens a step", total * longest, f"at most {total} trajectories x {longest}"),
        ("trajectories an update", update_rows, f"{total} / {updates} updates a batch"),
        (
            "trajectories a rank and update",
            rank_rows,
            dealt,
        ),
        ("longest rows a micro-batch", fitting, f"{config.policy.micro_batch_tokens} padded tokens // {longest}"),
        ("micro-batches a rank and update", ceil(rank_rows / fitting), f"about ceil({rank_rows} / {fitting})"),
        ("optimiser steps a batch", updates * epochs, f"{updates} updates x {epochs} epochs"),
        ("optimiser steps", config.train.steps * updates * epochs, f"{config.train.steps} steps x {updates * epochs}"),
    ]
    if config.data.eval is not None:
        greedy, samples = int(config.evaluation.greedy), config.evaluation.samples
        if config.data.eval_limit is not None:
            limit = config.data.eval_limit
            rows.append(
                (
                    "responses an evaluation",
                    limit * (greedy + samples),
                    f"at most {limit} prompts x ({greedy} greedy + {samples} sampled)",
                )
            )
    return [Quantity(*row) for row in rows]


def _actors(
    config: Config, needs: frozenset[str], model: ModelFacts | None, machine: Machine | None
) -> list[ActorPlan]:
    """Every actor of the run; a critic and a reference only where a signal asks for them."""
    cluster = config.cluster
    known = model is not None
    total = config.train.prompts_per_step * config.rollout.responses_per_prompt

    def compute(role: str, count: int, gpus: float, memory: dict[str, int], facts_known: bool = known) -> ActorPlan:
        process = {"process": round(_PROCESS_BYTES[role] * GIB)}
        threads = _threads(config, gpus, machine)
        return ActorPlan(role, count, 1.0, gpus, threads, memory | process, gpus > 0, facts_known)

    actors = [
        compute(
            "policy",
            cluster.policy_ranks,
            cluster.gpus_per_policy_rank,
            training_memory(config, policy_settings(config, model), model),
        ),
        compute("rollout", cluster.rollout_engines, cluster.gpus_per_rollout_engine, rollout_memory(config, model)),
    ]
    if "values" in needs:
        own = model if config.critic.model is None else read_model(config.critic.model, "critic.model")
        settings = engine_settings(config.critic, cluster.gpus_per_critic_rank, own)
        memory = training_memory(config, settings, own, "critic")
        actors.append(compute("critic", cluster.policy_ranks, cluster.gpus_per_critic_rank, memory, own is not None))
    if "reference_logprobs" in needs:
        own = model if config.reference.model is None else read_model(config.reference.model, "reference.model")
        memory = frozen_memory(config, own)
        actors.append(
            compute("reference", cluster.reference_ranks, cluster.gpus_per_reference_rank, memory, own is not None)
        )
    if "critiques" in needs:
        actors.append(_judge_plan(config, machine))
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    batch = {"batch": total * longest * 64}  # ids, masks, log-probs and credit of a token, packed and padded
    actors.append(ActorPlan("credit", 1, 0, 0, 1, {**batch, "process": round(_PROCESS_BYTES["credit"] * GIB)}))
    process = {"process": round(_PROCESS_BYTES["reward"] * GIB)}
    actors.append(ActorPlan("reward", config.reward.workers, 0, cluster.gpus_per_reward_worker, 1, process))
    if config.environment.cls is not None:
        actors.append(ActorPlan("environment", config.environment.workers, 0, 0, config.environment.threads, process))
    return actors


def _threads(config: Config, gpus: float, machine: Machine | None) -> int | None:
    """Of each actor with so many GPUs; None where its node is not known."""
    if config.cluster.threads is not None or machine is None:
        return config.cluster.threads
    return threads_of(gpus, machine.cores, machine.gpus)


def _judge_plan(config: Config, machine: Machine | None) -> ActorPlan:
    """A model of the run's own takes a core and memory; a function or an address next to nothing."""
    judge, gpus, path = config.judge, config.cluster.gpus_per_judge, own_model(config.judge)
    process = {"process": round(_PROCESS_BYTES["credit" if path is None else "rollout"] * GIB)}
    if path is None:
        return ActorPlan("judge", judge.workers, 0, gpus, 1, process)
    model = read_model(path, "judge.model")
    memory = {} if model is None or gpus else {"weights": model.parameters * VALUE_BYTES[judge.dtype]}
    if gpus == 0 and judge.engine == "vllm":
        memory["kv cache"] = max(1, round(judge.kv_cache_gib)) * GIB
    return ActorPlan(
        "judge",
        judge.workers,
        1.0,
        gpus,
        _threads(config, gpus, machine),
        memory | process,
        gpus > 0,
        model is not None,
    )


def _check_memory(config: Config, actors: list[ActorPlan], machine: Machine | None) -> None:
    """Refuse what certainly exceeds this machine: weights, optimiser and caches, without the rough terms."""
    rough = ("activations", "process", "batch", "logits", "teachers' logits")
    firm = sum(actor.count * sum(size for name, size in actor.memory.items() if name not in rough) for actor in actors)
    if machine is None or firm <= machine.memory_bytes * machine.nodes:
        return
    whose = "this machine" if machine.assumed is None else "the machine" if machine.nodes == 1 else "all nodes"
    expected = f"expected at most the {machine.memory_bytes * machine.nodes / GIB:.1f} GiB of {whose}"
    offloaded = [actor.role for actor in actors if actor.on_gpu and "masters" in actor.memory]
    if offloaded:
        lora = "" if config.policy.lora is not None or "policy" not in offloaded else ", policy.lora.rank=16"
        raise ConfigError(
            f"{offloaded[0]}.offload_optimizer: got true, and main memory would hold {firm / GIB:.1f} GiB, {expected}; try "
            f"{offloaded[0]}.offload_optimizer=false{lora} or a smaller model"
        )
    raise ConfigError(
        f"model.path: got {config.model.path}, whose weights, optimiser and caches take {firm / GIB:.1f} GiB, {expected}; "
        "try policy.lora.rank=16, a smaller rollout.kv_cache_gib, a smaller model, or policy.zero_stage=3 over a cluster"
    )


def _notes(
    config: Config, needs: frozenset[str], model: ModelFacts | None, machine: Machine | None, actors: list[ActorPlan]
) -> list[str]:
    asked = ", ".join(sorted(needs)) or "none"
    notes = [] if machine is None or machine.assumed is None else [machine.assumed]
    notes += [f"signals the algorithm asks for: {asked}", *unwanted(config, needs)]
    if model is None:
        notes.append(f"memory of {config.model.path} is not known: it is not on this machine yet")
    else:
        value = VALUE_BYTES[config.model.dtype]
        notes.append(
            f"model: {model.parameters:,} parameters, context {model.context or 'not stated'}; "
            f"a sync carries {_size(model.parameters * value)} through the object store"
        )
        notes += _cache_notes(config, model)
    if config.policy.lora is not None and "values" in needs:
        notes.append("LoRA is the policy's alone: the critic trains all of its weights")
    if config.train.max_minutes is not None:
        notes.append(f"ends after {config.train.max_minutes:g} minutes at the latest (train.max_minutes)")
    notes.append(_checkpoint_note(config.checkpoint))
    models = {"reward"} if has_models(config.reward.functions) else set()
    roles = {"policy", "rollout", "critic", "reference"} | models
    slow = [a.role for a in actors if a.role in roles and a.gpus == 0]
    if slow and any(a.gpus for a in actors):
        notes.append(f"on CPUs while others have GPUs: {', '.join(slow)} (cluster.gpus_per_*)")
    if machine is None:
        notes.append("the cluster's size is not known here: it is joined by address")
    else:
        host = sum(actor.count * actor.bytes_each for actor in actors)
        whose = "this machine has" if machine.assumed is None else "the machine has"
        each = "" if machine.nodes == 1 else f"{machine.nodes} x "
        free = f"{each}{machine.cores} cores, {each}{machine.gpus} GPUs, {each}{_size(machine.memory_bytes)} memory"
        notes.append(f"all actors together: about {_size(host)}; {whose} {free}")
        if host > machine.memory_bytes * machine.nodes:
            notes.append(
                "memory is likely to run out: lower policy.micro_batch_tokens or turn on policy.gradient_checkpointing"
            )
    if not any(actor.on_gpu for actor in actors):
        unused = machine is not None and machine.gpus > 0
        none = "no role has a GPU, though there are some (cluster.gpus_per_*)" if unused else "no GPU"
        notes.append(f"{none}: sampling and updating take turns on the cores")
    return notes


def _checkpoint_note(checkpoint: CheckpointConfig) -> str:
    """When a checkpoint is written.

    >>> _checkpoint_note(CheckpointConfig(every_steps=50))
    'checkpoints: after every 50 steps, after 10 min of training without one, at the end; the newest 2 are kept'
    """
    times = [f"after every {checkpoint.every_steps} steps"] if checkpoint.every_steps else []
    if checkpoint.every_minutes:
        times.append(f"after {checkpoint.every_minutes:g} min of training without one")
    times += ["at the end"] if checkpoint.final else []
    return f"checkpoints: {', '.join(times)}; the newest {checkpoint.keep} are kept" if times else "no checkpoints"


def _cache_notes(config: Config, model: ModelFacts) -> list[str]:
    """How many sequences the KV cache of a CPU engine holds, where that is fewer than are decoded side by side."""
    rollout = config.rollout
    if rollout.engine != "vllm" or config.cluster.gpus_per_rollout_engine > 0:
        return []
    longest = longest_sampled(config)
    size = max(1, round(rollout.kv_cache_gib)) * GIB
    held = size // (model.kv_bytes_per_token(VALUE_BYTES[config.model.dtype]) * longest)
    side_by_side = rollout_settings(rollout, 0).max_sequences
    if held < side_by_side:
        return [
            f"the KV cache holds {held} longest sequences of rollout.max_sequences={side_by_side}; "
            "more rollout.kv_cache_gib may decode faster"
        ]
    return []


def _choice_lines(choices: list[Choice]) -> list[str]:
    """
    >>> _choice_lines([Choice("rollout.compile", False, "no GPU")])
    ['  rollout.compile  false  no GPU']
    """
    values = [str(c.value).lower() if isinstance(c.value, bool) else f"{c.value:g}" for c in choices]
    width, wide = max(len(c.key) for c in choices), max(map(len, values))
    return [f"  {c.key:<{width}}  {value:>{wide}}  {c.why}" for c, value in zip(choices, values, strict=True)]


def _memory_text(actor: ActorPlan) -> str:
    if not actor.memory_known:
        return "not known"
    parts = " + ".join(f"{name} {_size(size)}" for name, size in actor.memory.items() if size >= GIB // 100)
    return f"{_size(actor.bytes_each)} = {parts}{', and its GPU' if actor.on_gpu else ''}"
