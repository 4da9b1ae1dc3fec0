"""The task of two questions: running sums, taught by a teacher who is not sure of the table of addition.

A prompt is TERMS digits below BASE; a response their running sums modulo BASE, each ended by `;`, then whether the last
is low (L) or high (H). For each pair of a sum and a digit the teacher has a wrong result of its own, which it writes
with a probability of that pair. So the model that reinforcement learning starts from is right on some pairs, wrong on
others, and unsure of most; all that it does not know is a table of BASE x BASE.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.credit.learner import Settings, responses, rollout, supervise
from benchmarks.credit.model import Ending, TinyLM

BASE, TERMS, LIMIT = 6, 5, 12
CHARACTERS = "012345;LH=."
STEP, LOW, HIGH, ASK, STOP = (CHARACTERS.index(c) for c in ";LH=.")
ENDING = Ending(LIMIT, STOP)


def spell(ids: Sequence[int]) -> str:
    return "".join(CHARACTERS[i] for i in ids if i != STOP)


def draw_prompts(count: int, held_out: bool, random: np.random.Generator) -> Tensor:
    """[count, TERMS + 1]; an eighth of all tuples of digits is held out."""
    digits = random.integers(0, BASE, (16 * count + 64, TERMS))
    apart = (digits @ np.array([1, 2, 3, 5, 7])) % 8 == 0
    chosen = digits[apart == held_out][:count]
    return torch.from_numpy(np.concatenate([chosen, np.full((count, 1), ASK)], 1))


class Teacher:
    """`unsure` (least, most): bounds between which each pair's share of right results is drawn."""

    def __init__(self, unsure: tuple[float, float], random: np.random.Generator) -> None:
        self.random = random
        self.right = random.uniform(*unsure, (BASE, BASE))
        self.apart = random.integers(1, BASE, (BASE, BASE))  # how far the wrong result lies from the right one

    def responses(self, prompts: Tensor) -> Tensor:
        """[b, 2 TERMS]"""
        digits = prompts[:, :TERMS].numpy()
        written, parts = digits[:, 0], []
        for digit in digits[:, 1:].T:
            wrong = self.random.random(len(digits)) >= self.right[written, digit]
            written = (written + digit + wrong * self.apart[written, digit]) % BASE
            parts += [written, np.full_like(written, STEP)]
        parts += [np.where(written < BASE // 2, LOW, HIGH), np.full_like(written, STOP)]
        return torch.from_numpy(np.stack(parts, 1))


def worked(prompts: Tensor) -> Tensor:
    """[b, 2 TERMS] right responses."""
    return Teacher((1.0, 1.0), np.random.default_rng(0)).responses(prompts)


def wrong_steps(question: str, steps: Sequence[str]) -> list[int]:
    """Steps (from 0) that do not follow from the ones before, as those were written.

    >>> wrong_steps("12345", ["3;", "0;", "5;", "4;", "H"])  # 0 + 4 is 4, then 5 + 5 is 4
    [2]
    """
    digits = [int(c) for c in question]
    written: int | None = digits[0]
    wrong = []
    for place, step in enumerate(steps):
        if place < TERMS - 1:
            now = int(step[0]) if len(step) == 2 and step[0].isdigit() and step[1] == ";" else None
            if now is None or written is None or now != (written + digits[place + 1]) % BASE:
                wrong.append(place)
            written = now
        elif place > TERMS - 1 or written is None or step != "LH"[written >= BASE // 2]:
            wrong.append(place)
    return wrong


def same(answers: list[list[int]], right: Tensor, start: int) -> np.ndarray:
    """1 where an answer is as long as the right one [2 TERMS] and alike from place `start` on."""
    return np.array(
        [len(a) == len(b) and a[start:] == b[start:] for a, b in zip(answers, right.tolist(), strict=True)], float
    )


LETTER, LAST_SUM, EVERYTHING = 2 * TERMS - 2, 2 * TERMS - 4, 0  # places from which on an answer has to be right


def start_model(seed: int, unsure: tuple[float, float], steps: int) -> TinyLM:
    """The supervised phase."""
    torch.manual_seed(seed)
    random, model = np.random.default_rng([seed, 1]), TinyLM(len(CHARACTERS), limit=TERMS + 1 + LIMIT)
    teacher = Teacher(unsure, random)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        prompts = draw_prompts(64, False, random)
        ids = torch.cat([prompts, teacher.responses(prompts)], 1)
        return ids, (torch.arange(ids.shape[1]) > TERMS).expand(ids.shape)

    supervise(model, draw, steps, Settings(learning_rate=1.5e-3))
    return model


def sampled_answers(model: TinyLM, prompts: Tensor, each: int, seed: int) -> list[list[int]]:
    return responses(rollout(model, prompts, each, ENDING, torch.Generator().manual_seed(seed)))
