"""What distillation asks of the rest of the configuration, and of its teachers: the same vocabulary, id by id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apportion.conf.before import stages
from apportion.conf.models import ModelFacts, read_model
from apportion.conf.schema import Config
from apportion.data.builtin import PREFIX
from apportion.platform.errors import ConfigError
from apportion.platform.runs import find_checkpoint


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
            return str(find_checkpoint(str(folder), config.runs_folder).path / "model")
    return config.model.path if path in [stage.run_name for stage in stages(config)] else path


def check_distillation(config: Config, model: ModelFacts | None) -> dict[str, ModelFacts | None]:
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
        if teacher is None and "/" not in paths[key] and not paths[key].startswith(PREFIX):
            raise ConfigError(
                f"{key}: got {paths[key]!r}, expected a run in {config.runs_folder} with a checkpoint, a model's folder, "
                "owner/name of a hub's model or builtin:NAME"
            )
        if model is not None and teacher is not None and teacher.vocabulary != model.vocabulary:
            raise ConfigError(
                f"{key}: got a model with {teacher.vocabulary} tokens, expected {model.vocabulary} as {config.model.path} "
                "has: whole distributions are compared id by id"
            )
    return facts


def check_same_tokenizer(student: Any, teacher: Any, key: str) -> None:
    """ConfigError unless both give every token the same id."""
    own, other = student.get_vocab(), teacher.get_vocab()
    different = sorted(token for token in own.keys() | other.keys() if own.get(token) != other.get(token))
    if different:
        first = different[0]
        raise ConfigError(
            f"{key}: got a tokenizer that differs from the model's in {len(different)} of {len(own)} tokens (first "
            f"{first!r}: id {other.get(first)}, expected {own.get(first)}), expected the same: whole distributions are "
            "compared id by id"
        )
