"""Pairs of answers to the quickstart's training sums: the right equation, and a wrong one or talk around the question."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from apportion.data.tasks import Arithmetic

TALK = (
    "To answer this, let us think about the numbers {a} and {b} and what they mean.",
    "This is a problem of addition, where we combine {a} with another number.",
    "The number {a} is an interesting one, and so is {b}. There are many ways to see it.",
    "First, let us perform the calculation step by step. We start with {a}.",
)


def pairs(high: int = 30, eval_pairs: int = 128, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows with prompt, chosen and rejected; the sums that the quickstart holds out do not occur."""
    rng = random.Random(seed)
    for row in Arithmetic(high=high, eval_pairs=eval_pairs).rows("train"):
        a, b = row.values["a"], row.values["b"]
        wrong = a + b + rng.choice([-10, -3, -2, -1, 1, 2, 3, 10])
        rejected = rng.choice([f"{a} + {b} = {wrong}", rng.choice(TALK).format(a=a, b=b)])
        yield {"prompt": row.values["prompt"], "chosen": f"{a} + {b} = {a + b}", "rejected": rejected}
