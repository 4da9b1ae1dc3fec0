"""The HTTP client for reward services and judges. It trusts nothing that a service answers.

A request has one deadline for everything: lookup, connection, TLS, headers, and the whole answer. An answer has a limit
on its bytes after unpacking, on the values in its JSON, and on their nesting. Redirects are not followed. Proxies are
those of the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY). Nothing of a header, of an address's user part
or query, or of an answer's body is in an error.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.request import getproxies, proxy_bypass

from apportion.platform.addresses import address_problem, shown_url
from apportion.platform.errors import ConfigError

if TYPE_CHECKING:
    import httpcore

FIRST_PAUSE_SECONDS = 0.25  # before the first retry; doubles with each
RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
FAILS_ON_REQUEST = 500  # the one of these that a service gives which is there, and cannot do with this request
DEEPEST = 32  # lists and mappings inside one another in an answer
ERROR_BYTES = 2**16  # that are read of an answer whose status is not 200
KEEP_ALIVE_SECONDS = 5.0


class Refused(Exception):
    """The service answered in a way that asking again will not change.

    `reason` is "malformed" for an answer of another form than was asked for, else "refused", or what a caller knows.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class FailedOnRequest(ConnectionError):
    """The service answered that it failed on this request. Another attempt may help; waiting for the service does not."""


@dataclass(frozen=True)
class Room:
    """What an answer may take: what the request can need, and a constant for the rest of it."""

    size: int  # bytes, after unpacking
    values: int  # in its JSON

    def __add__(self, other: Room) -> Room:
        return Room(self.size + other.size, self.values + other.values)

    def times(self, count: int) -> Room:
        return Room(count * self.size, count * self.values)


class Answer(NamedTuple):
    status: int
    body: bytes  # of a status other than 200, its first ERROR_BYTES


class _Route(NamedTuple):
    target: httpcore.URL
    pool: httpcore.ConnectionPool
    user: dict[str, str]  # the header that the address's user part becomes


def check_status(status: int, shown: str) -> None:
    """ConnectionError for a status after which a request is made again."""
    if status in RETRIED_STATUS:
        raise (FailedOnRequest if status == FAILS_ON_REQUEST else ConnectionError)(f"{shown}: status {status}")


def secret_header(variable: str, key: str) -> str:
    """What an environment variable holds for a header; "" where it is not set."""
    value = os.environ.get(variable, "").strip()
    if not (value.isascii() and value.isprintable()):
        raise ConfigError(
            f"{key}: got {variable} with a character that an HTTP header cannot have, expected printable ASCII in it"
        )
    return value


class ServiceClient:
    """Sends JSON to services and reads what they answer. Threads may share it; each waits for its own request.

    `headers` go with every request. The user part of an address becomes an Authorization header where `sends_user`.
    """

    def __init__(
        self,
        urls: Iterable[str],
        headers: Mapping[str, str],
        connections: int = 100,
        idle_connections: int | None = 20,
        sends_user: bool = True,
    ) -> None:
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)  # below that they write addresses in full
        self._headers = {
            "Accept": "*/*",
            "Accept-Encoding": "gzip, deflate",
            "User-Agent": "apportion",
            "Content-Type": "application/json",
        } | dict(headers)
        self._connections, self._idle_connections, self._sends_user = connections, idle_connections, sends_user
        self._pools: dict[tuple[str, str], httpcore.ConnectionPool] = {}
        self._routes = {url: self._route(url) for url in urls if address_problem(url) is None}

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def post(self, url: str, content: bytes, deadline: float, room: Room) -> Answer:
        """One request. `deadline` is a value of time.monotonic.

        ConnectionError where another attempt may help, Refused where not.
        """
        import httpcore

        if url not in self._routes:
            raise ConnectionError(f"got an address {address_problem(url)}")
        route, shown = self._routes[url], shown_url(url)
        left = min(max(0.001, deadline - time.monotonic()), 1e6)
        waits = {"connect": deadline, "read": deadline, "write": deadline, "pool": left}
        headers = list((self._headers | route.user).items())
        try:
            with route.pool.stream(
                "POST", route.target, headers=headers, content=content, extensions={"timeout": waits}
            ) as response:
                return Answer(response.status, _body(response, room.size, shown))
        except (
            httpcore.TimeoutException,
            httpcore.NetworkError,
            httpcore.ProtocolError,
            httpcore.ProxyError,
            httpcore.ConnectionNotAvailable,
        ) as error:  # its text may name the address in full
            raise ConnectionError(f"{shown}: {type(error).__name__}") from None

    def _route(self, url: str) -> _Route:
        import httpcore
        import httpx

        parts = httpx.URL(url)
        target = httpcore.URL(scheme=parts.raw_scheme, host=parts.raw_host, port=parts.port, target=parts.raw_path)
        user = {}
        if self._sends_user and parts.userinfo:
            user = {"Authorization": _basic(parts.username, parts.password)}
        kind = (parts.scheme, _proxy_of(parts.scheme, parts.host))
        if kind not in self._pools:
            self._pools[kind] = self._pool(*kind)
        return _Route(target, self._pools[kind], user)

    def _pool(self, scheme: str, proxy: str) -> httpcore.ConnectionPool:
        """Connections through a proxy; "" is none."""
        import httpcore
        import httpx

        from apportion.actors.service_network import TimedBackend

        through = None
        if proxy:
            parts = httpx.URL(proxy)
            through = httpcore.Proxy(
                httpcore.URL(scheme=parts.raw_scheme, host=parts.raw_host, port=parts.port, target=parts.raw_path),
                auth=(parts.username.encode(), parts.password.encode()) if parts.userinfo else None,
            )
        return httpcore.ConnectionPool(
            ssl_context=httpx.create_ssl_context() if scheme == "https" else None,
            proxy=through,
            max_connections=self._connections,
            max_keepalive_connections=self._idle_connections,
            keepalive_expiry=KEEP_ALIVE_SECONDS,
            network_backend=TimedBackend(),
        )


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _proxy_of(scheme: str, host: str) -> str:
    """The proxy that the environment names for this host, or ""; ConfigError for one that cannot be used."""
    proxies = getproxies()
    kind = scheme if proxies.get(scheme) else "all"
    proxy = proxies.get(kind)
    if not proxy or proxy_bypass(host):
        return ""
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    socks = proxy.startswith(("socks5://", "socks5h://"))
    if socks and find_spec("socksio") is None:
        problem = "that begins with socks5, which needs the Python package socksio"
    else:
        problem = address_problem("http" + proxy[proxy.index("://") :] if socks else proxy) or ""
    if problem:
        raise ConfigError(
            f"environment variable {kind.upper()}_PROXY: got an address {problem}, expected http://HOST:PORT, or "
            "NO_PROXY with the service's host"
        )
    return proxy


