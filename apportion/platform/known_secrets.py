"""The secret values that this process knows, and the one way to mask them in a text.

They come from
- the environment: variables with a telling name (`HF_TOKEN`), those that a setting names (`auth_env`, `api_key_env`: any key
  that ends in `_env`), and users and passwords of addresses (`HTTPS_PROXY`);
- settings: each value that `config.yaml` redacts, and words of the command line.

A value is masked in its plain form and in those that a text may show: escapes of Python and JSON, URL and HTML quoting, hex,
and base64, also behind a user's name (`user:password`). Each line of a value with several lines is one, too.

Not masked: values of less than `SHORTEST` characters, numbers of less than 8, words such as `true`, paths that exist; and
plain words under a name that is an everyday word itself (`key: answer`). A plain word or a number is masked only where it
stands alone: a password "swordfish" leaves "swordfishes" as it is. Their names still hide all of these where one stands
beside them (`password=abc`).

An actor is a process of its own: it learns from its own environment and from what it is constructed with. Only names of
variables travel, in `NAMES`, never a value.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import html
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

from apportion.platform.secret_shapes import REDACTED, Redaction, is_reference, is_secret_key, is_weak_key

NAMES = "APPORTION_MASKED_VARIABLES"  # in the environment: names of the variables that settings name, between commas
SHORTEST = 6
_LONG_NUMBER = 8
_LONG_WORD = 12  # characters of a word that is masked within others, too
_ENCODED = 8  # characters of a value from which its base64 and hex are looked for
_EVERYDAY = frozenset((
    "true", "false", "none", "null", "default", "enabled", "disabled", "redacted", "<redacted>", "secret", "secrets", "password",
    "passwd", "token", "tokens", "bearer", "basic", "authorization",
    # What stands in place of a key where a server asks for none:
    "dummy", "placeholder", "unused", "not-needed", "no-key-required", "sk-no-key-required", "your-api-key", "offline", "online",
    "ollama", "lm-studio",
))  # fmt: skip
_END = 12  # characters of the beginning or end of a long value that are masked where the rest is cut off
_DEEPEST = 20
_HEADER_SCHEME = re.compile(r"(Bearer|Basic|Token|Digest|ApiKey)\s+(\S.*)", re.IGNORECASE)


class KnownSecrets:
    def __init__(self) -> None:
        self._values: dict[str, bool] = {}  # value -> whether it is masked only where it stands alone
        self._names: frozenset[str] = frozenset()
        self._state: Any = None  # that `_forms` were made of
        self._forms: list[tuple[str, re.Pattern[str] | None]] = []
        self._long: list[str] = []  # values of which a part is masked, too: a message may shorten what it quotes

    def learn(self, settings: Any) -> None:
        """Learn the secrets in a configuration, or in what an actor is constructed with."""
        plain = _plain(settings)
        self._learn_names(_variable_names(plain))
        redaction = Redaction()
        redaction.value(plain)
        self._learn_values(redaction.found)

    def learn_text(self, text: str) -> None:
        """Learn the secrets in a word of a command line."""
        redaction = Redaction()
        redaction.text(text)
        self._learn_values(redaction.found)
        self._learn_names(re.findall(r"\w+_env['\"]?\s*[=:]\s*['\"]?(\w+)", text))

    def names(self) -> str:
        """What the environment of another process has to hold in `NAMES`."""
        return ",".join(sorted(self._all_names()))

    def mask(self, text: str) -> str:
        """The text without any known secret.

        >>> known = KnownSecrets()
        >>> known.learn({"params": {"password": "hunter2/x"}})
        >>> known.mask("refused: hunter2/x, hunter2%2Fx")
        'refused: <redacted>, <redacted>'
        """
        for form, pattern in self._current():
            if form in text:
                text = text.replace(form, REDACTED) if pattern is None else pattern.sub(REDACTED, text)
        for value in self._long:
            if value[:_END] in text:
                text = _without_end(text, value)
            if value[-_END:] in text:
                text = _without_end(text[::-1], value[::-1], REDACTED[::-1])[::-1]
        return text

    def _learn_values(self, found: Iterable[tuple[str, bool]]) -> None:
        for value, weak in found:
            self._values |= _parts(value, weak)

    def _learn_names(self, names: Iterable[str]) -> None:
        self._names |= {name for name in names if re.fullmatch(r"\w+", name)}

    def _all_names(self) -> frozenset[str]:
        return self._names | frozenset(name for name in os.environ.get(NAMES, "").split(",") if name)

    def _current(self) -> list[tuple[str, re.Pattern[str] | None]]:
        """The forms to look for, longest first. The environment may change: a user's module sets a variable, say."""
        names = self._all_names()
        variables = tuple(
            (name, value)
            for name in list(os.environ)  # another thread may remove one
            if (value := os.environ.get(name))
            and (name in names or is_secret_key(name) or ("@" in value and "://" in value))
        )
        state = (len(self._values), names, variables)
        if state != self._state:
            values = dict(self._values)
            for name, value in variables:
                values |= _of_variable(name, value, name in names)
            self._forms, self._state = _forms(values), state
            # Much of the world's JSON begins and ends like an account's; the keys in it are values of their own.
            self._long = [value for value in values if len(value) >= 2 * _END and value[0] not in '{["']
        return self._forms


