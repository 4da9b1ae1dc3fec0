"""The child process of a ready-made verifier: rewards samples one after the other and says each answer at once.

Started by `reward_process`, which kills it where a sample takes too long. It imports nothing of the caller's program.
"""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from apportion.actors.reward_call import Failure, failure_of
from apportion.data.verifiers import IN_A_PROCESS, VERIFIERS
from apportion.platform.streams import mask_output

READY = "ready"
ORPHAN_SECONDS = 5.0  # past the limit: only a child whose parent is gone comes this far


def serve(connection: Connection, verifier: str) -> None:
    """Answer each (name, limit in seconds, samples) with one element a sample, until the other end is closed.

    A sample is the verifier's keyword arguments for one completion; an element is a number or a Failure.
    """
    if (first := IN_A_PROCESS[verifier]) is not None:
        _reward(verifier, verifier, first)  # loads its library; what fails here is told of every sample
    connection.send(READY)
    while True:
        try:
            name, limit, samples = connection.recv()
        except EOFError:
            return
        for sample in samples:
            # The kernel ends this process whatever it does, should nobody be left to kill it.
            signal.setitimer(signal.ITIMER_REAL, limit + ORPHAN_SECONDS)
            connection.send(_reward(verifier, name, sample))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _reward(verifier: str, name: str, sample: dict[str, Any]) -> float | Failure | None:
    try:
        return VERIFIERS[verifier](**sample)[0]
    except BaseException as error:  # noqa: BLE001 - carried to the parent, where it fails this sample
        return failure_of(error, name)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which ends this process
    mask_output()  # its library may print what a sample holds
    serve(Connection(int(sys.argv[1])), sys.argv[2])
