"""Actors that hold a model which is trained, or which the trained one is compared with."""

from __future__ import annotations

from typing import Any

from apportion.actors.critic import CriticSpec, CriticWorker
from apportion.actors.distillation import DistillationSpec
from apportion.actors.policy import LossSpec, PolicySpec, PolicyWorker
from apportion.actors.reference import ReferenceSpec, ReferenceWorker
from apportion.algorithms.correction import ImportanceCorrection
from apportion.assembly.hosts import compute_environment, joins, thread_count, training_environment
from apportion.assembly.needs import needs_of
from apportion.conf.defaults import engine_settings, policy_settings
from apportion.conf.models import read_model
from apportion.conf.schema import Config
from apportion.conf.teachers import teacher_paths
from apportion.data.builtin import resolve_model
from apportion.data.prompts import template_text
from apportion.platform.cluster import ActorRequest


def policy_requests(config: Config, model: str) -> list[ActorRequest]:
    a, m, c = config.algorithm, config.model, config.algorithm.correction
    loss = LossSpec(
        surrogate=None if a.surrogate is None else dict(a.surrogate),
        temperature=config.rollout.temperature,
        kl_in_loss=a.kl.place == "loss",
        kl_estimator=a.kl.estimator,
        kl_straight_through=a.kl.straight_through,
        entropy_coefficient=a.entropy_coefficient,
        correction=ImportanceCorrection(c.method, c.level, c.cap, c.floor, c.normalize),
        mismatch_bound=c.bound,
        epochs=a.epochs,
    )
    needs = needs_of(config)
    waits = config.critic.warmup_steps_without_policy if needs.critic else 0
    spec = PolicySpec(
        model, m.dtype, m.attention, m.trust_remote_code, config.policy.lora,
        policy_settings(config, read_model(m.path)), loss,
        _optimizer_steps(config, waits), credit=dict(a.credit) if needs.groups_together else None,
        distillation=_distillation(config), share_prompts=config.policy.share_prompts,
        chat_template=template_text(m.chat_template),
    )  # fmt: skip
    return _rank_requests(config, "policy", PolicyWorker, spec, config.cluster.gpus_per_policy_rank)


def _distillation(config: Config) -> DistillationSpec | None:
    part, m = config.algorithm.distillation, config.model
    if part is None:
        return None
    dpo, other = (resolve_model(path) for path in teacher_paths(config).values())
    return DistillationSpec(dict(part), dpo, other, m.dtype, m.attention, m.trust_remote_code)


def critic_requests(config: Config, model: str) -> list[ActorRequest]:
    m = config.model
    path = resolve_model(config.critic.model) if config.critic.model else model
    gpus = config.cluster.gpus_per_critic_rank
    settings = engine_settings(config.critic, gpus, read_model(config.critic.model or m.path, "critic.model"))
    spec = CriticSpec(
        path, m.dtype, m.attention, m.trust_remote_code, settings, config.critic.value_clip,
        config.algorithm.epochs, _optimizer_steps(config), share_prompts=config.policy.share_prompts,
    )  # fmt: skip
    return _rank_requests(config, "critic", CriticWorker, spec, config.cluster.gpus_per_critic_rank)


def reference_requests(config: Config, model: str) -> list[ActorRequest]:
    m, c = config.model, config.cluster
    spec = ReferenceSpec(
        model=resolve_model(config.reference.model) if config.reference.model else model,
        dtype=m.dtype,
        attention=m.attention,
        trust_remote_code=m.trust_remote_code,
        micro_batch_tokens=config.reference.micro_batch_tokens,
        logits_chunk_tokens=policy_settings(config, None).logits_chunk_tokens,
        temperature=config.rollout.temperature,
        threads=thread_count(config.cluster, c.gpus_per_reference_rank),
        share_prompts=config.policy.share_prompts,
    )
    environment = _environment(config, c.gpus_per_reference_rank)
    return [
        ActorRequest(f"reference-{i}", ReferenceWorker, (spec,), 1, c.gpus_per_reference_rank, environment)
        for i in range(c.reference_ranks)
    ]


def _environment(config: Config, gpus: float) -> dict[str, str]:
    return compute_environment(config, gpus) | training_environment(gpus, config.train.deterministic)


def _rank_requests(config: Config, role: str, cls: type, spec: Any, gpus: float) -> list[ActorRequest]:
    """Ranks that train together, as many as the policy has."""
    environment = _environment(config, gpus)
    if not joins(config):
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # a Ray of our own: all ranks are on this machine
    ranks = range(config.cluster.policy_ranks)
    return [ActorRequest(f"{role}-{i}", cls, (spec,), 1, gpus, environment) for i in ranks]


def _optimizer_steps(config: Config, without: int = 0) -> int:
    """Of all steps but the first `without`: what a schedule of the learning rate is laid over."""
    steps = max(config.train.steps - without, 1)
    return steps * config.algorithm.updates_per_batch * config.algorithm.epochs
