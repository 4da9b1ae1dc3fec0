"""Accuracy of answers to questions: pass@k, avg@k, greedy accuracy.

A reward that is NaN is not known and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that at least one of k answers drawn without replacement from `samples` is right.

    Unbiased estimator 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374, equation 1).

    >>> round(pass_at_k(samples=4, correct=1, k=2), 6)
    0.5
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k: got {k}, expected 1 to {samples} samples")
    if not 0 <= correct <= samples:
        raise ValueError(f"correct: got {correct}, expected 0 to {samples} samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_pass_at_k(rewards: Sequence[Sequence[float]], k: int, correct_at: float = 1.0) -> float:
    """Mean pass@k over questions, given the rewards of each question's answers.

    Questions with fewer than k known rewards are left out; NaN where none is left.

    >>> mean_pass_at_k([[1, 0], [0, 0]], k=2)
    0.5
    """
    known = [_known(row) for row in rewards]
    scores = [pass_at_k(len(row), int((row >= correct_at).sum()), k) for row in known if len(row) >= k]
    return float(np.mean(scores)) if scores else math.nan


def average_at_k(rewards: Sequence[Sequence[float]], correct_at: float = 1.0) -> float:
    """avg@k: the mean over questions of the share of right answers, NaN where no reward is known.

    >>> average_at_k([[1, 0, 0, 0], [1, 1, 0, float("nan")]]) == (1 / 4 + 2 / 3) / 2
    True
    """
    shares = [float((row >= correct_at).mean()) for row in map(_known, rewards) if len(row)]
    return float(np.mean(shares)) if shares else math.nan


def accuracy(rewards: Sequence[float] | np.ndarray, correct_at: float = 1.0) -> float:
    """Share of known rewards that are at least `correct_at`; for one greedy answer a question, the greedy accuracy.

    >>> accuracy([1.0, 0.0, float("nan"), 1.0]) == 2 / 3
    True
    """
    known = _known(rewards)
    return float((known >= correct_at).mean()) if len(known) else math.nan


def _known(rewards: Sequence[float] | np.ndarray) -> np.ndarray:
    row = np.asarray(rewards, np.float64)
    return row[~np.isnan(row)]
