"""Starts the actors of every role and has them meet."""

from __future__ import annotations

from apportion.actors.engine import World
from apportion.actors.environment_client import share
from apportion.assembly.hosts import thread_count
from apportion.conf.schema import Config
from apportion.loop.state import Actors
from apportion.platform.cluster import Actor, ActorRequest, Call, Cluster, gather


def start(config: Config, cluster: Cluster, requests: dict[str, list[ActorRequest]]) -> Actors:
    """Every actor of every role at once, since each spends its start on imports and on loading; and wait for all."""
    started = {role: cluster.launch(asked) for role, asked in requests.items()}
    joining = [call for role in ("policy", "critic") for call in _join(config, cluster, started.get(role, []))]
    if environments := started.get("environment", []):
        engines = started["rollout"]
        joining += [a.call("connect", share(environments, i, len(engines))) for i, a in enumerate(engines)]
    joining += [actor.call("prepare") for actor in started["credit"]]
    everyone = [actor for actors in started.values() for actor in actors]
    cluster.ready(everyone, config.cluster.start_timeout_seconds, joining)
    [credit] = started.pop("credit")
    return Actors(credit=credit, **{"policy": [], **started})


def _join(config: Config, cluster: Cluster, actors: list[Actor]) -> list[Call]:
    """The first rank says where it can be met, then all of them load and join: the calls under way."""
    if not actors:
        return []
    [(address, port)] = gather(
        [actors[0].call("free_port", not cluster.joined)], config.cluster.start_timeout_seconds, "start of actors"
    )
    worlds = [
        World(rank, len(actors), address, port, thread_count(config), config.seed, config.train.deterministic)
        for rank in range(len(actors))
    ]
    return [actor.call("setup", world) for actor, world in zip(actors, worlds, strict=True)]
