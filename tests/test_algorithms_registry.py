"""Building parts by name, by dotted path and by entry point, and what a wrong name, parameter or type is told."""

import importlib
import sys
from dataclasses import is_dataclass
from importlib.metadata import EntryPoint

import pytest

from apportion.algorithms import registry
from apportion.algorithms.credit.grpo import Grpo
from apportion.algorithms.registry import KINDS, build, resolve

OWN_MODULE = """
from dataclasses import dataclass
from typing import ClassVar, Literal

@dataclass
class MyCredit:
    scale: float
    mode: Literal["a", "b"] = "a"
    needs: ClassVar[frozenset[str]] = frozenset({"entropies"})

@dataclass
class WrongSignal:
    needs: ClassVar[frozenset[str]] = frozenset({"value"})

@dataclass
class Silent:
    pass

def function():
    pass
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_own_methods.py").write_text(OWN_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield "my_own_methods"
    sys.modules.pop("my_own_methods", None)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, known in KINDS.items() for name in known])
def test_every_name_resolves_to_a_dataclass_of_this_package(kind, name):
    cls = resolve(kind, name)
    assert is_dataclass(cls)
    assert cls.__module__.startswith("apportion.algorithms")


@pytest.mark.parametrize(
    ("name", "needs"), [("gae", {"values"}), ("grpo", set()), ("rloo", set()), ("reinforce_pp", set())]
)
def test_the_baselines_are_built_from_their_defaults_and_say_what_they_need(name, needs):
    assert build("credit", {"name": name}).needs == needs


def test_a_part_is_built_with_its_parameters():
    assert build("credit", {"name": "grpo", "normalize": "none"}) == Grpo(normalize="none")
    assert build("surrogate", {"name": "ppo_clip", "clip_high": 0.28, "dual_clip": None}).clip_high == 0.28


def test_an_integer_will_do_where_a_number_is_expected():
    assert build("credit", {"name": "gae", "gamma": 1}).gamma == 1


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("credit", {"name": "grop"}, r"credit: got 'grop', expected one of gae, grpo, .* \(did you mean 'grpo'\?\)$"),
        ("credit", {"normalize": "std"}, r"credit: got no `name` in \{'normalize': 'std'\}, expected one of gae"),
        ("credit", {"name": 3}, r"credit: got name=3, expected text, one of gae"),
        (
            "credit",
            {"name": "grpo", "normalise": "std"},
            r"^credit grpo: got unknown parameter 'normalise', expected normalize, eps \(did you mean 'normalize'\?\)$",
        ),
        ("credit", {"name": "rloo", "gamma": 1.0}, r"^credit rloo: got unknown parameter 'gamma', expected none$"),
        ("credit", {"name": "gae", "gamma": "one"}, r"^credit gae: got gamma='one' \(str\), expected float$"),
        ("credit", {"name": "gae", "gamma": True}, r"^credit gae: got gamma=True \(bool\), expected float$"),
        ("credit", {"name": "gae", "gamma": 2.0}, r"^credit gae: gamma: got 2.0, expected 0 to 1$"),
        (
            "reduction",
            {"name": "constant"},
            r"^reduction constant: got no 'length', expected int; parameters are length$",
        ),
        (
            "reduction",
            {"name": "constant", "length": 2.5},
            r"^reduction constant: got length=2.5 \(float\), expected int$",
        ),
        (
            "surrogate",
            {"name": "ppo_clip", "dual_clip": "on"},
            r"^surrogate ppo_clip: got dual_clip='on' \(str\), expected float or null$",
        ),
        (
            "credit",
            {"name": "no_such_package.methods:Mine"},
            r"^credit: cannot import 'no_such_package.methods' of .* \(ModuleNotFoundError: .*\), expected a module",
        ),
        ("credit", {"name": "apportion.algorithms.credit.grpo:Gpro"}, r"has no 'Gpro' \(did you mean 'Grpo'\?\)$"),
        ("surrogat", {"name": "gspo"}, r"^kind: got 'surrogat', expected one of credit, surrogate, reduction"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(kind, spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(kind, spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("separator", [":", "."])
def test_a_method_of_ones_own_is_built_by_dotted_path(own_module, separator):
    part = build("credit", {"name": f"{own_module}{separator}MyCredit", "scale": 2})
    assert (type(part).__name__, part.scale, part.mode) == ("MyCredit", 2, "a")


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("MyCredit", {}, "got no 'scale', expected float; parameters are scale, mode"),
        ("MyCredit", {"scale": 1.0, "mode": "c"}, r"got mode='c' \(str\), expected typing.Literal\['a', 'b'\]"),
        ("WrongSignal", {}, r"got 'value' in needs, expected .* \(did you mean 'values'\?\)"),
        ("Silent", {}, "got needs=None, expected a frozenset of"),
        ("function", {}, "which is no dataclass, expected one whose fields are its parameters"),
    ],
)
def test_a_method_of_ones_own_is_held_to_the_same_contract(own_module, name, parameters, message):
    with pytest.raises(ValueError, match=message):
        build("credit", {"name": f"{own_module}:{name}", **parameters})


def test_an_installed_package_offers_methods_by_entry_point(own_module, monkeypatch):
    point = EntryPoint("mine", f"{own_module}:MyCredit", "apportion.credit")
    offered = {"apportion.credit": [point]}
    monkeypatch.setattr(registry, "entry_points", lambda group: offered.get(group, []))
    assert build("credit", {"name": "mine", "scale": 1.5}).scale == 1.5
    with pytest.raises(ValueError, match=r"credit: got 'minee', expected one of .*, mine, .*did you mean 'mine'\?"):
        build("credit", {"name": "minee"})
