"""How the trained models of a run are spread over ranks, and whether a checkpoint fits that.

A rank writes and reads its own part of weights and optimizer, so a checkpoint resumes on as many ranks, and under
settings of the engine that keep the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from apportion.conf.defaults import engine_settings
from apportion.conf.preference_schema import PreferenceConfig
from apportion.conf.schema import Config, EngineConfig
from apportion.platform.checkpoint import RunState
from apportion.platform.errors import CheckpointError, ConfigError
from apportion.platform.messages import quoted
from apportion.platform.run_state import STATE_FILE, is_count
from apportion.platform.runs import resumed_folder

Layout = dict[str, dict[str, Any]]  # role -> what its ranks wrote, as `_of_engine` says it
_SAME_FILES = {0: (0,), 1: (1, 2), 2: (1, 2), 3: (3,)}  # ZeRO stages that read each other's files


def layout_of(config: Config | PreferenceConfig, critic: bool = False) -> Layout:
    """What this configuration's ranks will write, and are able to read."""
    lora = config.policy.lora
    adapters = None if lora is None else {"rank": lora.rank, "targets": sorted(lora.targets)}
    layout = {"policy": _of_engine(config, config.policy, config.cluster.gpus_per_policy_rank) | {"lora": adapters}}
    if critic and isinstance(config, Config):
        layout["critic"] = _of_engine(config, config.critic, config.cluster.gpus_per_critic_rank)
    return layout


def _of_engine(config: Config | PreferenceConfig, engine: EngineConfig, gpus: float) -> dict[str, Any]:
    return {
        "ranks": config.cluster.policy_ranks,
        "zero_stage": engine_settings(engine, gpus, None).zero_stage,
        "dtype": config.model.dtype,
        "offload_optimizer": engine.offload_optimizer,
    }


def check_resume(config: Config, critic: bool) -> None:
    """Before anything starts: ConfigError where `resume` names a checkpoint that these ranks cannot read."""
    folder = None if config.resume is None else resumed_folder(config.resume, config.runs_folder)
    if folder is not None:
        check_layout(folder, layout_of(config, critic))


def check_layout(folder: Path, wanted: Layout) -> None:
    """ConfigError where the checkpoint in `folder` is of other ranks than `wanted`; what it does not say is passed."""
    for role, own in wanted.items():
        found = _written(folder, role)
        if found is None:
            raise ConfigError(
                f"resume: {folder} has no {role}, expected a checkpoint of a run that trains one; start a new run from its "
                f"weights: model.path={folder / 'model'}"
            )
        for what, value in own.items():
            if what in found and not _fits(what, found[what], value):
                raise ConfigError(_refusal(folder, role, what, found[what], value))


def _check_stated(folder: Path, role: str, stated: Layout) -> None:
    """ConfigError for what no run of this version writes."""
    for what, value in stated.get(role, {}).items():
        if what in _STATED and not _STATED[what](value):
            raise ConfigError(
                f"resume: {folder / STATE_FILE}: ranks.{role}.{what}: got {quoted(value)}, expected what a run writes: take "
                "another checkpoint"
            )


def _is_adapter(value: Any) -> bool:
    targets = value.get("targets") if isinstance(value, dict) else None
    return value is None or (
        isinstance(targets, list) and all(isinstance(t, str) for t in targets) and is_count(value.get("rank"))
    )


_STATED: dict[str, Callable[[Any], bool]] = {
    "ranks": is_count,
    "zero_stage": lambda value: is_count(value) and value in _SAME_FILES,
    "dtype": lambda value: isinstance(value, str),
    "offload_optimizer": lambda value: isinstance(value, bool),
    "lora": _is_adapter,
}


def _fits(what: str, found: Any, wanted: Any) -> bool:
    return wanted in _SAME_FILES[found] if what == "zero_stage" else found == wanted


def _refusal(folder: Path, role: str, what: str, found: Any, wanted: Any) -> str:
    keys = {"ranks": "cluster.policy_ranks", "dtype": "model.dtype", "lora": "policy.lora"}
    key = keys.get(what, f"{role}.{what}")
    expected = " or ".join(map(str, _SAME_FILES[found])) if what == "zero_stage" else _shown(found)
    null = f"; {key}=null is 2 on GPUs and 0 on CPUs" if what == "zero_stage" else ""
    return (
        f"{key}: got {_shown(wanted)}, and the {role} of {folder} was written with {_shown(found)}: its optimizer state "
        f"cannot be read otherwise; expected {expected}, or a new run from its weights (model.path={folder / 'model'}){null}"
    )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"rank {value['rank']} on {', '.join(value['targets'])}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _written(folder: Path, role: str) -> dict[str, Any] | None:
    """What the checkpoint says of a role's ranks; of an older one what its files' names tell. None: it has no such role,
    and an empty mapping where nothing is known."""
    try:
        stated = RunState.load(folder).ranks
    except CheckpointError:  # whoever takes the checkpoint up says what is wrong with it
        return {}
    if stated:
        _check_stated(folder, role, stated)
        return stated.get(role)
    if not (folder / role).is_dir():
        return {} if role == "policy" else None
    ranks = len(list((folder / role).glob("random-rank-*.npz")))
    names = [file.name for file in (folder / role / "engine").glob("*.pt")]
    found = {"ranks": ranks} if ranks else {}
    if not names:
        return found
    if any(name.startswith("zero_pp_rank") and "model_states" in name for name in names):
        return found | {"zero_stage": 3}
    return found | {"zero_stage": 1 if any("optim_states" in name for name in names) else 0}
