"""What a policy rank is told follows from the configuration."""

from __future__ import annotations

import pytest

from apportion.assembly.training import policy_requests
from apportion.cli import compose_config, to_config


def policy_spec(*overrides: str):
    config, _ = to_config(compose_config(["experiment=tiny_grpo", *overrides]))
    [request] = policy_requests(config, "model")
    return request.arguments[0]


def test_policy_ranks_are_told_how_a_kl_in_the_loss_is_made() -> None:
    loss = policy_spec("algorithm.kl={place: loss, coefficient: 0.1, straight_through: true}").loss
    assert (loss.kl_in_loss, loss.kl_estimator, loss.kl_straight_through) == (True, "k3", True)
    assert not policy_spec("algorithm.kl={place: loss, coefficient: 0.1}").loss.kl_straight_through


@pytest.mark.parametrize("share", [True, False])
def test_policy_ranks_are_told_whether_responses_share_their_prompt(share: bool) -> None:
    assert policy_spec(f"policy.share_prompts={str(share).lower()}").share_prompts is share
