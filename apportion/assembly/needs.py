"""What the algorithm asks the platform for."""

from __future__ import annotations

from dataclasses import dataclass

from apportion.algorithms import registry
from apportion.conf.schema import Config


@dataclass
class Needs:
    """What the algorithm asks the platform for."""

    policy_signals: bool
    reference: bool
    critic: bool
    groups_together: bool
    judge: bool = False


def needs_of(config: Config) -> Needs:
    algorithm = config.algorithm
    asked = registry.build("credit", algorithm.credit).needs
    in_reward = algorithm.kl.place == "reward"
    return Needs(
        policy_signals=bool(asked & {"old_logprobs", "entropies", "influences"})
        or in_reward
        or algorithm.correction.normalize  # by a mean that has to be known before the optimizer step
        or (algorithm.updates_per_batch * algorithm.epochs > 1 and algorithm.distillation is None),
        reference=algorithm.kl.place != "none" or "reference_logprobs" in asked,
        critic="values" in asked,
        groups_together="influences" in asked,
        judge="critiques" in asked,
    )
