"""Turns what Hydra and omegaconf raise into one line: got, expected, nearest valid name.

Knows their exceptions by class and by `full_key`; where they only carry text, by the first line of it.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from apportion.conf.schema import Config
from apportion.platform.errors import ConfigError, nearest
from apportion.platform.messages import quoted, shortened

GROUPS = ("algorithm", "experiment", "lora")
_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list [a,b]",
    list[int]: "a list of integers [1,2]",
    list[str]: "a list [a,b]",
    dict: "a mapping {key: value}",
}


def config_keys(kind: type = Config, prefix: str = "") -> dict[str, str]:
    """Every dotted key of the configuration and, in words, what it takes.

    >>> config_keys()["train.steps"], config_keys()["cluster.threads"]
    ('an integer', 'an integer or null')
    """
    keys: dict[str, str] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if typing.get_origin(hint) is typing.ClassVar:
            continue
        nested = next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)
        keys[prefix + name] = words_of(hint)
        if nested is not None:
            keys.update(config_keys(typing.cast(type, nested), f"{prefix}{name}."))
    return keys


def words_of(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join("null" if part is type(None) else words_of(part) for part in arguments)
    if dataclasses.is_dataclass(hint):
        return "its keys, one by one (" + ", ".join(field.name for field in dataclasses.fields(hint)) + ")"
    return _WORDS.get(hint) or _WORDS.get(typing.get_origin(hint)) or "a value"


def unknown_key(key: str, siblings: Iterable[str] = (), kind: type = Config) -> ConfigError:
    """The error for a key that does not exist. `siblings` are the names beside it where its parent is free-form."""
    head, _, name = key.rpartition(".")
    names = list(siblings)
    if names:
        close = nearest(name, names)
        return ConfigError(f"{key}: got an unknown key, expected one of {', '.join(names)} under {head}{close}")
    keys = config_keys(kind)
    section = key.split(".")[0]
    inside = [known for known in keys if known.startswith(f"{section}.")] if section in keys else []
    groups = GROUPS if kind is Config else ("lora",)
    close = nearest(key, inside or [*keys, *groups])
    return ConfigError(
        f"{key}: got an unknown key, expected a key {f'of {section}' if inside else 'that exists'}{close}"
    )


def check_keys(config: DictConfig) -> None:
    """ConfigError for a key that Hydra's `+` added and the schema does not have (it would be dropped silently)."""
    kind = _kind(config)
    known = config_keys(kind)

    def walk(node: Any, prefix: str) -> None:
        for name in node:
            key = f"{prefix}{name}"
            if key not in known:
                raise unknown_key(key, kind=kind)
            child = node._get_node(name)
            if isinstance(child, DictConfig) and not child._is_none() and any(k.startswith(f"{key}.") for k in known):
                walk(child, f"{key}.")

    walk(config, "")


def missing_values(config: DictConfig) -> None:
    """ConfigError naming every mandatory value that was not given."""
    kind = _kind(config)
    order = list(config_keys(kind))
    missing = sorted(OmegaConf.missing_keys(config), key=lambda key: order.index(key) if key in order else len(order))
    if missing:
        first = missing[0]
        recipe = "choose a recipe (experiment=quickstart) or " if kind is Config else ""
        raise ConfigError(
            f"{', '.join(missing)}: got no value, expected {'one' if len(missing) == 1 else 'one each'}; "
            f"{recipe}give {first}=..."
        )


def _kind(config: DictConfig) -> type:
    """The dataclass of the schema that was composed."""
    return OmegaConf.get_type(config) or Config


