"""Refuses an environment that cannot be made or played, before anything starts."""

from __future__ import annotations

import importlib.util
import inspect

from apportion.conf.schema import Config
from apportion.data.environment_adapters import is_path
from apportion.data.environments import load_environment
from apportion.data.errors import DataError
from apportion.platform.errors import ConfigError, nearest

LIBRARIES = ("gymnasium", "textarena")  # built-in adapters, named like what they need


def check_environment(config: Config, joined: bool = False) -> None:
    """ConfigError for a class that is not there, parameters it does not take, or turns that cannot fit."""
    environment = config.environment
    if environment.cls is None:
        if config.reward.functions is None:
            raise ConfigError("reward.functions: got null, expected at least one, or environment.cls=NAME")
        if environment.params:
            raise ConfigError("environment.params: got values with environment.cls=null, expected environment.cls=NAME")
        return
    try:
        cls = load_environment(environment.cls)
    except DataError as error:
        said = str(error)
        raise ConfigError(said if said.startswith("environment.cls: ") else f"environment.cls: {said}") from None
    except Exception as error:
        got = f"{environment.cls} cannot be imported ({type(error).__name__}: {error})"
        raise ConfigError(f"environment.cls: {got}, expected a class that can") from error
    _check_params(environment.cls, cls, environment.params)
    if not joined:  # on a cluster the environments' nodes have it, or not
        _check_installed(environment.cls, environment.params)
    tokens, response = environment.max_turn_tokens, config.rollout.max_response_tokens
    if tokens is not None and tokens > response:
        raise ConfigError(
            f"environment.max_turn_tokens: got {tokens} with rollout.max_response_tokens={response}, which bounds a "
            f"whole episode, expected at most {response}"
        )


def _check_params(name: str, cls: type, params: dict) -> None:
    signature = inspect.signature(cls)
    known = list(signature.parameters)
    try:
        signature.bind(**params)
    except TypeError as error:
        wrong = next((key for key in params if key not in known), None)
        hint = nearest(wrong, known) if wrong is not None else ""
        raise ConfigError(
            f"environment.params: {name}: {error}, expected {', '.join(known) or 'no parameters'}{hint}"
        ) from None


def _check_installed(name: str, params: dict) -> None:
    """Before actors start, since these libraries are imported only where an episode begins."""
    own_class = name == "gymnasium" and is_path(str(params["id"]))  # has Gymnasium's API, and may do without it
    if name in LIBRARIES and not own_class and importlib.util.find_spec(name) is None:
        raise ConfigError(f"environment.cls: got {name}, which is not installed, expected it to be; pip install {name}")
