"""Prompts to train on and held-out ones to evaluate on, with the rewards that read their columns."""

from __future__ import annotations

from collections import Counter
from typing import Any

from apportion.actors.reward_answers import FIRST_ROWS, check_answers, check_source_columns, check_tags
from apportion.actors.reward_check import check_functions
from apportion.actors.reward_sources import FunctionSource
from apportion.batch import Prompt
from apportion.conf.models import read_limits
from apportion.conf.schema import Config
from apportion.data.errors import BadRows, DataError, reason_of
from apportion.data.prompts import PromptEncoder, PromptStream, every_prompt
from apportion.data.sources import Source, load_sources
from apportion.data.turns import TurnEncoder
from apportion.platform.messages import say


def load_prompts(config: Config, tokenizer: Any) -> tuple[PromptStream, list[Prompt]]:
    """The training stream and the held-out prompts; says how many rows were left out."""
    data, encoder = config.data, _encoder(config, tokenizer)
    check_tags(_functions(config), tokenizer)
    sources = _sources(config, "train")
    _check_first(sources, encoder, data.on_bad_row)
    stream = PromptStream(
        sources, encoder, config.train.prompts_per_step, config.seed, data.shuffle, on_bad_row=data.on_bad_row
    )
    held_out: list[Prompt] = []
    left_out = Counter(stream.skipped)
    if data.eval is not None:
        held_out, skipped = every_prompt(_sources(config, "eval"), encoder, data.on_bad_row)
        left_out += skipped
    _say_left_out(left_out)
    if encoder.reasoning_left_out:
        say(
            f"data: the chat template leaves out the reasoning of earlier turns in {encoder.reasoning_left_out} of the "
            "prompts read so far"
        )
    return stream, held_out


def load_held_out(config: Config, tokenizer: Any) -> list[Prompt]:
    """The held-out prompts alone: the data that a checkpoint was trained on may be gone."""
    check_tags(_functions(config), tokenizer)
    held_out, left_out = every_prompt(_sources(config, "eval"), _encoder(config, tokenizer), config.data.on_bad_row)
    _say_left_out(left_out)
    return held_out


def _encoder(config: Config, tokenizer: Any) -> PromptEncoder:
    data = config.data
    encoder = PromptEncoder(
        tokenizer, data.system_prompt, data.chat, dict(data.chat_template_kwargs), data.max_prompt_tokens,
        data.tools_column, read_limits(config.model.path).vocabulary,
    )  # fmt: skip
    if config.environment.cls is not None:
        TurnEncoder(encoder, config.environment.observation_role)  # refuses a chat template that cannot show turns
    return encoder


def _sources(config: Config, split: str) -> list[Source]:
    """Of `split`, with every column that a reward function needs, and answers that verifiers can read."""
    data = config.data
    given, limit = (data.train, data.limit) if split == "train" else (data.eval, data.eval_limit)
    sources = load_sources(
        given, split=split, limit=limit, prompt_column=data.prompt_column, on_bad_row=data.on_bad_row
    )
    functions = _functions(config)
    check_source_columns(functions, sources, f"data.{split}")
    check_answers(functions, sources, data.on_bad_row)
    return sources


def _functions(config: Config) -> list[FunctionSource]:
    return check_functions(config.reward.functions, config.reward.timeout_seconds)


def _say_left_out(left_out: Counter[str]) -> None:
    if left_out:
        reasons = ", ".join(f"{reason} {count}" for reason, count in left_out.items())
        say(f"data: {left_out.total()} rows left out ({reasons})")


def _check_first(sources: list[Source], encoder: PromptEncoder, on_bad_row: str) -> None:
    """DataError where one of the first rows gives no prompt: a limit that all of them pass is found before anything
    starts. Where bad rows are skipped, this finds a chat template that is at fault. Later rows are encoded when they are
    drawn."""
    bad = BadRows(on_bad_row)
    for source in sources:
        for row in source.rows[:FIRST_ROWS]:
            try:
                encoder.prompt(source, row, 0)
            except DataError as error:
                bad.reject(reason_of(error), str(error))
