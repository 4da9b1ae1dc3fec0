"""What a configuration would import, run, contact or write to beyond the built-in parts.

A configuration that comes from a run's folder is data: whoever made the folder chose these values. `uses` finds all of
them without importing anything that they name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from apportion.algorithms.registry import KINDS
from apportion.data.builtin import PREFIX
from apportion.data.environment_adapters import is_path
from apportion.data.environments import ENVIRONMENTS
from apportion.data.verifiers import VERIFIERS

# What a configuration may name of this package: the arguments are data. Other functions of it run what they are given.
SHIPPED = frozenset(
    (
        *(f"{check.__module__}.{check.__name__}" for name, check in VERIFIERS.items() if name != "gym"),
        "apportion.data.environments.Microwave",
        "apportion.data.environments.microwave_rows",
        "apportion.data.environments.numbered_rows",
        "apportion.data.pairs.prompts_of",
        "apportion.data.step_sums.judge",
        "apportion.data.step_sums.rows",
        "apportion.data.sum_pairs.pairs",
    )
)
# As parts of an algorithm alone, whose arguments are looked at: some make another part, or a parser, of what they are given.
_SHIPPED_PARTS = frozenset(path.replace(":", ".") for known in KINDS.values() for path in known.values())
_ADDRESS = ("http://", "https://")
_PLAIN = re.compile(r"[\w-]*")
_MODELS = (
    ("model", "path"),
    ("critic", "model"),
    ("reference", "model"),
    ("teachers", "dpo"),
    ("teachers", "other"),
    ("judge", "model"),
    ("dpo", "reference"),
)
_PARTS = (
    *(("algorithm", kind) for kind in ("credit", "surrogate", "reduction", "shaping", "selection", "distillation")),
    ("sft", "reduction"),
)


@dataclass(frozen=True)
class Use:
    """One value of a configuration, and what a command would do with it."""

    key: str  # dotted
    value: str
    what: str  # a verb: "calls", "sends data to"

    def typed(self, words: list[str]) -> bool:
        """Whether the words of the command line say it themselves, so that it does not come from a folder."""
        return any(self._typed(*word.partition("=")[::2]) for word in words)

    def _typed(self, key: str, text: str) -> bool:
        key = key.lstrip("+")  # `~key` removes a value: it says none
        if key == self.key:
            return "${" not in text  # a reference takes a value of the folder
        # A mapping or list on the command line may be merged with the folder's, so the value itself has to be in it.
        name = self.key.rpartition(".")[2]
        return self.key.startswith(f"{key}.") and self.value in text and (name.isdecimal() or name in text)


def uses(config: Mapping[str, Any], before: bool = False) -> Iterator[Use]:
    """Everything of the kind in a composed configuration, of training or of a preference stage. `before`: its stages are
    run, too."""
    for split in ("train", "eval"):
        yield from _sources(f"data.{split}", _at(config, "data", split))
    yield from _rewards(_at(config, "reward", "functions"))
    yield from _environment(_at(config, "environment", "cls"), _at(config, "environment", "params"))
    if _at(config, "model", "trust_remote_code"):
        yield Use("model.trust_remote_code", "true", "runs the code of model folders:")
        yield from _models_with_code(config)
    for section, kind in _PARTS:
        yield from _parts(f"{section}.{kind}", _at(config, section, kind))
    yield from _judge(config.get("judge"))
    if address := _at(config, "cluster", "address"):
        yield Use("cluster.address", str(address), "runs on the Ray cluster")
    if _at(config, "tracking", "wandb") == "online":
        yield Use("tracking.wandb", "online", "sends metrics, samples and the configuration to wandb")
        if entity := _at(config, "tracking", "wandb_entity"):
            yield Use("tracking.wandb_entity", str(entity), "sends them to the account")
    for index, line in enumerate(config.get("before") or () if before else ()):
        yield Use(f"before.{index}", str(line), "runs apportion")


def _models_with_code(config: Mapping[str, Any]) -> Iterator[Use]:
    """Whoever allows code on the command line does not mean that of models which the folder chose."""
    for section, name in _MODELS:
        path = _at(config, section, name)
        if path is not None and not str(path).startswith(PREFIX):
            yield Use(f"{section}.{name}", str(path), "runs the code of the model")


def _at(config: Mapping[str, Any], section: str, name: str) -> Any:
    inside = config.get(section)
    return inside.get(name) if isinstance(inside, Mapping) else None


def _entries(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(key, entry) of one entry or of a list of them."""
    if isinstance(value, list):
        yield from ((f"{key}.{index}", entry) for index, entry in enumerate(value))
    elif value is not None:
        yield key, value


