"""Errors a user meets. Each says in one line what was got, what was expected and what to do; all survive pickling."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ApportionError(Exception):
    """Base of every error that the command line shows as one line, without a traceback."""

    told = False  # it has been printed

    def __reduce__(self) -> tuple:
        return (type(self), self.args)


class ConfigError(ApportionError):
    """A configuration that cannot run."""


class DataError(ApportionError):
    """A data source or row that cannot be used; the message carries file and line."""


class RewardError(ApportionError):
    """Rewards or critiques that a run cannot go on with: too many failed (the message says why), or none teaches."""


class ActorError(ApportionError):
    """An actor died, failed or is late; the message names it, the cause and its last log lines."""


class ClusterLost(ActorError):
    """Ray itself died or hangs; actors may still answer for a while."""

    between_steps = True  # the ranks hold the weights of a whole step, so a checkpoint may be written


class WeightSyncError(ApportionError):
    """A rollout engine does not hold the trainer's weights; the message names the tensors."""


class TrainingError(ApportionError):
    """An update that spoilt the weights; the message says which, and what to go on from."""


class CheckpointError(ApportionError):
    """A checkpoint could not be written or read."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` or an empty string.

    >>> nearest("grop", ["grpo", "rloo"])
    " (did you mean 'grpo'?)"
    """
    close = difflib.get_close_matches(name, [str(v) for v in valid], n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
