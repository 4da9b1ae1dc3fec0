"""The switches of Hydra's command line: which exist, which go together. One line for each that does not fit, where Hydra
prints its usage or raises."""

from __future__ import annotations

from collections.abc import Iterator

from apportion.platform.errors import ConfigError, nearest

_SHORT = {
    "-h": "--help", "-r": "--run", "-m": "--multirun", "-c": "--cfg", "-p": "--package", "-cd": "--config-dir",
    "-cn": "--config-name", "-i": "--info",
}  # fmt: skip
_ALONE = ("--help", "--hydra-help", "--version", "--resolve", "--run", "--multirun")
_CHOICES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
_WITH_VALUE = (*_CHOICES, "--package", "--config-dir", "--config-name")
_MODES = ("--run", "--multirun", "--cfg", "--info")  # Hydra takes one of them
_OF_PLAN = {"--gpus": "cluster.gpus_per_policy_rank=1 and the like: --gpus is for apportion plan"}


def split(command: str, words: list[str]) -> tuple[list[str], list[str]]:
    """Switches, in their long form, and overrides, which Hydra's own parser only takes in one piece.

    >>> split("train", ["seed=1", "-c", "job", "--config-dir=mine"])
    (['--cfg=job', '--config-dir=mine'], ['seed=1'])
    """
    switches: list[str] = []
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        if word.startswith("-"):
            switches.append(_switch(command, word, rest))
            continue
        name, _, value = word.partition("=")
        if name in ("algorithm", "experiment", "lora") and value == "null":
            raise ConfigError(f"{name}: got null, expected a name, or nothing at all")
        overrides.append(word)
    _check_together([switch.partition("=")[0] for switch in switches])
    return switches, overrides


def _switch(command: str, word: str, rest: Iterator[str]) -> str:
    """`--name` or `--name=value`; the value may be the next word."""
    given, is_joined, value = word.partition("=")
    name = _SHORT.get(given, given)
    if name in _ALONE and not is_joined:
        return name
    if name not in _WITH_VALUE or (is_joined and not value):
        close = nearest(given, [*_ALONE, *_WITH_VALUE, "--gpus"])
        expected = f"KEY=VALUE, --help, --cfg job, --multirun or --config-dir DIR{close}"
        raise ConfigError(f"{command}: got {word!r}, expected {_OF_PLAN.get(given, expected)}")
    if not is_joined:
        after = next(rest, None)
        if after is None:
            raise ConfigError(f"{command}: got {word} and nothing after it, expected {word} VALUE")
        value = after
    choices = _CHOICES.get(name, (value,))
    if value not in choices:
        raise ConfigError(f"{name}: got {value!r}, expected {', '.join(choices[:-1])} or {choices[-1]}")
    return f"{name}={value}"


def _check_together(names: list[str]) -> None:
    modes = [name for name in _MODES if name in names]
    if len(modes) > 1:
        raise ConfigError(f"{modes[0]}: got it together with {modes[1]}, expected one of {', '.join(_MODES)}")
    if "--resolve" in names and "--cfg" not in names and "--help" not in names:
        raise ConfigError("--resolve: got it alone, expected it with --cfg job or --help")
