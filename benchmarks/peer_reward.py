"""The reward that both sides of bench_peer.py use: no two different answers are likely to earn the same, so every group
has a gradient and no side may leave rows out."""

from __future__ import annotations

from typing import Any


def vowels(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Share of vowels in each answer, and a little for its length."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(t.count(v) for v in "aeiou") / (len(t) + 1) + 1e-3 * len(t) for t in texts]
