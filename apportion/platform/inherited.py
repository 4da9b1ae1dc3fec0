"""Keeps Ray's sockets from the children of an actor.

The raylet learns of a worker's death when the worker's connection closes. A child that a user's code has forked holds
that connection too, so the death of its parent would go unnoticed until the child ends.
"""

from __future__ import annotations

import os
import stat


def keep_sockets_from_children() -> None:
    """Call it once, before any code of a user runs: what is open now is Ray's, what is opened later may be for children."""
    sockets = _sockets()
    for descriptor in sockets:
        os.set_inheritable(descriptor, False)  # for children that start another program
    os.register_at_fork(after_in_child=lambda: _drop(sockets))


def _sockets() -> dict[int, tuple[int, int]]:
    """Open sockets of this process: descriptor -> device and inode."""
    found = {}
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        identity = _socket_of(int(name))
        if identity is not None:
            found[int(name)] = identity
    return found


def _socket_of(descriptor: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(descriptor)
    except OSError:  # closed meanwhile
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None


def _drop(sockets: dict[int, tuple[int, int]]) -> None:
    """Put nothing in the place of Ray's sockets; the numbers stay taken, since Ray's own objects still hold them."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor, identity in sockets.items():
        if _socket_of(descriptor) == identity:
            os.dup2(nothing, descriptor, inheritable=False)
    os.close(nothing)
