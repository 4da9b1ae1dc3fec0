"""What vLLM says while it loads weights. A layer that it cannot load keeps its earlier weights, with a warning alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_LAYER_FAILED = re.compile(r"(?P<layer>\w+): Failed to load weights")
_NOT_LOADED = re.compile(
    r"\b(fail\w*|could not|cannot|not|missing|skip\w*|ignor\w*|unexpected)\b.*\b(load\w*|weights?|param\w*|tensors?)\b"
    r"|\b(weights?|param\w*|tensors?)\b.*\b(fail\w*|could not|cannot|not|missing|skipp\w*|ignor\w*|unexpected)\b",
    re.IGNORECASE | re.DOTALL,
)
_MACHINE_FAILED = re.compile(
    r"out of memory|not enough memory|allocate memory|CUDA error|CUDA driver|NCCL", re.IGNORECASE
)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def collected_log(name: str = "vllm") -> Iterator[list[logging.LogRecord]]:
    """Records of WARNING and above of a library's loggers, even where the user raised their level. What the user does
    not want to see is not shown."""
    root, disabled = logging.getLogger(name), logging.root.manager.disable
    shown_from = max(root.getEffectiveLevel(), disabled + 1)
    loggers = [root, *(x for n, x in logging.root.manager.loggerDict.items() if n.startswith(f"{name}."))]
    levels = [(x, x.level) for x in loggers if isinstance(x, logging.Logger) and x.level > logging.WARNING]
    levels += [(root, root.level)] if root.level == logging.NOTSET else []
    collector, handlers = _Collector(), list(root.handlers)

    def shown(record: logging.LogRecord) -> bool:
        return record.levelno >= shown_from

    try:
        for handler in handlers:
            handler.addFilter(shown)
        root.addHandler(collector)
        logging.disable(logging.NOTSET)
        for logger, _ in levels:
            logger.setLevel(logging.WARNING)
        yield collector.records
    finally:
        for logger, level in levels:
            logger.setLevel(level)
        logging.disable(disabled)
        root.removeHandler(collector)
        for handler in handlers:
            handler.removeFilter(shown)


def is_machine_failure(error: Exception) -> bool:
    """Whether memory or a device failed, and not a weight: torch raises RuntimeError for both."""
    return isinstance(error, RuntimeError) and _MACHINE_FAILED.search(str(error)) is not None


def load_errors(records: list[logging.LogRecord], model: nn.Module) -> list[str]:
    """Those that say that weights were not loaded, and every ERROR.

    vLLM also says "Failed to load weights" of layers without parameters (a rotary table, which it keeps), and of a layer
    that borrows all its parameters (a tied head). These lost nothing.
    """
    errors = []
    for record in records:
        text = " ".join(record.getMessage().split())
        failed = _LAYER_FAILED.search(text)
        if failed:
            lost = sorted(_own_parameters(model, failed["layer"]))
            if lost:
                errors.append(f"{failed['layer']}: failed to load weights ({_shortened(lost)})")
        elif record.levelno >= logging.ERROR or _NOT_LOADED.search(text):
            errors.append(text[:500])
    return list(dict.fromkeys(errors))


def _own_parameters(model: nn.Module, layer: str) -> set[str]:
    """Names of parameters of layers of this class that no other layer shares."""
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    return {
        f"{name}.{attribute}" if name else attribute
        for name, module in model.named_modules()
        if type(module).__name__ == layer
        for attribute, parameter in module._parameters.items()
        if parameter is not None and users[id(parameter)] == 1
    }


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
