"""What distillation asks of the rest of the configuration, and of its teachers: the same vocabulary, id by id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apportion.conf.before import stages
from apportion.conf.companions import check_context
from apportion.conf.models import ModelFacts, read_limits, read_model
from apportion.conf.schema import Config
from apportion.data.builtin import PREFIX
from apportion.platform.checkpoint import CheckpointStore
from apportion.platform.errors import ConfigError
from apportion.platform.runs import tell_skipped


def teacher_paths(config: Config) -> dict[str, str]:
    """Model of each teacher by its key, `builtin:` names unresolved; none without a distillation.

    ConfigError where one is missing, or given for nothing.
    """
    given = {"teachers.dpo": config.teachers.dpo, "teachers.other": config.teachers.other}
    if config.algorithm.distillation is None:
        for key, path in given.items():
            if path is not None:
                raise ConfigError(f"{key}: got {path!r} without algorithm.distillation, expected null or algorithm=...")
        return {}
    paths = {}
    for key, path in given.items():
        if path is None:
            raise ConfigError(
                f"{key}: got null with algorithm.distillation, expected a model: a folder, a name or a run that "
                "`apportion dpo` made (dpo.reverse=true for teachers.other)"
            )
        paths[key] = _model_of(path, config)
    return paths


def _model_of(path: str, config: Config) -> str:
    """The model of a run's newest checkpoint; any other path or name unchanged. A stage that is still to be run first
    stands for a model like the policy's."""
    for folder in (Path(path).expanduser(), Path(config.runs_folder) / path):
        if (folder / "checkpoints").is_dir():
            store = CheckpointStore(folder / "checkpoints")
            newest = store.latest()
            if newest is None:
                raise ConfigError(
                    f"teachers: got {path}, a run without a whole checkpoint, expected one that has a model"
                )
            tell_skipped(store, newest.path)
            return str(newest.path / "model")
    return config.model.path if path in [stage.run_name for stage in stages(config)] else path


def check_distillation(config: Config) -> dict[str, ModelFacts | None]:
    """Facts of each teacher by its key; ConfigError for a combination that cannot run or would silently do nothing."""
    paths = teacher_paths(config)
    rollout = config.rollout
    if not paths:
        if rollout.response_column is not None:
            raise ConfigError(
                f"rollout.response_column: got {rollout.response_column!r} without algorithm.distillation, expected null: "
                "an advantage needs responses of the policy's own"
            )
        return {}
    if rollout.response_column is not None and rollout.responses_per_prompt > 1:
        raise ConfigError(
            f"rollout.responses_per_prompt: got {rollout.responses_per_prompt} with rollout.response_column, expected 1: "
            "the data has one response to a prompt"
        )
    algorithm, policy = config.algorithm, config.policy
    wrong = {
        "algorithm.kl.place": (algorithm.kl.place, "none"),
        "algorithm.entropy_coefficient": (algorithm.entropy_coefficient, 0.0),
        "algorithm.correction.method": (algorithm.correction.method, "none"),
    }
    for key, (got, expected) in wrong.items():
        if got != expected:
            raise ConfigError(
                f"{key}: got {got} with algorithm.distillation, whose loss has no such term, expected {expected}"
            )
    if policy.zero_stage == 3:
        raise ConfigError(
            "policy.zero_stage: got 3 with algorithm.distillation, expected 0, 1 or 2: teachers are whole on each rank"
        )
    facts = {key: read_model(path, key) for key, path in paths.items()}
    for key, teacher in facts.items():
        here = paths[key].startswith(PREFIX) or Path(paths[key]).expanduser().is_dir()
        if teacher is None and not here and "/" not in paths[key]:
            raise ConfigError(
                f"{key}: got {paths[key]!r}, expected a run in {config.runs_folder} with a checkpoint, a model's folder, "
                "owner/name of a hub's model or builtin:NAME"
            )
    check_teachers(config, paths)
    return facts


def check_teachers(config: Config, paths: Mapping[str, str]) -> None:
    """ConfigError for a teacher with another vocabulary, or a context too short; what its files do not say, or who is not
    here yet, is passed over."""
    own = read_limits(config.model.path)
    for key, path in paths.items():
        limits = read_limits(path, key)
        if own.vocabulary is not None and limits.vocabulary not in (None, own.vocabulary):
            raise ConfigError(
                f"{key}: got a model with {limits.vocabulary} tokens, expected {own.vocabulary} as {config.model.path} "
                "has: whole distributions are compared id by id"
            )
        check_context(config, key, path, limits)


def check_same_tokenizer(
    own_tokenizer: Any,
    other_tokenizer: Any,
    key: str,
    why: str = "whole distributions are compared id by id",
    only_own: bool = False,
) -> None:
    """ConfigError unless both give every token (`only_own`: of the model's) the same id. `why` they have to."""
    own, other = own_tokenizer.get_vocab(), other_tokenizer.get_vocab()
    names = own.keys() if only_own else own.keys() | other.keys()
    different = sorted(token for token in names if own.get(token) != other.get(token))
    if different:
        first = different[0]
        raise ConfigError(
            f"{key}: got a tokenizer that differs from the model's in {len(different)} of {len(own)} tokens (first "
            f"{first!r}: id {other.get(first)}, expected {own.get(first)}), expected the same: {why}"
        )