known = KnownSecrets()


def learned(config: Any) -> Any:
    """The configuration, whose secrets this process knows from here. Processes that it starts learn which variables hold some."""
    known.learn(config)
    if names := known.names():
        os.environ[NAMES] = names
    return config


def redacted(config: Any) -> Any:
    """A copy without secrets: values under telling keys, `KEY=value` texts, users and keys in addresses, known token shapes,
    known values.

    >>> redacted({"api_key": "abc", "max_prompt_tokens": 8, "eos_token": "</s>"})
    {'api_key': '<redacted>', 'max_prompt_tokens': 8, 'eos_token': '</s>'}
    """
    return without_known(Redaction().value(config))


def redacted_text(text: str, entries: bool = True) -> str:
    """A text (an override, a log line, an address) without secrets; `entries`: those written as `key: value` too.

    >>> redacted_text("http://me:p@w@host/v1?api_key=abc&n=1&sig=x%3D")
    'http://<redacted>@host/v1?api_key=<redacted>&n=1&sig=<redacted>'
    """
    return Redaction().text(known.mask(text), entries)


def without_known(value: Any) -> Any:
    """A copy of JSON-like values with the known secrets in their texts masked. Nothing is guessed by its shape: a text may be
    a model's, and data is not changed for looking like a key."""
    if isinstance(value, str):
        return known.mask(value)
    if isinstance(value, Mapping):
        return {known.mask(key) if isinstance(key, str) else key: without_known(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        if value and all(isinstance(element, str) for element in value):
            return masked_pieces(list(value))
        return [e if isinstance(e, int | float) else without_known(e) for e in value]
    return value


def masked_pieces(pieces: list[str]) -> list[str]:
    """As many pieces of a text, as of its tokens, without the secrets that it holds as a whole.

    >>> known.learn({"password": "open-sesame-9"})
    >>> masked_pieces(["say open", "-sesame", "-9", "!"])
    ['say <redacted>', '', '', '!']
    """
    whole, apart = "".join(pieces), "\n".join(pieces)  # of one text, or texts of their own
    if known.mask(whole) == whole:
        return pieces if known.mask(apart) == apart else [known.mask(piece) for piece in pieces]
    hidden, starts = [False] * len(whole), set()
    for form, pattern in known._current():
        for found in (pattern or re.compile(re.escape(form))).finditer(whole):
            if not hidden[found.start()]:  # not one within a longer one
                starts.add(found.start())
            hidden[found.start() : found.end()] = [True] * (found.end() - found.start())
    left, at = [], 0
    for piece in pieces:
        shown = (REDACTED if i in starts else "" if hidden[i] else whole[i] for i in range(at, at + len(piece)))
        left.append(known.mask("".join(shown)))
        at += len(piece)
    return left


def _plain(value: Any, depth: int = 0) -> Any:
    """Settings as mappings, lists and values: an actor is constructed with dataclasses."""
    if depth > _DEEPEST:
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, depth + 1) for inner in value]
    return value if isinstance(value, str | int | float) else None


def _variable_names(settings: Any) -> list[str]:
    if isinstance(settings, Mapping):
        named = [v for k, v in settings.items() if str(k).endswith("_env") and isinstance(v, str)]
        return named + [name for inner in settings.values() for name in _variable_names(inner)]
    return [name for inner in settings for name in _variable_names(inner)] if isinstance(settings, list) else []


def _of_variable(name: str, value: str, is_named: bool) -> dict[str, bool]:
    """The secrets in an environment variable."""
    redaction = Redaction()
    if is_named or is_secret_key(name):
        redaction.found.append((value, not is_named and is_weak_key(name)))
        if value.lstrip().startswith("{"):  # an account's file as a whole, say
            with contextlib.suppress(ValueError, RecursionError):
                redaction.value(json.loads(value))
    else:
        redaction.text(value)
    found: dict[str, bool] = {}
    for one, weak in redaction.found:
        found |= _parts(one, weak)
    return found