def _sources(key: str, value: Any) -> Iterator[Use]:
    for at, entry in _entries(key, value):
        where, source = (f"{at}.source", entry.get("source")) if isinstance(entry, Mapping) else (at, entry)
        kind, _, name = str(source).partition(":")
        if kind == "function":
            yield from _call(where, name, str(source))


def _call(key: str, name: str, value: str | None = None) -> Iterator[Use]:
    if name.replace(":", ".") not in SHIPPED:
        yield Use(key, name if value is None else value, "imports and calls")


def _rewards(value: Any) -> Iterator[Use]:
    for at, entry in _entries("reward.functions", value):
        if not isinstance(entry, Mapping):
            yield from _reward(at, entry)
            continue
        yield from _reward(f"{at}.function", entry.get("function"))
        for where, url in _entries(f"{at}.urls", entry.get("urls")):
            yield Use(where, str(url), "sends prompts and responses to")
        if entry.get("auth_env") is not None:
            yield Use(f"{at}.auth_env", str(entry["auth_env"]), "sends the environment variable")
        params = entry.get("params")
        if isinstance(params, Mapping) and params.get("trust_remote_code"):
            yield Use(f"{at}.params.trust_remote_code", "true", "runs the code of the model folder:")
            yield Use(f"{at}.function", str(entry.get("function")), "runs the code of")


def _reward(key: str, function: Any) -> Iterator[Use]:
    if not isinstance(function, str):  # none, or nothing that a configuration can mean: the check of rewards says so
        return
    if function.startswith(_ADDRESS):
        yield Use(key, function, "sends prompts and responses to")
    elif function == "gym":  # reasoning-gym calls `eval` on the answers of some of its tasks
        yield Use(key, function, "evaluates answers as Python with")
    elif function not in VERIFIERS and not function.startswith("model:"):
        yield from _call(key, function)


def _environment(cls: Any, params: Any) -> Iterator[Use]:
    if cls is None:
        return
    if cls not in ENVIRONMENTS:
        yield from _call("environment.cls", str(cls))
        return
    for name, value in params.items() if isinstance(params, Mapping) else ():
        for key, leaf in _texts(f"environment.params.{name}", value):
            named = {"id": is_path(leaf), "observe": leaf != "render", "opponent": True}
            # An installed environment may import what an argument of its own names.
            if named.get(name, name == "make" and not _PLAIN.fullmatch(leaf)):
                yield Use(key, leaf, "imports and calls")


def _parts(key: str, value: Any) -> Iterator[Use]:
    """Parts of an algorithm at any depth: a part may wrap another, or name a parser."""
    plugins = None
    for at, text in _texts(key, value):
        if at.rpartition(".")[2] == "name" and plugins is None:
            plugins = {point.name for kind in KINDS for point in entry_points(group=f"apportion.{kind}")}
            plugins -= {name for known in KINDS.values() for name in known}
        if "." in text or ":" in text:
            if text.replace(":", ".") not in _SHIPPED_PARTS:
                yield from _call(at, text)
        elif at.rpartition(".")[2] == "name" and text in (plugins or ()):
            yield Use(at, text, "imports and calls")


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(f"{key}.{name}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(f"{key}.{index}", inner)
    elif isinstance(value, str):
        yield key, value


def _judge(judge: Any) -> Iterator[Use]:
    if not isinstance(judge, Mapping):
        return
    if judge.get("function") is not None:
        yield from _call("judge.function", str(judge["function"]))
    for key, url in _entries("judge.url", judge.get("url")):
        yield Use(key, str(url), "sends prompts and responses to")
    if judge.get("api_key_env") is not None:
        yield Use("judge.api_key_env", str(judge["api_key_env"]), "sends the environment variable")
    if judge.get("cache_folder") is not None:
        yield Use("judge.cache_folder", str(judge["cache_folder"]), "writes to the folder")
