"""Where processes of a group meet: a store that listens on one address alone, on a port kept since it was named.

torch's own rendezvous listens on every interface of the machine, without a password, on a port that anybody may have
taken between its being found free and its being used.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

_held: dict[int, socket.socket] = {}


def hold_port(address: str) -> int:
    """A port of `address` that stays this process's until `open_store` listens on it."""
    listener = _bound(address, 0)
    port = listener.getsockname()[1]
    _held[port] = listener
    return port


def open_store(address: str, port: int, members: int, first: bool, limit: timedelta, wait: bool = True) -> Any:
    """The group's TCPStore. The `first` member serves it, on `port` (0: any that is free); the others connect. `wait`:
    until all members are there. RuntimeError after `limit`."""
    from torch.distributed import TCPStore

    descriptor = None
    if first:
        listener = _held.pop(port, None) or _bound(address, port)
        port, descriptor = listener.getsockname()[1], listener.detach()  # the store closes it
    return TCPStore(address, port, members, first, limit, wait_for_workers=wait, master_listen_fd=descriptor)


def _bound(address: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        listener.bind((address, port))
    except OSError:
        listener.close()
        raise
    return listener
