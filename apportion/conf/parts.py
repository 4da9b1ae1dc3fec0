"""Checks an algorithm's parts before anything starts, and says which signals its credit needs.

The parts live in modules that import torch, which alone takes longer than a plan should. So a part written as in the
shipped recipe of its algorithm is known to be good (a test builds each), and `needs` is read from the source of its
class; any other part is built for real.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from apportion.algorithms.registry import KINDS, build, resolve
from apportion.conf.schema import AlgorithmConfig
from apportion.platform.errors import ConfigError

_ABSENT = object()


def check_parts(algorithm: AlgorithmConfig) -> frozenset[str]:
    """The signals that credit and KL need (of the interface's SIGNALS); ConfigError for a part that cannot be."""
    shipped = _shipped(algorithm.name)
    for kind, spec in parts_of(algorithm):
        if not isinstance(spec, Mapping):
            raise ConfigError(f"algorithm.{kind}: got {spec!r}, expected a mapping with a name and its parameters")
        if not any(_same(spec, known) for known in shipped[kind]):
            _built(kind, spec)
    needs = _declared("credit", algorithm.credit, "needs")
    if not isinstance(needs, frozenset) or algorithm.credit["name"] not in KINDS["credit"]:
        needs = frozenset(_built("credit", algorithm.credit).needs)  # a wrapped method adds its own
    return needs | ({"reference_logprobs"} if algorithm.kl.place != "none" else frozenset())


def parts_of(algorithm: AlgorithmConfig) -> list[tuple[str, Any]]:
    """Every part as (kind, spec)."""
    single = [("credit", algorithm.credit), ("reduction", algorithm.reduction)]
    for kind in ("surrogate", "distillation"):
        if getattr(algorithm, kind) is not None:
            single.append((kind, getattr(algorithm, kind)))
    return single + [("shaping", s) for s in algorithm.shaping] + [("selection", s) for s in algorithm.selection]


def group_relative(algorithm: AlgorithmConfig) -> bool:
    """Whether the credit, or what it wraps, learns only from how the responses to one prompt differ."""
    return _group_relative(algorithm.credit)


def _group_relative(credit: Mapping[str, Any]) -> bool:
    conditions = _declared("credit", credit, "group_relative_with")
    if conditions is _ABSENT:
        return any(_group_relative(part) for part in _wrapped(credit))
    return _holds("credit", credit, conditions)


def drops_lone_responses(selection: Mapping[str, Any], judged: bool) -> bool:
    """Whether the selection never keeps the only response to a prompt. `judged`: responses have a judge's vote."""
    declared = _declared("selection", selection, "needs_groups")
    if declared is _ABSENT:
        return False
    return any(
        _holds("selection", selection, conditions)
        for when, conditions in declared.items()
        if when == "always" or not judged
    )


def units_of_one_advantage(credit: Mapping[str, Any]) -> frozenset[str] | None:
    """What the tokens of which have one advantage: some of macro (its own segments), turn and response. Empty where it
    differs from token to token; None for a method of one's own that does not say."""
    declared = _declared("credit", credit, "one_advantage_per")
    inner = [units_of_one_advantage(part) for part in _wrapped(credit)]
    if declared is _ABSENT:
        known = [units for units in inner if units is not None]
        return frozenset().union(*known) if known else None
    if not declared:
        return frozenset()  # whatever it wraps
    own = {unit for unit, conditions in declared.items() if _holds("credit", credit, conditions)}
    return frozenset(own).union(*(units or () for units in inner))


def pooled_unit(surrogate: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The unit whose tokens share one differentiated ratio, and the parameters that say so; None for tokens alone."""
    declared = _declared("surrogate", surrogate, "pools")
    if declared is _ABSENT:
        return None
    return next(((unit, c) for unit, c in declared.items() if _holds("surrogate", surrogate, c)), None)


def kl_level(credit: Mapping[str, Any], surrogate: Mapping[str, Any] | None) -> str:
    """Where a KL in the reward belongs: on each `token`, or in the outcome of the `response`.

    One differentiated ratio for a turn or a response has the gradient of the mean advantage over its tokens, so KL
    returns that differ within it are wrong. Credit that gives one advantage a response (or does not say) adds such
    returns; credit of turns and macro actions sums the KL over each of its units by itself.
    """
    pooled = None if surrogate is None else pooled_unit(surrogate)
    if pooled is None or pooled[0] == "macro":
        return "token"
    units = units_of_one_advantage(credit)
    return "response" if units is None or "response" in units else "token"


def _wrapped(credit: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The credit methods among a credit's parameters."""
    return [part for part in credit.values() if isinstance(part, Mapping) and "name" in part and _is_credit(part)]


def _is_credit(part: Mapping[str, Any]) -> bool:
    """A rule for macro actions has a name too."""
    if part["name"] in KINDS["credit"]:
        return True
    try:
        resolve("credit", part["name"])
    except ValueError:
        return False
    return True


def _holds(kind: str, spec: Mapping[str, Any], conditions: Mapping[str, Any]) -> bool:
    """Whether the part's parameters, as given or by default, are those; a mapping with a name stands for the name."""
    for key, expected in conditions.items():
        value = spec[key] if key in spec else _declared(kind, spec, key)
        if isinstance(value, Mapping):
            value = value.get("name")
        if value is _ABSENT or value != expected:
            return False
    return True


def _built(kind: str, spec: Mapping[str, Any]) -> Any:
    try:
        return build(kind, spec)
    except ValueError as error:
        raise ConfigError(f"algorithm.{error}") from error


@cache
def _shipped(name: str) -> dict[str, list[dict[str, Any]]]:
    """The parts of the recipe of that name, by kind; none for a recipe of one's own."""
    import yaml

    file = Path(__file__).parent / "algorithm" / f"{name}.yaml"
    known: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    if file.is_file():
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
        for kind in KINDS.keys() & {part for part, spec in recipe.items() if spec is not None}:
            known[kind] = recipe[kind] if isinstance(recipe[kind], list) else [recipe[kind]]
    return known


def _same(spec: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Equal, where a reference (`${...}`) of the recipe stands for the positive number it resolves to."""
    if spec.keys() != known.keys():
        return False
    for key, value in known.items():
        if isinstance(value, str) and value.startswith("${"):
            if type(spec[key]) is not int or spec[key] < 1:
                return False
        elif spec[key] != value or type(spec[key]) is not type(value):
            return False
    return True


def _declared(kind: str, spec: Mapping[str, Any], name: str) -> Any:
    """A class variable or default of the part's class: read from its source where it is one of ours, from the class
    where not; `_ABSENT` where there is none, or none that is a literal."""
    path = KINDS[kind].get(str(spec["name"]))
    if path is None:
        return getattr(resolve(kind, spec["name"]), name, _ABSENT)
    module, _, class_name = path.partition(":")
    file = Path(__file__).parents[2] / (module.replace(".", "/") + ".py")
    if not file.is_file():
        return _ABSENT
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return _literal(node, name)
    return _ABSENT


def _literal(node: ast.ClassDef, name: str) -> Any:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id == name:
            value = line.value
            wrapped = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "frozenset"
            try:
                if isinstance(value, ast.Call):
                    return frozenset(ast.literal_eval(value.args[0]) if value.args else ()) if wrapped else _ABSENT
                return _ABSENT if value is None else ast.literal_eval(value)
            except ValueError:
                return _ABSENT
    return _ABSENT
