"""What a checkpoint keeps of the loop's progress, and what a resumed run needs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apportion.loop.state import Progress
from apportion.platform.checkpoint import RunState
from apportion.platform.errors import CheckpointError, ConfigError
from apportion.platform.messages import quoted
from apportion.platform.run_state import check_values

_KEPT = (
    "accuracy_before", "accuracy_after", "answers_before", "answers_after", "stage_seconds", "samples", "rollout_tokens",
    "update_tokens", "step_seconds", "wall_seconds", "metrics",
    "sync_baseline",
)  # fmt: skip


def kept(progress: Progress) -> dict[str, Any]:
    """For `RunState.extra`; step and policy version have places of their own there."""
    return {name: getattr(progress, name) for name in _KEPT}


def progress_of(state: RunState) -> Progress:
    """CheckpointError for progress that this version does not know."""
    check_values(state.extra, Progress, "state.json: extra")
    if state.kl is not None and state.kl.keys() != {"coefficient"}:
        raise CheckpointError(
            f"state.json: kl: got {quoted(state.kl)}, expected null or a coefficient: take another checkpoint"
        )
    odd = sorted(set(state.extra) - set(_KEPT))
    if odd:
        raise CheckpointError(
            f"state.json: got extra values {', '.join(odd)}, expected at most {', '.join(_KEPT)}: resume with the version "
            "that wrote it"
        )
    return Progress(step=state.step, policy_version=state.policy_version, **state.extra)


def check_steps_left(state: RunState, steps: int, folder: Path) -> None:
    """ConfigError where the run of `steps` steps in `folder`, resumed from `state`, has nothing left to do. One that was
    stopped between its last checkpoint and its summary still has its end to do."""
    if state.step >= steps and (folder / "summary.json").is_file():
        raise ConfigError(
            f"resume: got a checkpoint of step {state.step} of {steps}, so nothing is left to do; expected train.steps "
            f"above {state.step}"
        )
