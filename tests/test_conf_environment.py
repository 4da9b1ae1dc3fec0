"""What `plan` refuses of an environment before any actor starts."""

import importlib.util

import pytest

from apportion.cli import compose_config, to_config
from apportion.conf.environment import check_environment
from apportion.platform.errors import ConfigError


class Corridor:
    """Stands for an environment with Gymnasium's API; `check_environment` makes none."""


@pytest.fixture
def configured():
    def composed(cls, params):
        words = [f"environment.cls={cls}", f"environment.params={{{params}}}", "reward.functions=null"]
        return to_config(compose_config(["experiment=tiny_grpo", *words]))[0]

    return composed


@pytest.mark.parametrize(("name", "params"), [("gymnasium", "id: FrozenLake-v1"), ("textarena", "id: Wordle-v0")])
def test_a_library_that_is_not_installed_is_refused_and_one_that_is_passes(configured, monkeypatch, name, params):
    config, asked = configured(name, params), []
    monkeypatch.setattr(importlib.util, "find_spec", asked.append)
    with pytest.raises(ConfigError) as error:
        check_environment(config)
    expected = f"environment.cls: got {name}, which is not installed, expected it to be; pip install {name}"
    assert (str(error.value), asked) == (expected, [name])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_environment(config)


def test_a_class_of_one_s_own_with_gymnasium_s_api_does_without_gymnasium(configured, monkeypatch):
    config = configured("gymnasium", f"id: '{__name__}:Corridor'")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_environment(config)


def test_an_adapter_without_its_id_is_refused_for_that(configured):
    with pytest.raises(ConfigError, match=r"environment\.params: gymnasium: missing a required argument: 'id'"):
        check_environment(configured("gymnasium", ""))
