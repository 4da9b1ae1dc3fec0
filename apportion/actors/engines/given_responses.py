"""Responses that the data brings along, in the place of sampled ones."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from apportion.actors.engines import Sample, Sampling
from apportion.batch import Prompt
from apportion.data.errors import DataError as SourceError
from apportion.data.messages import clean_messages
from apportion.data.response_text import ResponseText
from apportion.platform.errors import DataError


class GivenResponses:
    """A column of each prompt's row as sampled tokens, ended by the tokenizer's eos. Their log-probs are not known."""

    def __init__(self, model: str, trust_remote_code: bool) -> None:
        self._model, self._trust_remote_code = model, trust_remote_code

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        from apportion.actors.loading import model_refused

        with model_refused(self._model, self._trust_remote_code):
            return AutoTokenizer.from_pretrained(self._model, trust_remote_code=self._trust_remote_code)

    @cached_property
    def _spell(self) -> ResponseText:
        return ResponseText(self.tokenizer)

    def samples(self, prompts: list[Prompt], sampling: Sampling) -> list[Sample]:
        """One for each prompt; cut at `sampling.max_tokens`, which then has no eos. DataError for a row without."""
        return [self._sample(prompt, sampling) for prompt in prompts]

    def _sample(self, prompt: Prompt, sampling: Sampling) -> Sample:
        text = _answer(prompt, str(sampling.response_column))
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
        kept = np.asarray(ids[: sampling.max_tokens], np.int32)
        cut = len(kept) < len(ids)
        logprobs = np.full(len(kept), np.nan, np.float32)
        return Sample(kept, logprobs, "length" if cut else "stop", self._spell(kept))


def _answer(prompt: Prompt, column: str) -> str:
    """The column's text, or the content of its last message. DataError where that says more than its text."""
    value = prompt.columns.get(column)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        try:
            last = clean_messages(value[-1:])[0]
        except SourceError as error:
            raise DataError(f"rollout.response_column: prompt {prompt.prompt_id}, column {column!r}: {error}") from None
        if more := [key for key in ("tool_calls", "reasoning_content") if key in last]:
            raise DataError(
                f"rollout.response_column: prompt {prompt.prompt_id} has {more[0]} in {column!r}, expected text alone"
            )
        value = last["content"]
    if not isinstance(value, str):
        raise DataError(
            f"rollout.response_column: prompt {prompt.prompt_id} has {type(value).__name__} in {column!r}, expected text "
            f"or messages; its columns are {', '.join(prompt.columns) or 'none'}"
        )
    return value
