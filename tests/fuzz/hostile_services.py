"""Servers that answer HTTP requests in every wrong way: slow, endless, packed, nested, broken.

`KINDS` are the ways, by name. Each takes the socket after the request was read, and a generator of random numbers. What
it sends is bounded by the client, which has to hang up, or by `GIVEN_UP_AFTER` seconds.
"""

from __future__ import annotations

import gzip
import json
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator

Sender = Callable[[socket.socket, random.Random], None]
GIVEN_UP_AFTER = 20.0
SECRET = "sesame-in-the-body"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def reply(body: bytes, headers: bytes = b"", status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 " + status + b"\r\n" + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


def rewards(values: str) -> bytes:
    return b'{"rewards": ' + values.encode("utf-8", "surrogatepass") + b"}"


def says(data: bytes) -> Sender:
    return lambda connection, draw: connection.sendall(data)


def endlessly(start: bytes, piece: bytes, pause: float = 0.0) -> Sender:
    def send(connection: socket.socket, draw: random.Random) -> None:
        connection.sendall(start)
        end = time.monotonic() + GIVEN_UP_AFTER
        while time.monotonic() < end:
            connection.sendall(piece)
            time.sleep(pause)

    return send


def reset_after(data: bytes) -> Sender:
    def send(connection: socket.socket, draw: random.Random) -> None:
        connection.sendall(data)
        time.sleep(0.05)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return send


def silent(connection: socket.socket, draw: random.Random) -> None:
    connection.settimeout(GIVEN_UP_AFTER)
    connection.recv(1)  # until the client hangs up


def random_bytes(connection: socket.socket, draw: random.Random) -> None:
    connection.sendall(draw.randbytes(draw.choice((1, 10, 1000, 300_000))))


def mangled(connection: socket.socket, draw: random.Random) -> None:
    """A sound answer with some bytes changed, left out or repeated."""
    data = bytearray(reply(rewards("[1.0, 0.5]"), b"Content-Type: application/json\r\n"))
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(data))
        data[at : at + draw.choice((0, 1, 3))] = draw.randbytes(draw.choice((0, 1, 2, 40)))
    connection.sendall(data)


def in_random_pieces(connection: socket.socket, draw: random.Random) -> None:
    """A sound answer that arrives in pieces, which is no fault."""
    data = reply(rewards("[1.0, 0.5]"))
    while data:
        size = draw.randint(1, 40)
        connection.sendall(data[:size])
        data = data[size:]
        time.sleep(0.002)


def bomb(wbits: int) -> bytes:
    """A few hundred KB that unpack to 200 MB of numbers."""
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    parts = [packer.compress(b'{"rewards": [')]
    parts += [packer.compress(b"1," * 500_000) for _ in range(200)]
    return b"".join([*parts, packer.compress(b"1]}"), packer.flush()])


def packed(body: bytes, encoding: bytes) -> bytes:
    return reply(body, b"Content-Encoding: " + encoding + b"\r\n")


_GZIP, _ZLIB, _RAW = bomb(31), bomb(15), bomb(-15)
_SOUND = rewards("[1.0, 0.5]")
_CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"

