"""Questions that are made rather than read: sums, and the tasks of reasoning-gym.

Train and eval never share a question by chance: sums are split by their pair of numbers, reasoning-gym items by seeds
that lie a million apart.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

from apportion.data.errors import DataError, nearest
from apportion.data.rows import Row

EVAL_SEED_OFFSET = 1_000_000  # reasoning-gym makes item i from seed + i, so neighbouring seeds share items


@dataclass
class Arithmetic:
    """Sums a + b with low <= a, b <= high, in an order drawn by `seed`; `eval_pairs` of them are held out.

    A pair and its mirror image (3 + 5, 5 + 3) fall on the same side of the split.
    """

    low: int = 1
    high: int = 30
    eval_pairs: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        pairs = max(0, self.high - self.low + 1) ** 2
        if not 0 < self.eval_pairs < pairs:
            raise DataError(
                f"arithmetic: got eval_pairs={self.eval_pairs} of {pairs} pairs with low={self.low}, high={self.high}; "
                "expected at least one pair on each side"
            )

    def rows(self, split: str) -> list[Row]:
        """Every row of `split` ("train" or "eval"), columns prompt, answer, a, b."""
        numbers = range(self.low, self.high + 1)
        sums = [(a, b) for a in numbers for b in numbers if a <= b]
        rng = random.Random(self.seed)
        rng.shuffle(sums)
        held_out: list[tuple[int, int]] = []
        for a, b in sums:
            both = list(dict.fromkeys([(a, b), (b, a)]))
            if len(held_out) + len(both) <= self.eval_pairs:
                held_out += both
        eval_side = set(held_out)
        pairs = [(a, b) for a in numbers for b in numbers if ((a, b) in eval_side) == (split == "eval")]
        rng.shuffle(pairs)
        return [
            Row(
                number,
                f"arithmetic: row {number + 1}",
                {"prompt": f"What is {a} + {b}? Answer with a number.", "answer": str(a + b), "a": a, "b": b},
            )
            for number, (a, b) in enumerate(pairs)
        ]


class GymRows(Sequence[Row]):
    """Items of a reasoning-gym task, made when they are read.

    Columns: prompt, answer, task, task_parameters, entry (the whole item, which the task's own scoring reads).
    """

    def __init__(self, task: str, size: int, seed: int, parameters: dict[str, Any]) -> None:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if task not in DATASETS:
            raise DataError(f"gym:{task}: no such reasoning-gym task{nearest(task, DATASETS)}")
        if size < 1:
            raise DataError(f"gym:{task}: got size={size}, expected at least 1")
        try:
            self._items = reasoning_gym.create_dataset(task, size=size, seed=seed, **parameters)
        except (TypeError, AssertionError, ValueError) as error:
            raise DataError(f"gym:{task}: parameters {parameters} refused ({error})") from None
        self._task, self._size, self._parameters = task, size, parameters
        self.origin = [task, size, seed, parameters]  # from which every row follows

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._size))]
        if not 0 <= index < self._size:
            raise IndexError(f"row {index} of {self._size}")
        entry = self._items[index]
        values = {"prompt": entry["question"], "answer": entry["answer"], "entry": entry}
        values |= {"task": self._task, "task_parameters": self._parameters}
        return Row(index, f"gym:{self._task}: row {index + 1}", values)
