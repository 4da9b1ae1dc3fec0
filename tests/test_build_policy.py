"""What a policy rank is told follows from the configuration."""

from __future__ import annotations

import pytest

from apportion.assembly.training import critic_requests, policy_requests
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


def test_the_policys_schedule_is_laid_over_the_steps_that_train_it() -> None:
    words = ["experiment=tiny_ppo", "train.steps=10", "critic.warmup_steps_without_policy=4", "algorithm.epochs=3"]
    config, _ = to_config(compose_config(words))
    [policy], [critic] = policy_requests(config, "builtin:tiny"), critic_requests(config, "builtin:tiny")
    assert (policy.arguments[0].total_optimizer_steps, critic.arguments[0].total_optimizer_steps) == (18, 30)
    assert policy_spec("critic.warmup_steps_without_policy=2").total_optimizer_steps == 3  # GRPO has no critic
