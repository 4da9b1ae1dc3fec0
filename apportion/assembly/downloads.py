"""Fetches the hub's models that a run needs, once a node and before any actor starts: actors would each fetch them, within the
time that they have for their start."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from apportion.actors.download import DownloadWorker
from apportion.actors.reward_sources import parse_entries
from apportion.assembly.hosts import joins
from apportion.assembly.needs import needs_of
from apportion.conf.judges import own_model
from apportion.conf.preference_schema import DpoRunConfig, PreferenceConfig
from apportion.conf.schema import Config
from apportion.conf.teachers import teacher_paths
from apportion.data.downloads import HubModel, as_json, cached_folder, needs_the_hub, on_hub
from apportion.platform.cluster import DOWNLOADING, ActorRequest, Cluster, gather
from apportion.platform.errors import ConfigError
from apportion.platform.messages import say

END_SECONDS = 5.0  # for a download that is told to end
OFFLINE = {"HF_HUB_OFFLINE": "1"}
REWARD = "reward.functions"
LOADERS = ("policy", "critic", "reference", "rollout", "judge")  # load nothing but what is fetched here


def hub_models(config: Config) -> list[HubModel]:
    """Every model of the hub that a run loads, each once."""
    needs, trust = needs_of(config), config.model.trust_remote_code
    given = {"model.path": config.model.path}
    if needs.critic and config.critic.model:
        given["critic.model"] = config.critic.model
    if needs.reference and config.reference.model:
        given["reference.model"] = config.reference.model
    if needs.judge and (judge := own_model(config.judge)):
        given["judge.model"] = judge
    given |= teacher_paths(config)
    return _once([HubModel(key, path, trust) for key, path in given.items()] + reward_models(config))


def reward_models(config: Config) -> list[HubModel]:
    """Those of the hub among the reward functions."""
    entries = parse_entries(config.reward.functions, config.reward.timeout_seconds)
    named = [(str(entry.function).partition(":"), entry.params) for entry in entries]
    return _once(
        [
            HubModel(f"{REWARD} model:{path}", path, bool(params.get("trust_remote_code")))
            for (kind, _, path), params in named
            if kind == "model"
        ]
    )


def stage_models(config: PreferenceConfig) -> list[HubModel]:
    """Every model of the hub that a preference stage loads."""
    given = {"model.path": config.model.path}
    if isinstance(config, DpoRunConfig) and config.dpo.reference:
        given["dpo.reference"] = config.dpo.reference
    return _once([HubModel(key, path, config.model.trust_remote_code) for key, path in given.items()])


def _once(models: Sequence[HubModel]) -> list[HubModel]:
    """Those of the hub, each under its first key; code is fetched if any of them may run it."""
    found: dict[str, HubModel] = {}
    for model in models:
        if on_hub(model.name):
            known = found.setdefault(model.name, model)
            found[model.name] = replace(known, remote_code=known.remote_code or model.remote_code)
    return list(found.values())


def fetch_here(config: Config | PreferenceConfig, models: Sequence[HubModel]) -> bool:
    """Fetch models to this machine in a child process, within cluster.download_timeout_seconds; True if files came. In a
    cluster that is joined the driver reads configurations and tokenizers alone. ConfigError where one cannot be had."""
    if not models:
        return False
    wanted = [replace(model, weights=not joins(config)) for model in models]
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "apportion.data.downloads"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_read, args=(child.stdout, answers), name="downloads", daemon=True).start()
    try:
        child.stdin.write(as_json(wanted) + "\n")
        child.stdin.flush()
        return _follow(answers, wanted, config.cluster.download_timeout_seconds)
    finally:
        _end(child)


def _end(child: subprocess.Popen[str]) -> None:
    """Closing its input tells it to remove what is not whole and to leave."""
    assert child.stdin is not None
    try:
        with suppress(BrokenPipeError):
            child.stdin.close()
        child.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        child.kill()
        child.wait()


def _read(lines: Any, answers: queue.Queue[dict[str, Any] | None]) -> None:
    for line in lines:
        answers.put(json.loads(line))
    answers.put(None)


def _follow(answers: queue.Queue[dict[str, Any] | None], models: Sequence[HubModel], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    names = ", ".join(model.name for model in models)
    while True:
        try:
            answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise ConfigError(
                f"cluster.download_timeout_seconds: got {seconds:g}, in which {names} did not come, expected more, or a faster "
                "way to the hub; whole files stay in the cache"
            ) from None
        if answer is None:
            raise ConfigError(f"{models[0].key}: got {names}, whose download ended without an answer; try again")
        if "error" in answer:
            raise ConfigError(answer["error"])
        if "came" in answer:
            return bool(answer["came"])
        say(answer["say"])


def fetch_on_nodes(
    cluster: Cluster, models: Sequence[HubModel], requests: dict[str, list[ActorRequest]], seconds: float
) -> None:
    """Fetch models to each node of a joined cluster that may hold an actor that loads one. ConfigError where one cannot be
    had there."""
    if not models or not cluster.joined:
        return
    keys = [model.key for model in models]
    idle: set[str] = set() if "judge.model" in keys else {"judge"}  # a service, or a function of the user's
    idle |= set() if any(key.startswith(REWARD) for key in keys) else {"reward"}
    roles = {*LOADERS, "reward"} - idle
    loading = [one for role, asked in requests.items() if role in roles for one in asked]
    nodes = cluster.nodes(gpus=all(request.gpus > 0 for request in loading))
    say(f"fetching {', '.join(model.name for model in models)} on {len(nodes)} nodes, where they are not there yet")
    asked = [ActorRequest(f"download-{i}", DownloadWorker, node=node) for i, node in enumerate(nodes)]
    workers = cluster.launch(asked)
    gather([worker.call("fetch", list(models)) for worker in workers], seconds, DOWNLOADING)
    cluster.dismiss(workers)


def from_cache(
    requests: dict[str, list[ActorRequest]], models: Sequence[HubModel], joined: bool, own_judge: bool
) -> dict[str, list[ActorRequest]]:
    """The requests with actors that load models from the cache alone, where it has everything: none asks the hub again, and
    none gets another revision than the others. Functions of the user's keep their way to the hub, and so does every actor in a
    joined cluster: it may come to a node that was added since."""
    folders = [cached_folder(model) for model in models]
    if not models or joined or any(folder is None or needs_the_hub(folder) for folder in folders):
        return requests
    roles = [role for role in LOADERS if role != "judge" or own_judge]
    return {
        role: [replace(one, environment={**(one.environment or {}), **OFFLINE}) for one in asked]
        if role in roles
        else asked
        for role, asked in requests.items()
    }
