"""The HTTP client of reward services and judges: addresses, deadlines, proxies, secrets, and the JSON that it reads."""

import json
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fuzz.hostile_services import HostileService

from apportion.actors import service_network
from apportion.actors.reward_check import check_functions
from apportion.actors.reward_service import ServiceSource
from apportion.actors.reward_sources import RewardEntry
from apportion.actors.service_client import Refused, Room, ServiceClient, parse_answer, secret_header
from apportion.platform.addresses import address_problem, shown_url
from apportion.platform.errors import ConfigError

ROOM = Room(10_000, 100)
PORT, NAME = "whose port is no number from 1 to 65535", "whose host is no domain name"
LETTERS = "whose host has a character other than letters, digits, - and _"
LONG = "whose host has more than 253 characters, or 63 between its dots"
SCHEME, SPACE = "that does not begin with http:// or https://", "with a space, a control character or half a character"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://h:99999/x", PORT),
        ("http://h:0/x", PORT),
        ("http://h:-1/x", PORT),
        ("http://h:8O/x", PORT),
        ("http://h:８０/x", PORT),
        ("http://me:pa/ss@h/x", PORT),
        ("http://1:2:3/x", PORT),
        ("http://a..b/x", "whose host has an empty part between its dots"),
        ("http://.a/x", "whose host has an empty part between its dots"),
        ("http://h h/x", SPACE),
        (" http://h/x", SPACE),
        ("http://h/x\n", SPACE),
        ("http://h/\ud83d", SPACE),
        ("http:///x", "without a host"),
        ("http://:80/x", "without a host"),
        ("http://me:pw@/x", "with a user and without a host"),
        ("http://" + "a" * 64 + ".de/x", LONG),
        ("http://" + "a." * 127 + "de/x", LONG),
        ("http://h%20h/x", LETTERS),
        ("http://h;h/x", LETTERS),
        ("http://-bücher-.de/x", NAME),
        ("http://300.1.1.1/x", "whose host is no IPv4 address"),
        ("http://[::1/x", "whose host cannot be read"),
        ("http://[1:2]/x", "whose host cannot be read"),
        ("http://h\u2100/x", "whose host cannot be read"),
        ("ftp://h/x", SCHEME),
        ("h:80/x", SCHEME),
        ("http:/h/x", SCHEME),
        ("", SCHEME),
        ("http://h/" + "x" * 70_000, "of more than 65,536 characters"),
        (5, "that is a int"),
        (None, "that is a NoneType"),
    ],
)
def test_what_is_no_address_says_why_without_quoting_it(url, problem):
    assert address_problem(url) == problem
    assert shown_url(url) == "no address"
    with pytest.raises(ConfigError) as refused:
        check_functions([{"urls": ["http://h/x", url], "name": "s"}], 60.0)
    expected = "a list of addresses" if not isinstance(url, str) else "http://host:port/path"
    assert str(refused.value).endswith(f"expected {expected}") and "pa/ss" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    ["http://h", "https://h:65535/x?a=b#c", "http://[::1]:80/x", "http://[fe80::1]/", "http://127.0.0.1/x", "http://a_b-c.d./x",
     "http://bücher.de/x", "http://me:p%2Fw@h/x", "HTTP://H/x", "http://h:/x", "http://" + "a" * 63 + ".de/é"],
)  # fmt: skip
def test_an_address_that_can_be_asked_is_one(url):
    assert address_problem(url) is None
    assert ServiceClient([url], {})._routes[url].target.scheme in (b"http", b"https")
    assert check_functions([url], 60.0) == []


@pytest.mark.parametrize("text", ["ftp://me:pa55@h/x", "HTTP:me:pa55@h", "ws://me:pa55@h/x"])
def test_a_function_that_looks_like_an_address_is_refused_as_one(text):
    with pytest.raises(ConfigError) as refused:
        check_functions(text, 60.0)
    assert str(refused.value) == f"reward.functions: got an address {SCHEME}, expected http://host:port/path"


