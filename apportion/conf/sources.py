"""What a start reads before anything is started, looked at as far as that takes no time."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from apportion.actors.reward_answers import check_answers, check_source_columns
from apportion.actors.reward_check import check_functions
from apportion.conf.schema import Config
from apportion.data.functions import load_function
from apportion.data.hub import saved_by_datasets
from apportion.data.rows import SourceSpec
from apportion.data.sources import load_sources, parse_specs
from apportion.platform.runs import check_run_name


def check_sources(config: Config) -> None:
    """The same errors as a start's, for sources that are not there, a first row that cannot be used or has an answer that
    a verifier cannot read, a chat template that is not there, and a run's name without a folder. Datasets on a hub
    and saved ones are not opened; of the rest, only reasoning-gym and math-verify take seconds (to be imported)."""
    data = config.data
    check_run_name(config.run_name)
    if config.model.chat_template is not None:
        from apportion.data.prompts import template_text  # imports torch

        template_text(config.model.chat_template)
    for split, given in (("train", data.train), ("eval", data.eval)):
        if split == "train" or given is not None:
            _check_split(config, split, given)


def _check_split(config: Config, split: str, given: Any) -> None:
    data, first_rows, specs = config.data, [], parse_specs(given)
    for spec in specs:
        kind, _, rest = spec.source.partition(":")
        if kind == "function":
            load_function(rest)  # calling it may take long
        elif _is_quick(spec, kind):
            first_rows += load_sources(
                _first_row(spec), split=split, prompt_column=data.prompt_column, on_bad_row=data.on_bad_row
            )
    functions = check_functions(config.reward.functions, config.reward.timeout_seconds)
    if len(first_rows) == len(specs):  # a column may be in one source alone
        check_source_columns(functions, first_rows, f"data.{split}")
    if data.on_bad_row == "error":
        check_answers(functions, first_rows, data.on_bad_row)


def _is_quick(spec: SourceSpec, kind: str) -> bool:
    """A saved dataset has no parameters of its own: with some, it is refused without being opened."""
    return kind != "hf" and (bool(spec.parameters) or not saved_by_datasets(Path(spec.source).expanduser()))


def _first_row(spec: SourceSpec) -> dict[str, Any]:
    entry = asdict(spec)
    return entry.pop("parameters") | entry | {"limit": 1}
