"""Refuses values that are each sound and together cannot run. Each check says got, expected and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from apportion.conf.checks import check_warmup
from apportion.conf.devices import check_devices, check_heads
from apportion.conf.machine import Machine
from apportion.conf.models import (
    VALUE_BYTES,
    ModelFacts,
    check_own_tokenizer,
    check_targets,
    read_limits,
    read_model,
)
from apportion.conf.parts import drops_lone_responses, group_relative, pooled_unit, units_of_one_advantage
from apportion.conf.schema import AlgorithmConfig, Config
from apportion.platform.errors import ConfigError

MOST_TRAJECTORIES = 10_000_000  # of one step


def longest_sampled(config: Config) -> int:
    """Tokens of the longest sequence that an engine is asked for, evaluation's included."""
    evaluated = config.evaluation.max_response_tokens or 0
    return config.data.max_prompt_tokens + max(config.rollout.max_response_tokens, evaluated)


def check_combinations(
    config: Config, needs: frozenset[str], model: ModelFacts | None, machine: Machine | None, gpus: Sequence[float]
) -> None:
    """ConfigError for the first combination that cannot run. `machine` is None where the cluster is not this machine;
    `gpus` is what each actor asks for."""
    _check_batches(config)
    _check_warmup(config, needs)
    _check_lengths(config, needs)
    _check_algorithm(config, needs)
    _check_rollout(config, model)
    if config.policy.lora is not None:
        check_targets(config.policy.lora.targets, config.model.path)
    check_devices(config, needs, machine, gpus)
    check_heads("rollout", config.rollout.tensor_parallel_size, model)
    _check_evaluation(config)
    alone, steps = config.critic.warmup_steps_without_policy, config.train.steps
    if "values" in needs and alone and alone >= steps:
        raise ConfigError(
            f"critic.warmup_steps_without_policy: got {alone} with train.steps={steps}, expected fewer: the policy would "
            "never be trained"
        )


def check_evaluation(config: Config, path: str) -> None:
    """Those of these checks that measuring the model at `path` needs, without a run around it."""
    check_own_tokenizer(path, "checkpoint", config.model.chat_template)
    _check_context(config, path)
    model = read_model(path)
    check_heads("rollout", config.rollout.tensor_parallel_size, model)
    _check_cache(config, model)
    _check_evaluation(config)


def _check_batches(config: Config) -> None:
    prompts, updates, ranks = (
        config.train.prompts_per_step,
        config.algorithm.updates_per_batch,
        config.cluster.policy_ranks,
    )
    if prompts % updates:
        below, above = prompts // updates * updates, (prompts // updates + 1) * updates
        options = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"train.prompts_per_step: got {prompts} with algorithm.updates_per_batch={updates}, "
            f"expected a multiple of {updates} such as {options}, so that every optimiser step has whole groups"
        )
    responses = config.rollout.responses_per_prompt
    if prompts * responses > MOST_TRAJECTORIES:
        raise ConfigError(
            f"train.prompts_per_step: got {prompts} with rollout.responses_per_prompt={responses}, "
            f"{prompts * responses:,} trajectories a step, expected at most {MOST_TRAJECTORIES:,}; lower one of the two"
        )
    rows = prompts // updates * responses
    if rows < ranks:
        raise ConfigError(
            f"train.prompts_per_step: got {prompts}, which gives {rows} trajectories an optimiser step for "
            f"cluster.policy_ranks={ranks}, expected at least {ceil(ranks / responses) * updates}, or fewer ranks"
        )


def _check_warmup(config: Config, needs: frozenset[str]) -> None:
    steps = config.train.steps * config.algorithm.updates_per_batch * config.algorithm.epochs
    for section in ("policy", "critic") if "values" in needs else ("policy",):
        check_warmup(section, getattr(config, section).warmup_steps, steps)


def _check_lengths(config: Config, needs: frozenset[str]) -> None:
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    longest = prompt + response
    sum_text = f"data.max_prompt_tokens={prompt} + rollout.max_response_tokens={response}"
    limits = {"policy": config.policy.micro_batch_tokens}
    if "values" in needs:
        limits["critic"] = config.critic.micro_batch_tokens
    if "reference_logprobs" in needs:
        limits["reference"] = config.reference.micro_batch_tokens
    for section, limit in limits.items():
        if limit < longest:
            raise ConfigError(
                f"{section}.micro_batch_tokens: got {limit}, expected at least {longest} = {sum_text}, "
                "the longest sequence"
            )
    _check_context(config, config.model.path)