def test_a_request_has_one_deadline_though_the_name_lookup_never_ends(monkeypatch):
    monkeypatch.setattr(service_network.socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    client = ServiceClient(["http://no-such-host/x"], {})
    before = time.monotonic()
    with pytest.raises(ConnectionError, match=r"^http://no-such-host/x: ConnectTimeout$"):
        client.post("http://no-such-host/x", b"{}", before + 0.2, ROOM)
    assert time.monotonic() - before < 2.5


def test_each_address_of_a_name_has_its_share_of_the_time(monkeypatch):
    with HostileService(["sound"]) as service:
        found = [(2, 1, 6, "", (ip, service.port)) for ip in ("127.0.0.9", "127.0.0.1")]
        monkeypatch.setattr(service_network.socket, "getaddrinfo", lambda *_, **__: found)
        url = f"http://two.example:{service.port}/x"
        answer = ServiceClient([url], {}).post(url, b"{}", time.monotonic() + 20, ROOM)
    assert json.loads(answer.body) == {"rewards": [1.0, 0.5]}


def test_a_request_that_nobody_reads_ends_at_its_deadline():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        before = time.monotonic()
        with pytest.raises(ConnectionError, match="Timeout"):
            ServiceClient([url], {}).post(url, b"x" * 20_000_000, before + 0.3, ROOM)
    assert time.monotonic() - before < 10


def test_a_limit_that_no_socket_takes_is_no_fault():
    with HostileService(["sound"]) as service:
        source = ServiceSource(RewardEntry(f"http://127.0.0.1:{service.port}/x", timeout_seconds=1e8))
        assert source._client.post(source.urls[0], b"{}", time.monotonic() + 1e8, ROOM).status == 200


def test_connections_are_kept_between_requests():
    ports = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            ports.append(self.client_address[1])
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/x"
        client = ServiceClient([url], {})
        answers = [client.post(url, b"{}", time.monotonic() + 20, ROOM) for _ in range(3)]
        client.close()
        server.shutdown()
    assert answers == [(200, b"[]")] * 3 and len(set(ports)) == 1


def test_a_server_that_speaks_no_tls_is_a_failed_attempt():
    with HostileService(["sound"]) as service:
        url = f"https://127.0.0.1:{service.port}/x"
        with pytest.raises(ConnectionError, match=r"Connect(Error|Timeout)"):
            ServiceClient([url], {}).post(url, b"{}", time.monotonic() + 1, ROOM)


def test_a_server_that_speaks_tls_without_end_is_a_failed_attempt():
    def serve(listener):
        connection, _ = listener.accept()
        with connection:
            try:
                while True:
                    connection.sendall(b"\x16\x03\x03\x40\x00"[:1])
                    time.sleep(0.02)
            except OSError:
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/x"
        before = time.monotonic()
        with pytest.raises(ConnectionError, match=r"Connect(Error|Timeout)"):
            ServiceClient([url], {}).post(url, b"{}", before + 0.3, ROOM)
        assert time.monotonic() - before < 10


def test_the_proxy_of_the_environment_is_asked_unless_the_host_is_an_exception(monkeypatch):
    with HostileService(["sound"]) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://me:pw@127.0.0.1:{proxy.port}")
        monkeypatch.setenv("http_proxy", f"http://me:pw@127.0.0.1:{proxy.port}")
        url = "http://reward.example/x"
        assert ServiceClient([url], {}).post(url, b"{}", time.monotonic() + 20, ROOM).status == 200
        assert proxy.asked[0].startswith(b"POST http://reward.example/x HTTP/1.1\r\n")
        monkeypatch.setenv("NO_PROXY", "reward.example")
        monkeypatch.setenv("no_proxy", "reward.example")
        assert ("http", "") in ServiceClient([url], {})._pools


@pytest.mark.parametrize(
    ("proxy", "problem"),
    [
        ("http://h:99999", PORT),
        ("ftp://me:pa55@h", SCHEME),
        ("socks5://h:1", "that begins with socks5, which needs the"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named_by_its_variable(monkeypatch, proxy, problem):
    for name in ("HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setenv("all_proxy", proxy)
    with pytest.raises(ConfigError) as refused:
        ServiceClient(["http://h/x"], {})
    assert str(refused.value).startswith(f"environment variable ALL_PROXY: got an address {problem}")
    assert "pa55" not in str(refused.value)


@pytest.mark.parametrize("value", ["né", "a\nb", "a\0b"])
def test_a_secret_that_no_header_can_have_is_named_by_its_variable(monkeypatch, value):
    if "\0" in value:
        monkeypatch.setattr(os, "environ", {"TOKEN": value})
    else:
        monkeypatch.setenv("TOKEN", value)
    with pytest.raises(ConfigError, match=r"^reward\.functions s: auth_env: got TOKEN with a character that an HTTP"):
        ServiceSource(RewardEntry("http://h/x", auth_env="TOKEN", name="s"))
    with pytest.raises(ConfigError, match="got TOKEN with"):
        secret_header("TOKEN", "judge.api_key_env")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"[" * 101, "has more than 100 values"),
        (b"[" * 40 + b"]" * 40, "is nested more than 32 deep"),
        (b'{"a": 1, "a": 2}', "has a key twice in one object"),
        (b'[{"b": {"a": 1, "a": 1}}]', "has a key twice in one object"),
        (b'"\xff"', "is no text"),
        (b"9" * 5000, "is no JSON"),
        (b"", "is no JSON"),
        (b"[1] 2", "is no JSON"),
    ],
)
def test_json_that_is_not_read_says_why(body, problem):
    with pytest.raises(ValueError) as refused:
        parse_answer(body, ROOM)
    assert str(refused.value) == problem


def test_json_within_its_room_is_read():
    assert parse_answer(b"[" * 32 + b"]" * 32, ROOM) is not None
    assert parse_answer(b'{"a": [1.5, null, "\\ud83d"]}', ROOM) == {"a": [1.5, None, "\ud83d"]}


def test_an_answer_is_unpacked_up_to_its_room_and_no_further():
    with HostileService(["gzip bomb"]) as service:
        url = f"http://127.0.0.1:{service.port}/x"
        with pytest.raises(Refused, match="the answer is longer than 10,000 bytes"):
            ServiceClient([url], {}).post(url, b"{}", time.monotonic() + 20, ROOM)
