"""Steps of what the policy wrote, for rewards that are lists with one number a step."""

from __future__ import annotations

from typing import Any

import numpy as np

from apportion.actors.judge import steps_of_response
from apportion.batch import Batch
from apportion.data.prompts import TokenizerPath


class PolicySteps:
    """Cuts responses at `delimiter`. `tokenizer` is the policy's, or where it is, which is read when first needed."""

    def __init__(self, tokenizer: Any, delimiter: str) -> None:
        self._tokenizer, self._delimiter = tokenizer, delimiter

    def of(self, batch: Batch, index: int) -> tuple[int, np.ndarray]:
        """How many steps a response has, and the step of each of its tokens [R_i] int64, -1 for an environment's.

        Each turn is cut on its own, so no step reaches past a turn's end; a turn that says nothing has no step.
        """
        turn_ids = batch.turn_ids[batch.response_slice(index)]
        response = batch.sequence(index)[batch.prompt_lengths[index] :]
        count, step_ids = 0, np.full(len(turn_ids), -1, np.int64)
        for turn in range(int(turn_ids.max(initial=-1)) + 1):
            places = np.flatnonzero(turn_ids == turn)
            texts, steps = steps_of_response(response[places], turn_ids[places], self._decode, self._delimiter)
            if texts:
                step_ids[places] = count + np.asarray(steps, np.int64)
            count += len(texts)
        return count, step_ids

    @property
    def tokenizer(self) -> Any:
        if isinstance(self._tokenizer, TokenizerPath):
            self._tokenizer = self._tokenizer.load()
        return self._tokenizer

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