def _body(response: httpcore.Response, most: int, shown: str) -> bytes:
    """The unpacked body; Refused past `most` bytes. Of a status other than 200, what its first bytes are."""
    import httpcore

    body = bytearray()
    try:
        unpack = _unpacker(response.headers)
        for piece in response.iter_stream():
            body += unpack(piece, (most if response.status == 200 else ERROR_BYTES) + 1 - len(body))
            if response.status != 200 and len(body) > ERROR_BYTES:
                break
            if len(body) > most:
                raise Refused("refused", f"{shown}: the answer is longer than {most:,} bytes")
    except _Unpackable as error:
        if response.status == 200:
            raise Refused("malformed", f"{shown}: the answer {error}") from None
    except httpcore.TimeoutException:
        raise ConnectionError(f"{shown}: the answer was not whole in time") from None
    return bytes(body)


class _Unpackable(Exception):
    """An answer that is packed in a way that cannot be undone."""


def _unpacker(headers: Iterable[tuple[bytes, bytes]]) -> Any:
    """A function (bytes of the answer, most bytes wanted) -> unpacked bytes, at most so many."""
    encodings = [
        part.strip().lower()
        for name, value in headers
        if name.lower() == b"content-encoding"
        for part in value.split(b",")
        if part.strip().lower() not in (b"", b"identity")
    ]
    if not encodings:
        return lambda piece, _most: piece
    if encodings not in ([b"gzip"], [b"x-gzip"], [b"deflate"]):
        raise _Unpackable("has a Content-Encoding other than one of gzip and deflate, which were asked for")
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | (0 if encodings == [b"deflate"] else 16))
    started = False

    def unpack(piece: bytes, most: int) -> bytes:
        nonlocal unpacker, started
        if unpacker.eof:
            raise _Unpackable("goes on after the end of what is packed")
        try:
            return unpacker.decompress(piece, most)
        except zlib.error:
            if started or encodings != [b"deflate"]:
                raise _Unpackable("is packed, and damaged") from None
            unpacker = zlib.decompressobj(-zlib.MAX_WBITS)  # some services leave out zlib's header
            return unpack(piece, most)
        finally:
            started = True

    return unpack


def parse_answer(body: bytes, room: Room) -> Any:
    """The JSON of an answer; ValueError that says, without quoting it, why it is not read."""
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > room.values:
        raise ValueError(f"has more than {room.values:,} values")
    try:
        value = json.loads(body, object_pairs_hook=_without_doubles)
    except RecursionError:
        raise ValueError(f"is nested more than {DEEPEST} deep") from None
    except UnicodeDecodeError:
        raise ValueError("is no text") from None
    except _Doubled:
        raise ValueError("has a key twice in one object") from None
    except ValueError:
        raise ValueError("is no JSON") from None
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [child for part in level if isinstance(part, dict | list) for child in _children(part)]
    if level:
        raise ValueError(f"is nested more than {DEEPEST} deep")
    return value


class _Doubled(ValueError):
    pass


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Doubled
    return found


def _children(part: dict | list) -> Iterable[Any]:
    return part.values() if isinstance(part, dict) else part
