"""Says which actors may load side by side. vLLM measures the free memory of the whole device while it starts, so nothing else
may load on that GPU meanwhile: what another process allocates would count as vLLM's own, and what it frees fails the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ENGINES = ("rollout", "judge")  # measure the device
STARTS_AFTER = {
    "policy": ENGINES,
    "critic": ENGINES,
    "reference": ENGINES,
    "reward": ENGINES,
}  # on a GPU that they share
LOADS_IN_SETUP = ("policy", "critic")  # the others load in their constructor

Place = tuple[str, int]  # a role, and which of its actors


def waves(gpus: Mapping[str, Sequence[float]]) -> list[list[Place]]:
    """Every actor in the wave in which it may load, from the GPUs that each actor of a role has.

    Engines that could be on one GPU load one after the other; then the roles that could share a GPU with one of them.
    Everything else is in the first wave: with whole GPUs, or none, that is all there is.

    >>> waves({"rollout": [0.4], "credit": [0], "policy": [0.5]})
    [[('rollout', 0), ('credit', 0)], [('policy', 0)]]
    """
    wave_of: dict[Place, int] = {}
    share = {(role, i): each for role, several in gpus.items() for i, each in enumerate(several)}
    engines = [place for place in share if place[0] in ENGINES]
    for place in engines:
        taken = {wave_of[other] for other in engines if other in wave_of and _may_share(share[place], share[other])}
        wave_of[place] = next(wave for wave in range(len(engines)) if wave not in taken)
    last = 1 + max(wave_of.values(), default=0)
    for role, several in gpus.items():
        measuring = [share[place] for place in engines if place[0] in STARTS_AFTER.get(role, ())]
        waits = any(_may_share(own, engine) for own in several for engine in measuring)
        for i in range(len(several)):  # a role as a whole: its ranks wait for each other
            wave_of.setdefault((role, i), last if waits else 0)
    found = [[place for place in share if wave_of[place] == wave] for wave in range(last + 1)]
    return [wave for wave in found if wave]


def _may_share(one: float, other: float) -> bool:
    """Whether actors with these shares could be on one GPU."""
    return 0 < one < 1 and 0 < other < 1 and one + other <= 1 + 1e-9
