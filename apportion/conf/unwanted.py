"""Settings that are allowed and surely not wanted. The plan and the start of a run say so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apportion.conf.schema import Config

if TYPE_CHECKING:
    from apportion.conf.preference_schema import PreferenceConfig


def unwanted(config: Config | PreferenceConfig, needs: frozenset[str] = frozenset()) -> list[str]:
    """One note for each, with its key. `needs` are the signals that the algorithm asks for."""
    notes = []
    if config.policy.learning_rate == 0:
        notes.append("policy.learning_rate is 0: the weights of the policy do not change")
    if not isinstance(config, Config):
        return notes
    if "values" in needs and config.critic.learning_rate == 0:
        notes.append("critic.learning_rate is 0: the weights of the critic do not change")
    if config.reward.clip == 0:
        notes.append("reward.clip is 0: every reward is 0")
    return notes
