"""The nodes of a Ray cluster that runs, and whether they have the GPUs that a run asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """One node, by Ray's accounting."""

    cores: float
    gpus: float


def alive_nodes() -> list[Node]:
    """Nodes of the cluster that this process has joined; none where it has joined none."""
    import ray

    if not ray.is_initialized():
        return []
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(float(one.get("CPU", 0)), float(one.get("GPU", 0))) for one in resources]


def smallest(nodes: Sequence[Node], gpus: float) -> Node | None:
    """The node with the fewest cores of those on which an actor with so many GPUs may run."""
    able = [node for node in nodes if node.cores >= 1 and node.gpus >= gpus]
    return min(able, key=lambda node: node.cores, default=None)


def shortage(nodes: Sequence[Node], gpus: Sequence[float]) -> str | None:
    """What these nodes lack of what each actor asks for, or None.

    >>> shortage([Node(8, 1), Node(8, 1)], [2])
    'an actor asks for 2 GPUs, and no node of the cluster has more than 1'
    >>> shortage([Node(8, 2)], [1, 1, 1, 0.5])
    'the actors ask for 3.5 GPUs, and the cluster has 2'
    """
    largest, most = max(gpus, default=0.0), max((node.gpus for node in nodes), default=0.0)
    if largest > most:
        return f"an actor asks for {_gpus(largest)}, and no node of the cluster has more than {most:g}"
    asked, there = sum(gpus), sum(node.gpus for node in nodes)
    if asked > there + 1e-9:
        return f"the actors ask for {_gpus(asked)}, and the cluster has {there:g}"
    return None


def _gpus(number: float) -> str:
    return f"{number:g} GPU{'' if number == 1 else 's'}"


class Asked:
    """The GPUs that each actor of this process's run asks a joined cluster for."""

    def __init__(self) -> None:
        self.gpus: list[float] = []

    def lacking(self) -> str | None:
        """What the cluster lacks of it now, or None."""
        return shortage(alive_nodes(), self.gpus) if any(self.gpus) else None


asked = Asked()
