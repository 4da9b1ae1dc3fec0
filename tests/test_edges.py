"""What surrounds a run: trackers are closed, and an error under way stays the one that is told."""

import errno

import pytest

from apportion.edges import closing
from apportion.platform.tracking import MultiTracker


class Full:
    """A vital tracker whose disk is full."""

    name, vital = "jsonl", True
    closed = 0

    def close(self):
        self.closed += 1
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_under_way_is_not_replaced_by_that_of_closing(capsys):
    tracker = Full()
    with pytest.raises(ValueError, match="the cause"), closing(MultiTracker([tracker])):
        raise ValueError("the cause")
    assert tracker.closed == 1
    assert capsys.readouterr().err == (
        "warning: the trackers could not be closed either (OSError: No space left on device)\n"
    )


def test_an_interruption_is_not_replaced_either():
    with pytest.raises(KeyboardInterrupt), closing(MultiTracker([Full()])):
        raise KeyboardInterrupt


def test_an_error_of_closing_alone_is_told():
    with pytest.raises(OSError, match="No space left on device"), closing(MultiTracker([Full()])):
        pass
