"""What a run still saves when Ray itself is lost: for a while its actors answer without it."""

from __future__ import annotations

from collections.abc import Callable

from apportion.platform.errors import ActorError, CheckpointError, ClusterLost


def save_after_loss(lost: ClusterLost, write: Callable[[], object], warn: Callable[[str], None]) -> None:
    """Write a checkpoint if the ranks hold the weights of a whole step. It does not replace the error under way."""
    if not lost.between_steps:
        warn(f"{lost}; an update was under way, so what the ranks hold now cannot be saved")
        return
    warn(f"{lost}; saving what was trained, then the run ends")
    try:
        write()
    except (ActorError, CheckpointError, OSError) as error:
        warn(f"the checkpoint could not be written: {error}")
