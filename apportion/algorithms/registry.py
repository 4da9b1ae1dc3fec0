"""Every part by name, and the one place that turns `{"name": ..., parameters}` of a configuration into a part.

A name is one of these dicts, a dotted path of one's own (`my_pkg.my_mod:MyCredit`, `my_pkg.my_mod.MyCredit`), or an
entry point of the group `apportion.<kind>`. Nothing registers itself and nothing is imported before it is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib.metadata import entry_points
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_HERE = "apportion.algorithms"

CREDIT = {
    "gae": f"{_HERE}.credit.gae:Gae",
    "grpo": f"{_HERE}.credit.grpo:Grpo",
    "rloo": f"{_HERE}.credit.rloo:Rloo",
    "reinforce_pp": f"{_HERE}.credit.reinforce_pp:ReinforcePlusPlus",
    "macro_actions": f"{_HERE}.credit.macro_actions:MacroActions",
    "poad": f"{_HERE}.credit.poad:Poad",
    "capo": f"{_HERE}.credit.capo:Capo",
    "hidden_reward": f"{_HERE}.credit.hidden_reward:HiddenReward",
    "none": f"{_HERE}.credit.none:NoCredit",
}
SURROGATES = {
    "ppo_clip": f"{_HERE}.surrogates:PpoClip",
    "gspo": f"{_HERE}.surrogates:Gspo",
    "cispo": f"{_HERE}.surrogates:Cispo",
    "reinforce": f"{_HERE}.surrogates:Reinforce",
}
REDUCTIONS = {
    "token_mean": f"{_HERE}.reductions:TokenMean",
    "sequence_mean": f"{_HERE}.reductions:SequenceMean",
    "sequence_sum": f"{_HERE}.reductions:SequenceSum",
    "constant": f"{_HERE}.reductions:ConstantNorm",
}
SHAPING = {
    "overlong": f"{_HERE}.shaping:OverlongPenalty",
    "length": f"{_HERE}.shaping:LengthPenalty",
    "clip": f"{_HERE}.shaping:RewardClip",
}
DISTILLATION = {
    "aligndistil": f"{_HERE}.distillation:AlignDistil",
}
SELECTION = {
    "dynamic_sampling": f"{_HERE}.selection:DynamicSampling",
    "drop_truncated": f"{_HERE}.selection:DropTruncated",
}
KINDS = {
    "credit": CREDIT,
    "surrogate": SURROGATES,
    "reduction": REDUCTIONS,
    "shaping": SHAPING,
    "selection": SELECTION,
    "distillation": DISTILLATION,
}


def build(kind: str, spec: Mapping[str, Any]) -> Any:
    """The part of `kind` (a key of KINDS) that `spec` names, made with the rest of `spec` as its parameters.

    ValueError in one line for a name, a parameter, a type or a value that cannot be; it says what is valid.

    >>> build("reduction", {"name": "constant", "length": 256})
    ConstantNorm(length=256)
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    if "name" not in spec:
        raise ValueError(f"{kind}: got no `name` in {dict(spec)}, expected one of {', '.join(KINDS[kind])}")
    name = spec["name"]
    cls = resolve(kind, name)
    parameters = {key: value for key, value in spec.items() if key != "name"}
    _check_parameters(f"{kind} {name}", cls, parameters)
    try:
        part = cls(**parameters)
    except ValueError as error:
        raise ValueError(f"{kind} {name}: {error}") from error
    if kind == "credit":
        _check_needs(f"{kind} {name}", part)
    return part


def resolve(kind: str, name: str) -> type:
    """The class behind a name; ValueError with the nearest valid name if there is none."""
    known: dict[str, str] = KINDS[kind]
    if not isinstance(name, str):
        raise ValueError(f"{kind}: got name={name!r}, expected text, one of {', '.join(known)}")
    if name in known:
        return _imported(kind, known[name])
    plugins = {point.name: point for point in entry_points(group=f"apportion.{kind}")}
    if name in plugins:
        return _imported(kind, plugins[name].value)
    if "." in name or ":" in name:
        return _imported(kind, name)
    valid = [*known, *plugins]
    raise ValueError(
        f"{kind}: got {name!r}, expected one of {', '.join(valid)}, or a dotted path of your own{_nearest(name, valid)}"
    )


def _imported(kind: str, path: str) -> type:
    module_name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{kind}: cannot import {module_name!r} of {path!r} ({type(error).__name__}: {error}), "
            "expected a module that this Python finds; check the spelling and PYTHONPATH"
        ) from error
    cls = getattr(module, attribute, None)
    if cls is None:
        raise ValueError(f"{kind}: {module_name!r} has no {attribute!r}{_nearest(attribute, vars(module))}")
    if not isinstance(cls, type) or not is_dataclass(cls):
        raise ValueError(f"{kind}: got {path!r}, which is no dataclass, expected one whose fields are its parameters")
    return cls


def _check_parameters(where: str, cls: type, parameters: Mapping[str, Any]) -> None:
    accepted: dict[str, Field] = {f.name: f for f in fields(cls) if f.init}
    listed = ", ".join(accepted) or "none"
    for name in parameters:
        if name not in accepted:
            raise ValueError(
                f"{where}: got unknown parameter {name!r}, expected {listed}{_nearest(str(name), accepted)}"
            )
    hints = get_type_hints(cls)
    for name, field in accepted.items():
        if name in parameters:
            if not _fits(parameters[name], hints[name]):
                got = f"{parameters[name]!r} ({type(parameters[name]).__name__})"
                raise ValueError(f"{where}: got {name}={got}, expected {_shown(hints[name])}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where}: got no {name!r}, expected {_shown(hints[name])}; parameters are {listed}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from a configuration is of an annotated type. Types it does not know fit everything."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin in (list, tuple, set, frozenset):
        return isinstance(value, list | tuple)
    if origin is dict:
        return isinstance(value, Mapping)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, list, dict, type(None)):
        return isinstance(value, hint)
    return True


def _shown(hint: Any) -> str:
    if get_origin(hint) is None and isinstance(hint, type):
        return "null" if hint is type(None) else hint.__name__
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_shown(argument) for argument in get_args(hint))
    return str(hint)


def _check_needs(where: str, part: Any) -> None:
    from apportion.algorithms.interface import SIGNALS

    needs = getattr(part, "needs", None)
    if not isinstance(needs, frozenset | set):
        raise ValueError(
            f"{where}: got needs={needs!r}, expected a frozenset of {', '.join(sorted(SIGNALS))} (may be empty)"
        )
    for signal in sorted(needs - SIGNALS):
        raise ValueError(
            f"{where}: got {signal!r} in needs, expected {', '.join(sorted(SIGNALS))}{_nearest(signal, SIGNALS)}"
        )
    if "influences" in needs and not callable(getattr(part, "influence", None)):
        raise ValueError(
            f"{where}: got 'influences' in needs and no method `influence`, expected one that gives a group's scores "
            "from its hidden states (see apportion.algorithms.influence)"
        )
    if "influences" in needs and not _takes(part.influence, 4):
        raise ValueError(
            f"{where}: got influence{inspect.signature(part.influence)}, expected (states, lengths_G, rewards_G, "
            "sum_over_ranks=None): a group may be split over ranks (see apportion.algorithms.influence)"
        )


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    return True


def _nearest(name: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
