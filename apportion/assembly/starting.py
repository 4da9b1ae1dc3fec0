"""Starts the actors of every role and has them meet."""

from __future__ import annotations

from apportion.actors.engine import World
from apportion.actors.environment_client import share, sharing
from apportion.assembly.hosts import thread_count
from apportion.assembly.order import LOADS_IN_SETUP, waves
from apportion.conf.preference_schema import RanksConfig
from apportion.conf.schema import ClusterConfig, Config
from apportion.loop.state import Actors
from apportion.platform.channel import ChannelAddress
from apportion.platform.cluster import STARTING, Actor, ActorRequest, Call, Cluster, gather
from apportion.platform.messages import say


def start(config: Config, cluster: Cluster, requests: dict[str, list[ActorRequest]]) -> Actors:
    """Start every actor of every role and wait for all. They start side by side, since each spends its start on imports and
    on loading, unless `order.waves` has some wait for others. Each wave has cluster.start_timeout_seconds."""
    cluster.expect([request for asked in requests.values() for request in asked])
    order = waves({role: [request.gpus for request in asked] for role, asked in requests.items()})
    if len(order) > 1:
        say("engines first: they share a GPU")
    started: dict[str, list[Actor]] = {role: [] for role in requests}
    for number, wave in enumerate(order):
        new = []
        for role, asked in requests.items():
            # What loads in `setup` may come up, import and wait before its turn.
            due = [one for i, one in enumerate(asked) if (number == 0 if role in LOADS_IN_SETUP else (role, i) in wave)]
            launched = cluster.launch(due)
            started[role] += launched
            new += launched
        joining = []
        for role in LOADS_IN_SETUP:
            if (role, 0) in wave:
                gpus = getattr(config.cluster, f"gpus_per_{role}_rank")
                threads = thread_count(config.cluster, gpus)
                joining += join(
                    cluster, started[role], config.cluster, config.seed, config.train.deterministic, threads
                )
        if number == len(order) - 1:
            joining += _meetings(config, cluster, started)
        cluster.ready(new, config.cluster.start_timeout_seconds, joining)
    [credit] = started.pop("credit")
    return Actors(credit=credit, **{"policy": [], **started})


def _meetings(config: Config, cluster: Cluster, started: dict[str, list[Actor]]) -> list[Call]:
    """What actors of several roles do together before the first step: the calls under way."""
    calls = []
    if environments := started.get("environment", []):
        engines = started["rollout"]
        owners = sharing(len(environments), len(engines))
        calls += [a.call("connect", share(environments, i, len(engines)), owners) for i, a in enumerate(engines)]
    calls += [actor.call("prepare") for actor in started["credit"]]
    if config.cluster.weight_transfer == "broadcast" and started.get("policy"):
        calls += _channel(config, cluster, started["policy"][0], started["rollout"])
    return calls


def join(
    cluster: Cluster,
    actors: list[Actor],
    settings: ClusterConfig | RanksConfig,
    seed: int,
    deterministic: bool,
    threads: int,
) -> list[Call]:
    """The first rank says where it can be met, then all of them load and join: the calls under way. `threads` is what each
    of them has."""
    if not actors:
        return []
    address, port = _meeting_point(cluster, actors[0], settings.start_timeout_seconds)
    # Ranks wait for each other no less long than anyone waits for them.
    seconds = max(settings.start_timeout_seconds, settings.call_timeout_seconds)
    worlds = [
        World(rank, len(actors), address, port, threads, seed, deterministic, seconds) for rank in range(len(actors))
    ]
    return [actor.call("setup", world) for actor, world in zip(actors, worlds, strict=True)]


def _channel(config: Config, cluster: Cluster, trainer: Actor, engines: list[Actor]) -> list[Call]:
    """The trainer's first rank and every worker of every engine join one channel for the weights: the calls under way."""
    workers = config.rollout.tensor_parallel_size
    host, port = _meeting_point(cluster, trainer, config.cluster.start_timeout_seconds)
    backend = "nccl" if config.cluster.gpus_per_policy_rank else "gloo"
    address = ChannelAddress(host, port, 1 + workers * len(engines), backend, config.cluster.call_timeout_seconds)
    calls = [trainer.call("join_channel", address)]
    return calls + [a.call("join_channel", address, 1 + workers * i) for i, a in enumerate(engines)]


def _meeting_point(cluster: Cluster, actor: Actor, timeout_seconds: float) -> tuple[str, int]:
    """An address and a free port of an actor's node."""
    call = actor.call("free_port", not cluster.joined)
    return gather([call], timeout_seconds, STARTING)[0]
