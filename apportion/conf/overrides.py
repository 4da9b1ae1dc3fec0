"""A mapping on the command line is the whole value: `algorithm.credit={name: rloo}` leaves nothing of the recipe's credit.

Hydra would merge it, so that the recipe's parameters stay beside those of another part. One value of a part is changed
by its own key: `algorithm.credit.eps=1e-4`. Sections with a fixed set of keys are merged as ever.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import Container, DictConfig, ListConfig, Node, OmegaConf

from apportion.platform.errors import ConfigError
from apportion.platform.known_secrets import learned
from apportion.platform.messages import quoted


@contextmanager
def whole_mappings() -> Iterator[None]:
    """Within it, Hydra composes as described above. Hydra has no switch for this; its version is pinned."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    one_by_one = ConfigLoaderImpl._apply_overrides_to_config

    def apply(overrides: list[Any], config: DictConfig) -> None:
        for override in overrides:
            _refuse_path(override, config)
            _refuse_sweep(override.key_or_group, override.value())
            if override.package is not None or not _replaced(override, config):
                one_by_one([override], config)
        learned(OmegaConf.to_container(config, resolve=False))  # before anything of it is printed, as by --cfg

    ConfigLoaderImpl._apply_overrides_to_config = staticmethod(apply)
    try:
        yield
    finally:
        ConfigLoaderImpl._apply_overrides_to_config = staticmethod(one_by_one)


def _refuse_path(override: Any, config: DictConfig) -> None:
    """ConfigError for a key inside a list that is not an element's number, or inside a section that is a reference: omegaconf
    can follow neither."""
    node: Any = config
    names = override.key_or_group.split(".")
    for depth, name in enumerate(names):
        parent = ".".join(names[:depth])
        if isinstance(node, ListConfig) and not (node._is_none() or node._is_interpolation() or node._is_missing()):
            if not (name.isdecimal() and int(name) < len(node)):
                raise ConfigError(
                    f"{override.key_or_group}: got a value of {parent}, which is a list of {len(node)}, expected an element's "
                    f"number from 0, or the whole list: {parent}=[...]"
                )
            node = node._get_node(int(name))
            continue
        if isinstance(node, Container) and node._is_interpolation():
            raise ConfigError(
                f"{override.key_or_group}: got a value of {parent}, which is the reference {quoted(node._value())}, expected "
                f"either {parent} by reference, or its values one by one"
            )
        if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
            return
        node = node._get_node(name, validate_access=False)


def _refuse_sweep(key: str, value: Any) -> None:
    """ConfigError for a sweep of Hydra's inside a list or mapping, which omegaconf cannot hold."""
    from hydra.core.override_parser.types import Glob, Sweep

    if isinstance(value, Sweep | Glob):
        raise ConfigError(
            f"{key}: got range(...), choice(...), interval(...) or glob(...) inside a value, expected it as the whole value "
            "with -m; put quotes of its own around a text that looks so"
        )
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_sweep(key, inner)


def _replaced(override: Any, config: DictConfig) -> bool:
    """Whether the override was a mapping in place of a free-form one, and is done."""
    key, value = override.key_or_group, override.value()
    node: Any = config
    names = key.split(".")
    for depth, name in enumerate(names):
        if isinstance(node, DictConfig) and node._is_none():
            parent = ".".join(names[:depth])
            raise ConfigError(f"{key}: got a value of {parent}, which is null, expected {parent}={{{name}: ...}}")
        if not isinstance(node, DictConfig) or node._is_missing() or node._is_interpolation():
            return False
        node = node._get_node(name, validate_access=False)
    free = isinstance(value, dict) and isinstance(node, Node) and _free_form(node)
    if free and not override.is_delete():
        empty = isinstance(node, DictConfig) and node._is_none()
        if empty or not (override.is_add() or override.is_force_add()):
            OmegaConf.update(config, key, value, merge=False, force_add=True)
            return True
    return False


def _free_form(node: Node) -> bool:
    """Typed as a mapping of any keys, or not typed."""
    kind = node._metadata.ref_type
    return kind in (Any, dict) or typing.get_origin(kind) is dict