def _parts(value: str, weak: bool) -> dict[str, bool]:
    """What to mask of one secret: all of it, each of its lines, and of a header's value what follows the scheme."""
    texts = {value, value.strip(), *(line.strip() for line in re.split(r"[\r\n]+|\\r|\\n", value))}
    for text in list(texts):
        scheme = _HEADER_SCHEME.fullmatch(text)
        if scheme is not None:
            texts |= {scheme[2], *_behind_user(scheme[1], scheme[2])}
    return {text: _stands_alone(text) for text in texts if _is_worth(text, weak)}


def _behind_user(scheme: str, encoded: str) -> list[str]:
    """The password in the value of basic authentication."""
    if scheme.lower() != "basic":
        return []
    try:
        return [base64.b64decode(encoded, validate=True).decode().partition(":")[2]]
    except (binascii.Error, UnicodeDecodeError):
        return []


def _is_worth(value: str, weak: bool) -> bool:
    """Whether masking a value does more good than harm."""
    if (
        len(value) < SHORTEST
        or value.lower() in _EVERYDAY
        or is_reference(value)
        or value.startswith(("-----BEGIN ", "-----END "))
    ):
        return False
    if re.fullmatch(r"[-+]?[\d.,]+(?:e[-+]?\d+)?", value):
        return len(value) >= _LONG_NUMBER
    if weak and re.fullmatch(r"[A-Za-z]+(?:[ _./:-][A-Za-z]+)*", value):
        return False
    try:
        return not (value.startswith("/") and os.path.exists(value))  # the place of a secret is none
    except ValueError:
        return True


def _stands_alone(value: str) -> bool:
    return len(value) < _LONG_WORD and (value.isalpha() or value.isdigit())


def _without_end(text: str, value: str, mask: str = REDACTED) -> str:
    """The text without any beginning of `value`, as far as it goes."""
    pieces, at = [], 0
    while (start := text.find(value[:_END], at)) >= 0:
        end = start + _END
        while end < len(text) and end - start < len(value) and text[end] == value[end - start]:
            end += 1
        pieces += [text[at:start], mask]
        at = end
    return "".join([*pieces, text[at:]])


def _forms(values: Mapping[str, bool]) -> list[tuple[str, re.Pattern[str] | None]]:
    """Every form of every value, longest first: one that holds another goes before it."""
    forms: dict[str, re.Pattern[str] | None] = {}
    for value, alone in values.items():
        for form in _encodings(value):
            forms[form] = re.compile(rf"(?<![^\W_]){re.escape(form)}(?![^\W_])") if alone and form == value else None
    return sorted(forms.items(), key=lambda item: len(item[0]), reverse=True)


def _encodings(value: str) -> set[str]:
    forms = {value}
    for _ in range(2):  # twice: a traceback in a line of JSON
        forms |= {encode(form) for form in forms for encode in _ESCAPES}
    for safe in ("", "/"):
        percent = quote(value, safe, errors="replace")
        forms |= {percent, _lower_hex(percent)}
    percent = quote_plus(value, errors="replace")
    forms |= {percent, _lower_hex(percent), html.escape(value), html.escape(value, quote=False)}
    data = value.encode(errors="replace")
    if len(data) >= _ENCODED:
        forms |= {data.hex(), data.hex().upper()}
        for before in range(3):  # bytes before it: the last ones of `user:`, say
            whole = base64.b64encode(bytes(before) + data).decode().rstrip("=")
            # A character that holds bits of a neighbor says nothing.
            first, rest = -(-before * 8 // 6), (before + len(data)) * 8 % 6
            inner = whole[first : len(whole) - (1 if rest else 0)]
            forms |= {inner, inner.replace("+", "-").replace("/", "_")}
    return forms


_ESCAPES = (
    lambda text: repr('"' + text)[2:-1],  # in single quotes
    lambda text: repr('"' + text)[2:-1].replace("\\'", "'"),  # in double ones
    lambda text: ascii('"' + text)[2:-1].replace("\\'", "'"),
    lambda text: json.dumps(text)[1:-1],
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
)


def _lower_hex(text: str) -> str:
    return re.sub(r"%[0-9A-F]{2}", lambda code: code[0].lower(), text)