# An answer with two rewards, which is no fault.
SOUND: dict[str, Sender] = {
    "sound": says(reply(_SOUND)),
    "chunked": says(_CHUNKED + b"%x\r\n" % len(_SOUND) + _SOUND + b"\r\n0\r\n\r\n"),
    "until the end": says(OK + b"\r\n" + _SOUND),
    "gzip": says(packed(gzip.compress(_SOUND), b"gzip")),
    "deflate": says(packed(zlib.compress(_SOUND), b"deflate")),
    "raw deflate": says(packed(zlib.compress(_SOUND)[2:-4], b"deflate")),
    "some 1xx before": says(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 3 + reply(_SOUND)),
    "in pieces": in_random_pieces,
    "another version": says(b"HTTP/9.9 200 OK\r\n\r\n" + _SOUND),
    "another type": says(reply(_SOUND, b"Content-Type: image/png\r\n")),
    "UTF-16": says(reply(_SOUND.decode().encode("utf-16"))),
    "more than rewards": says(reply(b'{"why": ["' + b"x, " * 500 + b'", null], "rewards": [1.0, 5e-1]}')),
}
BROKEN: dict[str, Sender] = {
    "nothing": says(b""),
    "silence": silent,
    "random bytes": random_bytes,
    "mangled": mangled,
    "no HTTP": says(b"SSH-2.0-OpenSSH_9.6 " + SECRET.encode() + b"\r\n"),
    "HTTP/0.9": says(_SOUND),
    "status 000": says(reply(_SOUND, status=b"000 X")),
    "status 99999": says(reply(_SOUND, status=b"99999 X")),
    "status 101": endlessly(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", b"x" * 9999),
    "TLS": says(b"\x15\x03\x01\x00\x02\x02\x28"),
    "reset at once": reset_after(b""),
    "reset in headers": reset_after(OK[:30]),
    "reset in the body": reset_after(OK + b"Content-Length: 1000\r\n\r\n" + _SOUND),
    "slow status line": endlessly(b"H", b"T", 0.02),
    "slow headers": endlessly(OK + b"X: ", b"y", 0.02),
    "slow continuation": endlessly(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.02),
    "slow body": endlessly(OK + b"Content-Length: 1000\r\n\r\n", b" ", 0.02),
    "slow chunks": endlessly(_CHUNKED, b"1\r\n \r\n", 0.02),
    "slow chunk header": endlessly(_CHUNKED, b"0", 0.02),
    "slow trailer": endlessly(_CHUNKED + b"0\r\nX: ", b"y", 0.02),
    "endless headers": endlessly(OK, b"X-%s: y\r\n" % (b"x" * 100)),
    "endless header": endlessly(OK + b"X: ", b"y" * 10_000),
    "endless 1xx": endlessly(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 500),
    "endless body": endlessly(OK + b"\r\n", b"[" * 65536),
    "endless chunks": endlessly(_CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"),
    "endless chunk extension": endlessly(_CHUNKED + b"1;x=", b"y" * 65536),
    "endless trailer": endlessly(_CHUNKED + b"0\r\n", b"X: y\r\n" * 999),
    "endless body of an error": endlessly(b"HTTP/1.1 418 X\r\n\r\n", SECRET.encode() * 999),
    "endless gzip": endlessly(OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(_SOUND), b"\0" * 65536),
    "empty gzip blocks": endlessly(
        OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"")[:10], b"\x00\x00\x00\xff\xff" * 9999
    ),
    "gzip bomb": says(packed(_GZIP, b"gzip")),
    "deflate bomb": says(packed(_ZLIB, b"deflate")),
    "raw deflate bomb": says(packed(_RAW, b"deflate")),
    "gzip of a gzip bomb": says(packed(gzip.compress(_GZIP), b"gzip, gzip")),
    "many encodings": says(packed(_SOUND, b", ".join([b"gzip"] * 5000))),
    "two encoding headers": says(packed(_GZIP, b"gzip\r\nContent-Encoding: gzip")),
    "br": says(packed(_SOUND, b"br")),
    "zstd": says(packed(_SOUND, b"zstd")),
    "unknown encoding": says(packed(_SOUND, SECRET.encode())),
    "no gzip": says(packed(_SOUND, b"gzip")),
    "damaged gzip": says(packed(gzip.compress(_SOUND)[:-20] + b"x" * 30, b"gzip")),
    "half a gzip": says(packed(gzip.compress(_SOUND)[:20], b"gzip")),
    "too short a length": says(reply(_SOUND).replace(b"Length: 23", b"Length: 5")),
    "too long a length": says(OK + b"Content-Length: 999\r\n\r\n" + _SOUND),
    "length of 5,000 digits": says(OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n" + _SOUND),
    "length below 0": says(OK + b"Content-Length: -1\r\n\r\n" + _SOUND),
    "two lengths": says(OK + b"Content-Length: 5\r\nContent-Length: 9\r\n\r\n" + _SOUND),
    "chunk of no size": says(_CHUNKED + b"zz\r\n" + _SOUND),
    "chunk of a huge size": says(_CHUNKED + b"f" * 20 + b"\r\n" + _SOUND),
    "redirect": says(reply(b"", b"Location: http://127.0.0.1:1/?sesame-in-the-body\r\n", b"302 Found")),
    "redirect to itself": says(reply(b"", b"Location: /score\r\n", b"307 X")),
    "204": says(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "401": says(reply(SECRET.encode(), b"WWW-Authenticate: Digest realm=x\r\n", b"401 X")),
    "503": says(reply(SECRET.encode(), b"Retry-After: 99999999\r\n", b"503 X")),
    "null bytes in a header": says(OK + b"X: \0\0\r\n\r\n" + _SOUND),
    "no JSON": says(reply(b"<html>" + SECRET.encode())),
    "JSON of another form": says(reply(b'["rewards"]')),
    "deep lists": says(reply(rewards("[" * 200_000))),
    "deep lists that end": says(reply(rewards("[" * 900 + "]" * 900))),
    "deep objects": says(reply(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)),
    "deep rewards": says(reply(rewards("[" + "[" * 40 + "1" + "]" * 40 + ", 1.0]"))),
    "many rewards": says(reply(rewards("[" + "1," * 400_000 + "1]"))),
    "many objects": says(reply(rewards("[" + "{}," * 300_000 + "{}]"))),
    "one long reward": says(reply(rewards('["' + SECRET * 50_000 + '", 1.0]'))),
    "digits": says(reply(rewards("[" + "9" * 10_000 + ", 1.0]"))),
    "a whole number past floats": says(reply(rewards(f"[{10**400}, {-(10**400)}]"))),
    "a number past floats": says(reply(rewards("[1e400, -1e400]"))),
    "NaN": says(reply(rewards("[NaN, Infinity]"))),
    "rewards twice": says(reply(b'{"rewards": [1.0, 0.5], "rewards": [1.0, 1.0]}')),
    "half a character": says(reply(rewards('["\\ud83d", "\\udc00"]'))),
    "half a character, unescaped": says(reply(rewards('["\ud83d", 1]'))),
    "UTF-16 without an end": says(reply(_SOUND.decode().encode("utf-16")[:-1])),
    "not UTF-8": says(reply(b'{"rewards": ["\xff", 1]}')),
    "one too few": says(reply(rewards("[1.0]"))),
    "a mapping": says(reply(rewards('{"0": 1.0, "1": 1.0}'))),
    "mappings": says(reply(rewards('[{"reward": 1.0}, {}]'))),
    "texts": says(reply(rewards('["1.0", "\\u001b]0;mine\\u0007"]'))),
    "null": says(reply(b"null")),
    "no choices": says(reply(json.dumps({"choices": [None]}).encode())),
    "choices without end": says(reply(b'{"choices": [{"message": {"content": ' + b"[" * 9999 + b"}}]}")),
    "content that is a number": says(reply(json.dumps({"choices": [{"message": {"content": 1}}]}).encode())),
    "verdict without end": says(reply(json.dumps({"choices": [{"message": {"content": "[" * 100_000}}]}).encode())),
    "verdict of many digits": says(
        reply(json.dumps({"choices": [{"message": {"content": "[" + "1" * 9999 + "]"}}]}).encode())
    ),
}
KINDS = SOUND | BROKEN
# What only the time limit of a request ends.
UNTIL_LATE = (
    "silence", "slow status line", "slow headers", "slow continuation", "slow body", "slow chunks", "slow chunk header",
    "slow trailer", "endless 1xx", "empty gzip blocks",
)  # fmt: skip


class HostileService:
    """Answers its nth request as the nth name of `kinds` says, in turn."""

    def __init__(self, kinds: list[str], seed: int = 0) -> None:
        self._kinds, self._draw = kinds, random.Random(seed)
        self.asked: list[bytes] = []  # the head of each request
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=50)
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        for connection in self._open:
            connection.close()

    def __enter__(self) -> HostileService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        for connection in self._connections():
            self._open.append(connection)
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _connections(self) -> Iterator[socket.socket]:
        while True:
            try:
                yield self._listener.accept()[0]
            except OSError:  # closed
                return

    def _answer(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(GIVEN_UP_AFTER)
                head = b""
                while b"\r\n\r\n" not in head:
                    piece = connection.recv(65536)
                    if not piece:
                        return
                    head += piece
                head, _, body = head.partition(b"\r\n\r\n")
                length = next(
                    int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
                )
                while len(body) < length:
                    body += connection.recv(65536)
                kind = self._kinds[len(self.asked) % len(self._kinds)]
                self.asked.append(head)
                KINDS[kind](connection, self._draw)
                if kind in SOUND:  # let the client hang up where it can
                    connection.shutdown(socket.SHUT_WR)
        except OSError:  # the client has gone
            pass
