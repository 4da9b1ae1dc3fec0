"""What a policy rank is told follows from the configuration."""

from __future__ import annotations

import pytest

from apportion.assembly.training import policy_requests
from apportion.cli import compose_config, to_config


@pytest.mark.parametrize("share", [True, False])
def test_policy_ranks_are_told_whether_responses_share_their_prompt(share: bool) -> None:
    config, _ = to_config(compose_config(["experiment=tiny_grpo", f"policy.share_prompts={str(share).lower()}"]))
    [request] = policy_requests(config, "model")
    assert request.arguments[0].share_prompts is share
