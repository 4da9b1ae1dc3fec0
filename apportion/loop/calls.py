"""How the loop speaks to many actors at once."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from apportion.batch import Prompt
from apportion.platform.cluster import Actor, Call


def with_refs(reports: list[Any], calls: list[Call]) -> list[tuple]:
    """For calls with several results: the report of each, and references to the others, left in the store."""
    return [(report, *call.refs[1:]) for report, call in zip(reports, calls, strict=True)]


def turns(calls: list[Call]) -> list[int]:
    """Of each call, how many its actor has to answer before it."""
    before: Counter[str] = Counter()
    out = []
    for call in calls:
        out.append(before[call.actor.name])
        before[call.actor.name] += 1
    return out


def start_judging(judges: list[Actor], sampled: list[Call], chunks: list[list[Prompt]]) -> list[list[Call]]:
    """Start the critiques of each batch as soon as it is sampled: beside other engines, this engine's next part, and
    scoring."""
    out, turn = [list[Call]() for _ in sampled], turns(sampled)
    # A judge's calls are answered in order, and one whose batch is still sampled holds up those behind it.
    for place in sorted(range(len(sampled)), key=turn.__getitem__):
        batch, prompts = sampled[place].refs[1], chunks[place]
        out[place] = [j.call("judge", batch, prompts, i, len(judges), returns=2) for i, j in enumerate(judges)]
    return out


def longest(calls: list[Call], seconds: list[float]) -> float:
    """Seconds of the actor that took longest over all of its calls."""
    busy = {call.actor.name: 0.0 for call in calls}
    for call, one in zip(calls, seconds, strict=True):
        busy[call.actor.name] += one
    return max(busy.values())


def deal(prompts: list[Prompt], engines: int) -> list[list[Prompt]]:
    """Contiguous parts of about equal size, none empty."""
    count = min(engines, len(prompts))
    bounds = [round(i * len(prompts) / count) for i in range(count + 1)]
    return [prompts[a:b] for a, b in itertools.pairwise(bounds)]