def explain(error: Exception, kind: type = Config) -> ConfigError:
    """The one-line ConfigError for an exception of Hydra or omegaconf; `kind` is the schema's dataclass."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, MissingConfigException):
        return _missing_choice(error)
    if isinstance(error, OverrideParseException):
        return ConfigError(
            f"override: got {quoted(error.override)}, expected key=value "
            "(a value with spaces, commas, brackets or quotes in quotes of its own: key='\"a, b\"')"
        )
    own = isinstance(error, OmegaConfBaseException)
    cause = error if own else error.__cause__ or error.__context__ or error
    line = " ".join(str(error).split("\n")[0].split())
    in_quotes = line.split("'")
    differs = re.match(r"Could not delete from config\. The value of '(.*)' is (.*) and not (.*)\.$", line)
    if differs is not None:
        key, value, given = differs.groups()
        cure = f"{key}=VALUE: a key of the schema cannot be deleted" if key in config_keys(kind) else f"~{key} alone"
        return ConfigError(
            f"{key}: got ~{key}={shortened(given, 120)} where the value is {shortened(value, 120)}, expected {cure}"
        )
    if line.startswith(("Could not override '", "Could not delete from config. '")):
        if "delete" in line and in_quotes[1] in config_keys(kind):
            return ConfigError(
                f"{in_quotes[1]}: got a deletion, expected {in_quotes[1]}=VALUE: a key of the schema cannot be deleted"
            )
        full_key = str(getattr(cause, "full_key", "") or "")
        return unknown_key(full_key if full_key.startswith(in_quotes[1]) else in_quotes[1], _siblings(cause), kind)
    if line.startswith(("Ambiguous value for argument", "Sweep parameters")):
        key, _, value = in_quotes[1].partition("=")
        return ConfigError(
            f"{key}: got {quoted(value)}, expected one value; write {key}=[{shortened(value, 120)}] for a list, or sweep with -m"
        )
    if " looks like a config group override" in line:
        word = line.removeprefix("Override ").partition(" looks like")[0]
        key = word.partition("=")[0].lstrip("+~").partition("@")[0]
        return ConfigError(
            f"{shortened(key, 120)}: got {quoted(word)}, expected key=value: only a group of files takes @"
        )
    if line.startswith("force-add of config groups"):
        word = in_quotes[1].lstrip("+")
        return ConfigError(f"{word.partition('=')[0]}: got it with '++', expected {shortened(word, 120)} without '++'")
    if line.startswith("Could not delete '"):
        key = in_quotes[1].partition("=")[0]
        return ConfigError(f"{key}: got ~{shortened(in_quotes[1], 120)}, expected a group that was chosen by that name")
    if line.startswith("Additional config directory"):
        return ConfigError(f"--config-dir: got {in_quotes[1]!r}, which is not there, expected a folder")
    if line.startswith("Could not append to config."):
        return ConfigError(
            f"{in_quotes[1]}: got it with '+', expected {in_quotes[1]}=VALUE without '+': the key exists"
        )
    if line.endswith(" appears more than once in the final defaults list"):
        group = line.split()[0]
        return ConfigError(f"{group}: got it twice, expected {group}=NAME once")
    if line.startswith("Multiple values for "):
        group = line.removeprefix("Multiple values for ").split(".")[0].split()[0]
        return ConfigError(f"{group}: got it twice or with '+', expected {group}=NAME once, without '+'")
    explained = _from_omegaconf(cause, line, kind)
    return ConfigError(f"{_file_of(in_quotes[1])}: {explained}") if line.startswith("In '") else explained


def _file_of(name: str) -> str:
    """The file of a configuration's name. What a run has kept has another name here (saved.yaml)."""
    return "the run's config.yaml" if name == "saved_run" else f"{name}.yaml"


def _siblings(cause: BaseException) -> list[str]:
    """Names beside an unknown one, when its parent is a free-form mapping (an algorithm's component)."""
    parent = getattr(cause, "parent_node", None)
    if isinstance(parent, DictConfig) and OmegaConf.get_type(parent) is dict:
        return [str(name) for name in parent]
    return []


def _missing_choice(error: Any) -> ConfigError:
    """A group's option, or the whole configuration, that no file has."""
    wanted = str(error.missing_cfg_file)
    group, _, name = wanted.rpartition("/")
    options = [str(option) for option in error.options or ()]
    if not group:
        return ConfigError(f"--config-name: got {wanted!r}, expected the name of a file in --config-dir")
    if not options:
        return ConfigError(f"{group}: got an unknown group with {name!r}, expected one of {', '.join(GROUPS)}")
    return ConfigError(f"{group}: got {quoted(name)}, expected one of {', '.join(options)}{nearest(name, options)}")


def _from_omegaconf(cause: BaseException, line: str, kind: type) -> ConfigError:
    """A wrong type, an unknown key inside a recipe, a reference that leads nowhere."""
    from omegaconf.errors import (
        ConfigKeyError,
        InterpolationResolutionError,
        UnsupportedInterpolationType,
        ValidationError,
    )

    key = str(getattr(cause, "full_key", "") or "")
    text = " ".join(str(cause).split("\n")[0].split()) or line
    if isinstance(cause, (InterpolationResolutionError, UnsupportedInterpolationType)):
        return ConfigError(f"{key}: got a reference that leads nowhere ({text}), expected one that does")
    if isinstance(cause, (ConfigKeyError, AttributeError)) and key:
        return unknown_key(key, _siblings(cause), kind)
    if "Cannot merge DictConfig with ListConfig" in text:
        return ConfigError(f"{key}: got a mapping where the recipe has a list, expected {key}=[{{...}}]")
    if "does not support deletion" in text:
        return ConfigError(f"{key}: got a deletion, expected {key}=VALUE")
    if isinstance(cause, ValidationError) and key:
        key, _, element = key.partition("[")  # evaluation.k[0] is an element of evaluation.k
        expected = config_keys(kind).get(key)
        if expected is not None:
            value = getattr(cause, "value", None)
            got = "null" if value is None else quoted(value)
            return ConfigError(f"{key}: got {got}{' in the list' if element else ''}, expected {expected}")
    if key and key not in text:
        text = f"{key}: {text}"
    return ConfigError(text)
