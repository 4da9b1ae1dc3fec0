"""Where ranks meet: nobody from outside may, and nobody may take the port before."""

import os
import socket
from datetime import timedelta

import psutil
import pytest

from apportion.platform.rendezvous import hold_port, open_store

LIMIT = timedelta(seconds=20)


def listening(port: int) -> list[str]:
    """Addresses on which this process listens at `port`."""
    found = psutil.Process(os.getpid()).net_connections(kind="tcp")
    return [c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN and c.laddr.port == port]


def test_a_store_listens_on_its_address_alone_and_serves_its_members():
    port = hold_port("127.0.0.1")
    served = open_store("127.0.0.1", port, 2, True, LIMIT, wait=False)
    assert listening(port) == ["127.0.0.1"]
    joined = open_store("127.0.0.1", port, 2, False, LIMIT, wait=False)
    joined.set("word", "3")
    assert served.get("word") == b"3"


def test_a_held_port_is_nobody_elses_until_it_is_used():
    port = hold_port("127.0.0.1")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5)  # it does not answer before it is a store
    store = open_store("127.0.0.1", port, 1, True, LIMIT, wait=False)
    socket.create_connection((store.host, store.port), timeout=5).close()


def test_a_first_member_without_a_held_port_takes_one():
    store = open_store("127.0.0.1", 0, 1, True, LIMIT, wait=False)
    assert store.port > 0 and listening(store.port) == ["127.0.0.1"]
