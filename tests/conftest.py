"""What many tests share: the tiny model's folder, a batch ready for an update, a stand-in for what the command line runs."""

import os
import signal
import sys
import tempfile
import types

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; read when numpy and torch are imported
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["GOMP_SPINCOUNT"] = "0"  # the engines of two runs at once would keep each other from the cores

# The key that signs the runs of tests is not the user's; the workers of one session share it.
os.environ.setdefault(
    "APPORTION_IDENTITY", os.path.join(tempfile.gettempdir(), f"apportion-test-identity-{os.getuid()}")
)

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # as a shell's background job has it, and so the runs that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
from hypothesis import settings

from apportion.batch import Batch, Trajectory
from apportion.data.builtin import resolve_model
from apportion.platform.known_secrets import NAMES, known

settings.register_profile("same", derandomize=True, database=None)  # the same examples every time, on every machine
settings.load_profile("same")

TINY_VOCABULARY = 264


@pytest.fixture(scope="session")
def tiny() -> str:
    """The folder of a model of 0.2M parameters."""
    return resolve_model("builtin:tiny")


@pytest.fixture(scope="session")
def credited() -> Batch:
    """Eight trajectories of 3 to 12 response tokens in four groups, with log-probs, advantages and token-mean weights.

    Two optimiser steps; trajectory 5 has an environment's tokens in its middle.
    """
    rng = np.random.default_rng(7)
    trajectories = []
    for index, (prompt, response) in enumerate([(4, 9), (4, 3), (7, 12), (7, 5), (3, 8), (3, 10), (6, 4), (6, 7)]):
        mask = np.ones(response, bool)
        if index == 5:
            mask[4:6] = False
        shared = np.random.default_rng(index // 2).integers(8, TINY_VOCABULARY, prompt)
        sampled = rng.integers(8, TINY_VOCABULARY, response)
        trajectories.append(
            Trajectory(
                prompt_id=f"p{index // 2}",
                group_id=index // 2,
                sample_index=index % 2,
                token_ids=np.concatenate([shared, sampled]).astype(np.int32),
                prompt_length=prompt,
                action_mask=mask,
                turn_ids=np.where(mask, 0, -1).astype(np.int32),
                behavior_logprobs=np.where(mask, rng.normal(-3, 0.5, response), np.nan).astype(np.float32),
                policy_version=0,
                finish_reason="stop",
                text="x",
            )
        )
    batch = Batch.from_trajectories(trajectories)
    tokens, mask = len(batch.action_mask), batch.action_mask
    batch.rewards = rng.integers(0, 2, len(batch)).astype(np.float64)
    batch.sample_mask = np.ones(len(batch), bool)
    batch.minibatch_ids = np.array([0, 0, 1, 1, 0, 0, 0, 0], np.int32)
    batch.advantages = np.where(mask, rng.normal(0, 1, tokens), 0).astype(np.float32)
    batch.old_logprobs = np.where(mask, rng.normal(-5.5, 0.3, tokens), 0).astype(np.float32)
    batch.reference_logprobs = np.where(mask, rng.normal(-5.5, 0.3, tokens), 0).astype(np.float32)
    batch.returns = np.where(mask, rng.normal(0, 1, tokens), 0).astype(np.float32)
    batch.values = np.where(mask, rng.normal(0, 1, tokens), 0).astype(np.float32)
    step_of_token = np.repeat(batch.minibatch_ids, batch.response_lengths)
    totals = np.array([(mask & (step_of_token == step)).sum() for step in (0, 1)])
    batch.loss_weights = np.where(mask, 1.0 / totals[step_of_token], 0).astype(np.float32)
    batch.value_weights = batch.loss_weights.copy()
    return batch


@pytest.fixture(autouse=True)
def built_for_cpus(request, monkeypatch):
    """What is planned in a test does not depend on which vLLM is installed where it runs."""
    if request.node.get_closest_marker("system") is None:
        monkeypatch.setattr("apportion.conf.devices.version", lambda name: "0+cpu")


@pytest.fixture(autouse=True)
def no_known_secrets(monkeypatch):
    """A test knows none of another one's."""
    monkeypatch.setattr(known, "_values", {})
    monkeypatch.setattr(known, "_names", frozenset())
    monkeypatch.setattr(known, "_state", None)
    monkeypatch.delenv(NAMES, raising=False)


@pytest.fixture
def build(monkeypatch):
    """Stands for apportion.build: keeps what it is given, and does what a test tells it."""
    calls = []
    module = types.ModuleType("apportion.build")
    module.outcome = lambda: 0
    module.calls = calls

    def train(config, resolved):
        calls.append(("train", config, resolved))
        return module.outcome()

    def evaluate(config, checkpoint):
        calls.append(("evaluate", config, checkpoint))
        return module.outcome()

    module.train, module.evaluate = train, evaluate
    monkeypatch.setitem(sys.modules, "apportion.build", module)
    return module
