"""Sums of several numbers, worked out one line at a time, and a judge that checks every line exactly.

A small task for credit by steps: the final number may be right while a line on the way is wrong, which a reward of the
final number does not see. `rows` is a source (`function:apportion.data.step_sums:rows`), `judge` a judge function.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from apportion.data.errors import DataError

EQUATION = re.compile(r"(\d+(?:\s*\+\s*\d+)+)\s*=\s*(\d+)")
# Two worked sums, then one to go on with: a model that was only trained to continue text sees what is wanted.
QUESTION = "3 + 4 + 6\n3 + 4 = 7\n7 + 6 = 13\n\n9 + 2 + 5\n9 + 2 = 11\n11 + 5 = 16\n\n{sum}\n"


def rows(side: str = "train", high: int = 9, terms: int = 3, count: int = 4000, seed: int = 0) -> Iterator[dict]:
    """`count` rows with columns prompt, answer, terms: sums of `terms` numbers from 1 to `high`, to be continued as text.

    `side` is train or eval. Which side a sum is on follows from its numbers alone, whatever their order, so that no sum
    is on both: a tenth of them are held out.
    """
    if side not in ("train", "eval"):
        raise DataError(f"step_sums: got side {side!r}, expected train or eval")
    if high < 2 or terms < 2 or count < 1:
        raise DataError(f"step_sums: got high={high}, terms={terms}, count={count}, expected at least 2, 2 and 1")
    rng = random.Random(f"{seed}/{side}")
    made = 0
    while made < count:
        numbers = [rng.randint(1, high) for _ in range(terms)]
        if (random.Random(str(sorted(numbers))).random() < 0.1) != (side == "eval"):
            continue
        made += 1
        written = " + ".join(map(str, numbers))
        yield {"prompt": QUESTION.format(sum=written), "answer": str(sum(numbers)), "terms": numbers}


def judge(question: str, steps: Sequence[str], answer: str | None, **columns: Any) -> list[int]:
    """The steps with a sum that does not come out, from 0. A step without a sum says nothing that can be wrong.

    >>> judge("2 + 2 + 3", ["2 + 2 = 5\\n", "5 + 3 = 8"], "7")
    [0]
    """
    return [number for number, step in enumerate(steps) if any(not _holds(*found) for found in EQUATION.findall(step))]


def _holds(left: str, right: str) -> bool:
    return sum(int(number) for number in re.findall(r"\d+", left)) == int(right)
