"""Addresses of services: whether one can be asked, and how it is shown without what may be secret in it."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

LONGEST_ADDRESS = 65_536  # characters, as httpx
LONGEST_HOST, LONGEST_LABEL = 253, 63  # characters, as DNS
_LABEL = re.compile(r"[A-Za-z0-9_-]+")
_FOUR_NUMBERS = re.compile(r"\d+(\.\d+){3}")


def address_problem(url: Any) -> str | None:
    """Why `url` is no address of an HTTP service, in words that follow "got an address"; None for one that is.

    Nothing of the address is in them: what looks like its port may be the end of a password.

    >>> address_problem("http://[::1]:8000/score"), address_problem("http://me:secret@h:99999/x")
    (None, 'whose port is no number from 1 to 65535')
    """
    if not isinstance(url, str):
        return f"that is a {type(url).__name__}"
    if len(url) > LONGEST_ADDRESS:
        return f"of more than {LONGEST_ADDRESS:,} characters"
    if any(c.isspace() or not c.isprintable() for c in url):
        return "with a space, a control character or half a character"
    scheme = re.match(r"(?:([A-Za-z][A-Za-z0-9+.-]*):)?//", url)
    if scheme is None or (scheme[1] or "").lower() not in ("http", "https"):
        return "that does not begin with http:// or https://"
    try:
        parts = urlsplit(url)
        host, user = parts.hostname, "@" in parts.netloc
    except ValueError:  # a bracket without its other one, or a character that stands for / ? # @ or :
        return "whose host cannot be read"
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        return "whose port is no number from 1 to 65535"
    if not host:
        return "with a user and without a host" if user else "without a host"
    return _host_problem(host, parts.netloc.rpartition("@")[2].startswith("["))


def _host_problem(host: str, bracketed: bool) -> str | None:
    if bracketed or _FOUR_NUMBERS.fullmatch(host):
        try:
            (ipaddress.IPv6Address if bracketed else ipaddress.IPv4Address)(host)
        except ValueError:
            return "whose host cannot be read" if bracketed else "whose host is no IPv4 address"
        return None
    if not host.isascii():
        import idna  # httpx encodes such names with it

        try:
            host = idna.encode(host.lower()).decode("ascii")
        except idna.IDNAError:
            return "whose host is no domain name"
    labels = host.removesuffix(".").split(".")
    if "" in labels:
        return "whose host has an empty part between its dots"
    if len(host) > LONGEST_HOST or max(map(len, labels)) > LONGEST_LABEL:
        return f"whose host has more than {LONGEST_HOST} characters, or {LONGEST_LABEL} between its dots"
    if not all(_LABEL.fullmatch(label) for label in labels):
        return "whose host has a character other than letters, digits, - and _"
    return None


def shown_url(url: str) -> str:
    """An address without what may be secret in it; "no address" for one that is none.

    >>> shown_url("http://me:secret@host:8000/score?key=abc")
    'http://host:8000/score'
    >>> shown_url("http://[::1]:8000/score"), shown_url("http://me:secret@h:99999/x")
    ('http://[::1]:8000/score', 'no address')
    """
    if address_problem(url) is not None:
        return "no address"
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{host}{port}{parts.path}"


def shown_urls(urls: Sequence[str]) -> str:
    return ", ".join(map(shown_url, urls))