def _check_context(config: Config, path: str) -> None:
    context = read_limits(path).context
    if context is None:
        return
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    if prompt + response > context:
        raise ConfigError(
            f"rollout.max_response_tokens: got data.max_prompt_tokens={prompt} + rollout.max_response_tokens={response} = "
            f"{prompt + response}, expected at most {context}, the model's context; shorten prompts or responses"
        )
    evaluated = config.evaluation.max_response_tokens
    if evaluated is not None and prompt + evaluated > context:
        raise ConfigError(
            f"evaluation.max_response_tokens: got {evaluated} and data.max_prompt_tokens={prompt}, "
            f"expected at most {context} together, the model's context"
        )


def _check_algorithm(config: Config, needs: frozenset[str]) -> None:
    algorithm, responses = config.algorithm, config.rollout.responses_per_prompt
    if responses == 1 and group_relative(algorithm):
        raise ConfigError(
            f"rollout.responses_per_prompt: got 1 with credit {algorithm.credit['name']}, which compares the responses "
            "to a prompt, expected at least 2 (or algorithm=reinforce_pp or ppo)"
        )
    lone = [part["name"] for part in algorithm.selection if drops_lone_responses(part, "critiques" in needs)]
    if responses == 1 and lone:
        raise ConfigError(
            f"rollout.responses_per_prompt: got 1 with selection {lone[0]}, which keeps responses to a prompt only where "
            "their rewards differ, expected at least 2, or algorithm.selection without it"
        )
    _check_surrogate(algorithm)
    if algorithm.kl.place == "none" and algorithm.kl.coefficient > 0:
        raise ConfigError(
            f"algorithm.kl.coefficient: got {algorithm.kl.coefficient} with algorithm.kl.place=none, "
            "expected place=reward or place=loss, or a coefficient of 0"
        )


def _check_surrogate(algorithm: AlgorithmConfig) -> None:
    """One ratio for many tokens has the gradient of their mean advantage: what credit says of each of them is lost."""
    pooled = None if algorithm.surrogate is None else pooled_unit(algorithm.surrogate)
    units = units_of_one_advantage(algorithm.credit)
    if pooled is None or units is None:
        return
    unit, parameters = pooled
    wide_enough = {"macro": {"macro"}, "turn": {"turn", "response"}, "response": {"response"}}[unit]
    if units & wide_enough:
        return
    key, value = next(iter(parameters.items()))
    why = f"whose advantages differ within a {unit}"
    if unit == "macro":
        why = "which gives no macro actions with one advantage each"
    raise ConfigError(
        f"algorithm.surrogate.{key}: got {value} with credit {algorithm.credit['name']}, {why}, expected {key}=token"
    )


def _check_rollout(config: Config, model: ModelFacts | None) -> None:
    parallel, gpus = config.rollout.tensor_parallel_size, config.cluster.gpus_per_rollout_engine
    if parallel > 1 and config.rollout.engine != "vllm":
        raise ConfigError(
            f"rollout.tensor_parallel_size: got {parallel} with rollout.engine={config.rollout.engine}, "
            "expected 1, or rollout.engine=vllm"
        )
    if parallel > 1 and 0 < gpus < parallel:
        raise ConfigError(
            f"cluster.gpus_per_rollout_engine: got {gpus:g} with rollout.tensor_parallel_size={parallel}, "
            f"expected {parallel}, a GPU for each part, or 0 for parts on the CPU"
        )
    prompts, engines = config.train.prompts_per_step, config.cluster.rollout_engines
    if engines > prompts:
        raise ConfigError(
            f"cluster.rollout_engines: got {engines} for train.prompts_per_step={prompts}, "
            f"expected at most {prompts}: the responses to a prompt are sampled on one engine"
        )
    _check_cache(config, model)


def _check_cache(config: Config, model: ModelFacts | None) -> None:
    if model is None or config.cluster.gpus_per_rollout_engine > 0 or config.rollout.engine != "vllm":
        return
    longest = longest_sampled(config)
    needed = longest * model.kv_bytes_per_token(VALUE_BYTES[config.model.dtype]) / 2**30
    if max(1, round(config.rollout.kv_cache_gib)) < needed:
        raise ConfigError(
            f"rollout.kv_cache_gib: got {config.rollout.kv_cache_gib:g}, "
            f"expected at least {ceil(needed)} for one sequence of {longest} tokens"
        )


def _check_evaluation(config: Config) -> None:
    evaluation = config.evaluation
    if config.data.eval is None:
        if evaluation.every_steps:
            raise ConfigError(
                f"evaluation.every_steps: got {evaluation.every_steps} with data.eval=null, "
                "expected data.eval=SOURCE, or every_steps=0"
            )
        return
    if not evaluation.greedy and evaluation.samples == 0:
        raise ConfigError(
            "evaluation.samples: got 0 with evaluation.greedy=false, expected at least 1, or greedy=true, "
            "or data.eval=null for no evaluation"
        )
