"""Models beside the policy that read its sequences, critic, reference and teachers: they must fit what they are given."""

from __future__ import annotations

from pathlib import Path

from apportion.actors.reward_sources import parse_entries
from apportion.conf.models import ModelLimits, check_own_tokenizer, read_limits
from apportion.conf.schema import Config
from apportion.platform.errors import ConfigError


def check_companions(config: Config, needs: frozenset[str]) -> None:
    """ConfigError where a critic or reference of its own could not read the longest sequence or every token."""
    given = {
        "critic.model": config.critic.model if "values" in needs else None,
        "reference.model": config.reference.model if "reference_logprobs" in needs else None,
    }
    own = read_limits(config.model.path)
    for key, path in given.items():
        if path is None:
            continue
        limits = read_limits(path, key)
        check_context(config, key, path, limits)
        if own.vocabulary is not None and limits.vocabulary is not None and limits.vocabulary < own.vocabulary:
            raise ConfigError(
                f"{key}: got {path} with {limits.vocabulary} tokens, expected at least the {own.vocabulary} of "
                f"{config.model.path}, with the same tokenizer: it reads the policy's token ids"
            )


def check_reward_models(config: Config) -> None:
    """ConfigError for a reward model on this machine whose files cannot be used. One that a stage of `before` makes is not
    here yet."""
    for entry in parse_entries(config.reward.functions, config.reward.timeout_seconds):
        kind, _, path = str(entry.function).partition(":")
        if kind == "model" and Path(path).expanduser().is_dir():
            check_own_tokenizer(path, f"reward.functions model:{path}")


def check_context(config: Config, key: str, path: str, limits: ModelLimits) -> None:
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    if limits.context is not None and prompt + response > limits.context:
        raise ConfigError(
            f"{key}: got {path} with a context of {limits.context} tokens, expected at least {prompt + response} = "
            f"data.max_prompt_tokens={prompt} + rollout.max_response_tokens={response}, or shorter responses"
        )
