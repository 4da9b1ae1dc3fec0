"""What surrounds a run: trackers are closed, and an error under way stays the one that is told."""

import errno

import pytest

from apportion.edges import closing, system_errors
from apportion.platform.errors import ApportionError
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


def test_what_the_system_refuses_is_one_line_and_a_librarys_own_error_keeps_its_traceback():
    with (
        pytest.raises(ApportionError, match=r"^runs/a: got OSError: No space left on device, expected the system to"),
        system_errors(),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a")
    for error in (
        ConnectionError("refused by j"),
        TimeoutError("late"),
        FileNotFoundError(errno.ENOENT, "none", "rows.txt"),
    ):
        with pytest.raises(type(error)), system_errors():
            raise error
