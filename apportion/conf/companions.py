"""Models beside the policy that read its sequences, the critic and the reference: they must fit what they are given."""

from __future__ import annotations

from apportion.conf.models import ModelFacts, read_model
from apportion.conf.schema import Config
from apportion.platform.errors import ConfigError


def check_companions(config: Config, needs: frozenset[str], model: ModelFacts | None) -> None:
    """ConfigError where a critic or reference of its own could not read the longest sequence or every token."""
    given = {
        "critic.model": config.critic.model if "values" in needs else None,
        "reference.model": config.reference.model if "reference_logprobs" in needs else None,
    }
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    for key, path in given.items():
        facts = None if path is None else read_model(path, key)
        if facts is None:
            continue
        if facts.context is not None and prompt + response > facts.context:
            raise ConfigError(
                f"{key}: got {path} with a context of {facts.context} tokens, expected at least {prompt + response} = "
                f"data.max_prompt_tokens={prompt} + rollout.max_response_tokens={response}, or shorter responses"
            )
        if model is not None and facts.vocabulary < model.vocabulary:
            raise ConfigError(
                f"{key}: got {path} with {facts.vocabulary} tokens, expected at least the {model.vocabulary} of "
                f"{config.model.path}, with the same tokenizer: it reads the policy's token ids"
            )
