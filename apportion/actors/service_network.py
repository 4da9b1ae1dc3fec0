"""The network below the HTTP client: every wait of a request ends at one point in time.

httpcore knows a limit for each read and each write. An answer that arrives byte by byte, headers without end and a
server that reads slowly never reach such a limit. Here the "timeout" that httpcore hands on is a deadline, a value of
`time.monotonic`, and each wait has what is left until it.
"""

from __future__ import annotations

import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from typing import Any

import httpcore

LONGEST_WAIT = 1e6  # seconds; a socket takes no limit above 2^31 ms
PIECE = 16 * 1024  # bytes of one write, so that a slow reader is noticed


def _left(deadline: float | None, late: type[httpcore.TimeoutException]) -> float:
    """Seconds until the deadline; `late` is raised where it is over."""
    assert deadline is not None
    left = deadline - time.monotonic()
    if left <= 0:
        raise late("the time for the request is over")
    return min(left, LONGEST_WAIT)


class TimedBackend(httpcore.SyncBackend):
    """Connects within the time that is left, name lookup included. Where a name has several addresses, each has its share."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = _addresses(host, port, _left(timeout, httpcore.ConnectTimeout))
        problem: Exception = httpcore.ConnectError("the name has no address")
        for number, address in enumerate(addresses):
            share = _left(timeout, httpcore.ConnectTimeout) / (len(addresses) - number)
            try:
                return _TimedStream(super().connect_tcp(address, port, share, local_address, socket_options))
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                problem = error
        raise problem


def _addresses(host: str, port: int, seconds: float) -> list[str]:
    """The IP addresses of a name. The lookup runs in a thread, as the system's has no limit."""
    try:
        ipaddress.ip_address(host)
        return [host]
    except ValueError:
        pass
    found: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found.put([str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)])
        except (OSError, UnicodeError) as error:
            found.put(error)

    threading.Thread(target=look_up, name="name-lookup", daemon=True).start()
    try:
        answer = found.get(timeout=seconds)
    except queue.Empty:
        raise httpcore.ConnectTimeout("the name is looked up for too long") from None
    if isinstance(answer, Exception):
        raise httpcore.ConnectError(str(answer)) from None
    return list(dict.fromkeys(answer))


class _TimedStream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), PIECE):
            self._stream.write(buffer[start : start + PIECE], _left(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        left = _left(timeout, httpcore.ConnectTimeout)
        return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, left))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
