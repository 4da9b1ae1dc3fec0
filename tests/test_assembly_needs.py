"""What an algorithm asks the platform for: passes of their own, and the actors that make them."""

from __future__ import annotations

from functools import cache

import pytest
from omegaconf import OmegaConf

from apportion.assembly.needs import Needs, needs_of
from apportion.cli import compose_config, to_config

NOTHING = {"policy_signals": False, "reference": False, "critic": False, "groups_together": False, "judge": False}
KL = "algorithm.kl={place: loss, coefficient: 0.1}"


@cache
def composition(algorithm: str):
    return compose_config(["experiment=tiny_grpo", f"algorithm={algorithm}"])


def needs(algorithm: str, *overrides: str) -> Needs:
    return needs_of(to_config(OmegaConf.merge(composition(algorithm), OmegaConf.from_dotlist([*overrides])))[0])


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (["grpo"], []),
        (["grpo", "algorithm.updates_per_batch=2"], ["policy_signals"]),
        (["grpo", "algorithm.epochs=2"], ["policy_signals"]),
        (["grpo", "algorithm.correction.normalize=true"], ["policy_signals"]),
        (["grpo", KL], ["reference"]),
        (["grpo", KL, "algorithm.kl.place=reward"], ["policy_signals", "reference"]),
        (["ppo"], ["policy_signals", "reference", "critic"]),
        (["ppo", "algorithm.kl={place: none, coefficient: 0}"], ["critic"]),
        (["thr"], ["policy_signals", "groups_together"]),
        (["poad", "algorithm.updates_per_batch=1"], ["critic"]),
        (["capo"], ["judge"]),
        (["aligndistil"], []),
        # Whole distributions are compared with the teachers' as they are now: no ratio, so no log-probs from before.
        (["aligndistil", "algorithm.epochs=2"], []),
        (["aligndistil", "algorithm.updates_per_batch=2"], []),
    ],
    ids=" ".join,
)
def test_old_log_probs_are_a_pass_of_their_own_only_where_something_reads_them(words, needed):
    assert vars(needs(*words)) == NOTHING | dict.fromkeys(needed, True)
