"""Actors that sample, act, score, judge and credit."""

from __future__ import annotations

from apportion.actors.credit import CreditSpec, CreditWorker
from apportion.actors.engines import EngineSpec
from apportion.actors.environment import EnvironmentSpec, EnvironmentWorker
from apportion.actors.episodes import EpisodeLimits, EpisodeSpec
from apportion.actors.judge import JudgeWorker
from apportion.actors.reward import RewardWorker
from apportion.actors.rollout import RolloutSpec, RolloutWorker
from apportion.assembly.hosts import device_environment, engine_environment, joins, thread_count
from apportion.assembly.needs import Needs
from apportion.conf.defaults import rollout_settings
from apportion.conf.judges import judge_spec, own_model
from apportion.conf.models import read_limits
from apportion.conf.parts import kl_level
from apportion.conf.schema import Config
from apportion.data.prompts import TokenizerPath
from apportion.platform.cluster import ActorRequest
from apportion.platform.runs import RunFolder


def serving_requests(
    config: Config, model: str, needs: Needs | None = None, step: int = 0
) -> dict[str, list[ActorRequest]]:
    """Rollout engines, reward workers and the credit worker, of a run that goes on after `step`."""
    reward, c = config.reward, config.cluster
    gpus = c.gpus_per_rollout_engine
    environment = engine_environment(config, gpus, alone=c.rollout_engines == 1)
    if not joins(config):
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # a Ray of our own: whoever they speak to is on this machine
    rollouts = [
        ActorRequest(f"rollout-{i}", RolloutWorker, (rollout_spec(config, model, i, step), f"rollout-{i}"), 1, gpus,
                     environment)
        for i in range(c.rollout_engines)
    ]  # fmt: skip
    tokenizer = TokenizerPath(model, config.model.trust_remote_code)
    limits = (reward.step_delimiter, reward.outage_seconds)
    arguments = (reward.functions, reward.timeout_seconds, reward.clip, tokenizer, *limits)
    rewards = [
        ActorRequest(f"reward-{i}", RewardWorker, arguments, 0, c.gpus_per_reward_worker,
                     device_environment(c.gpus_per_reward_worker))
        for i in range(reward.workers)
    ]  # fmt: skip
    credit_arguments = (_credit_spec(config, model, needs),)
    credit = ActorRequest("credit-0", CreditWorker, credit_arguments, environment=device_environment(0))
    environments = _environment_requests(config)
    return {"rollout": rollouts, "reward": rewards, "credit": [credit], "environment": environments}


def _environment_requests(config: Config) -> list[ActorRequest]:
    e = config.environment
    if e.cls is None:
        return []
    spec = EnvironmentSpec(e.cls, dict(e.params), e.step_timeout_seconds, e.threads)
    return [
        ActorRequest(f"environment-{i}", EnvironmentWorker, (spec,), environment=device_environment(0))
        for i in range(e.workers)
    ]


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
        tools_column=d.tools_column,
        vocabulary=read_limits(m.path).vocabulary,
    )


def rollout_spec(config: Config, model: str, index: int, step: int = 0) -> RolloutSpec:
    r = config.rollout
    settled = rollout_settings(r, config.cluster.gpus_per_rollout_engine)
    # vLLM's own stream of random numbers is in no checkpoint: a resumed run begins another, not the first steps' again.
    seed = (config.seed + index + 1009 * step) % 2**32
    threads = thread_count(config.cluster, config.cluster.gpus_per_rollout_engine)
    longest = config.data.max_prompt_tokens + max(r.max_response_tokens, config.evaluation.max_response_tokens or 0)
    spec = EngineSpec(
        model=model,
        dtype=config.model.dtype,
        seed=seed,
        max_model_len=longest,
        max_sequences=settled.max_sequences,
        tensor_parallel_size=r.tensor_parallel_size,
        gpu_memory_utilization=settled.gpu_memory_utilization,
        kv_cache_gib=r.kv_cache_gib,
        compile=settled.compile,
        prefix_caching=r.prefix_caching,
        trust_remote_code=config.model.trust_remote_code,
        threads=threads,
        first_thread=0,
        seeded=config.train.deterministic,
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
        trust_remote_code=config.model.trust_remote_code,
        continues=config.environment.cls is not None,
        kl_level=kl_level(a.credit, a.surrogate),
    )


def judge_requests(config: Config, model: str, folder: RunFolder) -> list[ActorRequest]:
    cpus = float(own_model(config.judge) is not None)
    gpus = config.cluster.gpus_per_judge
    spec = judge_spec(config, model, folder.path, thread_count(config.cluster, gpus))
    environment = engine_environment(config, gpus, alone=False)
    return [
        ActorRequest(f"judge-{i}", JudgeWorker, (spec,), cpus, gpus, environment) for i in range(config.judge.workers)
    ]
