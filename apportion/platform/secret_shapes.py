"""Recognize secrets by the name that they stand under and by their own form: keys of a mapping, `KEY=value` and `key: value`
in a text, headers, addresses, command-line options, and the tokens of well-known services.

`known_secrets` masks the values found here wherever else they appear.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, unquote_plus

REDACTED = "<redacted>"
COMMAND_LINES = "before"  # the key under which a configuration holds words of commands

# A name is judged by its last words: `judge.api_key`, `HF_TOKEN`, `clientSecret`.
_STRONG_WORDS = (
    r"tokens?|secrets?|passwords?|passwds?|pwds?|passphrases?|(?:api|access|private|account|secret|master|encryption|"
    r"signing|subscription|ssh)_?keys?|credentials?|creds|authorization|auth_?headers?|bearer|jwt|cookies?|passcodes?|otp|"
    r"session_?ids?|(?:j|php)sess(?:ion)?id"
)
_WEAK_WORDS = r"keys?|auth|pass|pw|pin"  # also everyday words: in free text their value has to look like a secret
_WORDS = rf"{_STRONG_WORDS}|{_WEAK_WORDS}"
# Several of a kind (`password1`, `client_secret_v2`), and what holds one (`secret_value`).
_OF_SEVERAL = r"(?:password|passwd|secret|(?:api|access|auth|refresh)_?token|(?:api|access|secret|private)_?key)"
_SECRET_KEY = re.compile(
    rf"(?:^|_)(?:{_WORDS})$|(?:password|passwd|passphrase|secret|token|api_?key)s?$"
    rf"|(?:^|_){_OF_SEVERAL}(?:_?v?\d{{1,2}}|_(?:value|text|string|pem))$"
)
_STRONG_KEY = re.compile(rf"(?:^|_)(?:{_STRONG_WORDS}|{_OF_SEVERAL}\w*)$")
# Text tokens of a tokenizer, counts of tokens, and keys that find something: no credentials.
_HARMLESS_KEY = re.compile(
    r"(?:^|_)(?:bos|eos|pad|unk|sep|cls|mask|stop|start|end|begin|image|audio|video|special|prefix|suffix|step|answer|label|"
    r"choice|option|target|prompt|response|completion|context|input|output|new|system|user|assistant|tool|think|thinking|"
    r"reasoning|reward|yes|no|positive|negative|good|bad|banned|suppress|forced|allowed|added|extra|text|vocab|separator|"
    r"delimiter|batch|chunk|eot|eom|boi|eoi|thought|forbidden|ignored?)_?tokens?$"
    r"|(?:^|_)(?:max|min|num|n|total|mean|count|per)_(?:\w+_)?tokens?$"
    r"|(?:^|_)(?:answer|prompt|question|response|completion|label|target|sort|group|order|primary|foreign|unique|partition|"
    r"cache|column|row|field|record|dict|json|data|text|index|lookup|search|reward|score|config|public|map|hot|arrow|chosen|"
    r"rejected|solution|input|output|messages?|conversations?|image|audio|video|id|gt|truth|fn|source|task|name|metric|"
    r"instruction|query|split|category|reference|document|title|tools?|role|content|problem|difficulty|level|topic)_?keys?$"
)
_LONGEST_NAME = 120
_NOT_A_VALUE = ("", "null", "none", "true", "false", "value")  # the last in what we say ourselves: KEY=VALUE
_WORKING_FOLDERS = ("PWD", "OLDPWD")
# Mappings whose every value is one.
_HEADERS = ("headers", "cookies", "extra_headers", "default_headers", "http_headers")
_HARMLESS_HEADERS = re.compile(
    r"accept(?:_\w+)?|content_\w+|user_agent|connection|host|cache_control|origin|referer|date|te|via|expect"
)

# A name and what separates it from its value; `lead` is what stands before the key of a mapping. Possessive: tried from each of
# its letters, a long name would take the square of its length.
_HEAD = re.compile(
    r"""(?:(?P<lead>[{,]\s*\\?['"]?|\\?['"])|(?<![A-Za-z0-9_.-]))(?P<name>[A-Za-z0-9_.-]++)"""
    r"""(?P<sign>=(?!=)|[ \t]+=[ \t]+|\\?['"]\s*:\s*|[ \t]*:[ \t]+|:(?=\S)|(?<=\S)[ \t]+(?=\S))"""
)
_SECRET_NAME = re.compile(rf"(?P<before>.*?)(?P<word>{_WORDS})", re.IGNORECASE)
_QUOTED = re.compile(r"""(?P<open>\\?['"])(?P<value>.*?)(?P=open)""")
_LIST = re.compile(r"\[(?P<value>[^\]\n]{1,2000})(?=\])")
_BARE = re.compile(r"(?!\$\{[^{}\s]*\})(?P<value>[^\s&'\",;}\]]+)")
# Of `key: value`, where `got` and `expected` begin what our own errors say of a key.
_PLAIN = re.compile(r"(?!(?:got|expected)\b|\$\{[^{}\s]*\})(?P<value>[^\s&'\",;}\]{\[|>][^\s&'\",;}\]]*)")
_AUTHORIZATION = re.compile(
    r"((?:proxy-)?authorization\s*:\s*+)(?!<redacted>)((?:[A-Za-z][\w-]* +(?!<redacted>))?[^\s'\",{}\[\]]+)",
    re.IGNORECASE,
)
_COOKIE = re.compile(
    r"((?<![\w-])(?:set-)?cookie\s*:\s*+)([^\s;='\"]+=[^\s;'\"]*(?:;\s*[^\s;='\"]+(?:=[^\s;'\"]*)?)*)", re.IGNORECASE
)
_SCHEME = re.compile(r"\b(Bearer|BEARER|bearer|Basic|Token)\s+([A-Za-z0-9._~+/=-]{8,})")
_SIGNED = re.compile(r"(\b(?:signature|response)=\\?['\"]?)([A-Za-z0-9+/=]{16,})", re.IGNORECASE)  # of a signed request
# In prose: "incorrect API key provided: ...", "password '...' was refused". The value has to look like nothing else.
_NEAR = re.compile(
    r"((?:token|secret|password|passwd|passphrase|(?:api|access|private|secret)[ _-]?key|credential)s?"
    r"(?:\\?['\"])?(?:\s+(?:is|was|provided|given|used))?\s*(?:[:=,>]|[-=:=]>|:=|==|\s)\s*(?:\\?['\"])?)"
    r"([A-Za-z0-9+=_~!@$%^*/-]{16,})",
    re.IGNORECASE,
)
_MIXED = re.compile(r"(?=.*[a-z])(?=.*[A-Z])(?=.*\d)(?![/~]).*|[0-9a-f]{32,}", re.DOTALL)
_CURL = re.compile(
    r"((?:\bcurl\b|\bwget\b|\bhttpie?\b)[^\n]{0,300}?\s(?:-u|--user|--proxy-user|-U)[ =]?\\?['\"]?)([^\s:'\"]+:[^\s'\"\\]+)"
)
_USER_OPTION = re.compile(r"((?<!\S)(?:--user|--proxy-user)[ =]\\?['\"]?)([^\s:'\"]+:[^\s'\"\\]+)")
_PEM = re.compile(
    r"-----BEGIN (?P<kind>[A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?)-----"
    r"(?:(?:(?!-----BEGIN ).)*?-----END (?P=kind)-----|(?:\\+[nr]|[A-Za-z0-9+/=:,\s-])*)",
    re.DOTALL,
)
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|sk-(?=[a-z_-]{0,99}[A-Z0-9])[A-Za-z0-9_-]{16,}|(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{10,}|whsec_[A-Za-z0-9+/=]{16,}"
    r"|AIza[\w-]{20,}|ya29\.[\w.-]{16,}|GOCSPX-[\w-]{16,}"  # Google
    r"|(?:AKIA|ASIA|AROA|AIDA|AGPA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Za-z0-9])"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|gl(?:pat|dt|ptt|rt|cbt|ft|soat|imt|agent)-[\w.-]{16,}"
    r"|nvapi-[\w-]{16,}|gsk_[A-Za-z0-9]{16,}|r8_[A-Za-z0-9]{16,}|xai-[A-Za-z0-9]{16,}|pplx-[A-Za-z0-9]{16,}"
    r"|tgp_v1_[\w-]{16,}|fw_[A-Za-z0-9]{20,}|wandb_v\d_\w{16,}"
    r"|xox[abeoprs]-[\w-]{10,}|xapp-(?=[a-z_-]{0,99}[A-Z0-9])[\w-]{10,}|npm_[A-Za-z0-9]{20,}"
    r"|pypi-(?=[a-z_-]{0,99}[A-Z0-9])[\w-]{16,}|dckr_(?:pat|oat)_[\w-]{16,}"
    r"|SG\.[\w-]{16,}\.[\w-]{16,}|shp(?:at|ca|pa|ss)_[A-Fa-f0-9]{16,}|dop_v1_[a-f0-9]{16,}|hvs\.[\w-]{16,}"
    r"|lin_api_[A-Za-z0-9]{16,}|tskey-[\w-]{16,}|AGE-SECRET-KEY-1[A-Z0-9]{16,}|(?:bot)?\d{8,10}:AA[\w-]{30,}"
    r"|eyJ[\w-]{8,2000}\.[\w-]{8,}\.[\w-]*)"
)
_WEBHOOK = re.compile(r"(hooks\.slack\.com/(?:services|workflows)/|discord(?:app)?\.com/api/webhooks/)([\w/-]+)")
_URL_USER = re.compile(r"(:(?:\\?/){2})([^/\s\\]+)@")  # up to the last @: a password may hold one
_QUOTED_URL_USER = re.compile(r"(%3A%2F%2F)([^/\s&]+?)(?=%40)", re.IGNORECASE)
_USER_AT = re.compile(
    r"(?<![\w:@])((?://)?[\w.+-]+:)([^\s:/@'\"]{8,})(?=@[A-Za-z0-9])"
)  # no scheme: user:password@host
_URL = re.compile(r"://[^\s]+")
_QUERY_PAIR = re.compile(r"([?&#;])([\w.%-]{1,100})=((?:[^\s&#'\"\\,;}\]]|[,;](?=[^\s'\"\\]))+)")
_QUERY_NAME = re.compile(  # besides the names of an assignment: words that are secrets in an address alone
    r"(?:[\w.-]*[._-])?(?:key|sig|signature|pwd|pass|pw|pin|auth)|code|sid", re.IGNORECASE
)

_SIGNATURE = re.compile(r"(?:[\w.-]*[._-])?(?:sig|signature)", re.IGNORECASE)


@functools.lru_cache(4096)
def is_secret_key(key: str) -> bool:
    """Whether what stands under a key, or in a variable of this name, is a secret.

    >>> [name for name in ("apiKey", "HF_TOKEN", "eos_token", "max_prompt_tokens", "monkey") if is_secret_key(name)]
    ['apiKey', 'HF_TOKEN']
    """
    normal = _normal_key(key)
    return key not in _WORKING_FOLDERS and bool(_SECRET_KEY.search(normal)) and not _HARMLESS_KEY.search(normal)


@functools.lru_cache(4096)
def is_weak_key(key: str) -> bool:
    """Whether the last word of a key also is an everyday one (`key`, `pin`)."""
    normal = _normal_key(key)
    return normal == "tokens" or not _STRONG_KEY.search(normal)


def looks_random(value: str) -> bool:
    """Whether a value has the form of a secret: letters and digits, no word or number that a text is likely to hold."""
    return bool(
        re.fullmatch(r"[A-Za-z0-9+/=_.~!@$%^*-]{8,}", value)
        and re.search(r"\d", value)
        and re.search(r"[A-Za-z]", value)
    ) and not re.fullmatch(r"[a-z_]+[-_.]?\d{1,6}|[-+\d.]+e[-+]?\d+", value)


@dataclass
class Redaction:
    """Takes secrets out of a configuration or a text, and collects them in `found`: (value, whether its name is weak)."""

    found: list[tuple[str, bool]] = field(default_factory=list)

    def value(self, config: Any) -> Any:
        """A copy of a configuration without secrets."""
        if isinstance(config, Mapping):
            name = config.get("name", config.get("key"))
            if isinstance(name, str) and "value" in config and is_secret_key(name):  # {name: API_KEY, value: ...}
                return self.value({key: inner for key, inner in config.items() if key != "value"}) | {
                    "value": self._under(name, config["value"])
                }
            return {key: self._under(str(key), value) for key, value in config.items()}
        if isinstance(config, list | tuple):
            return [self.value(value) for value in config]
        # `"token": "word"` in a prompt or pattern is no secret; in words of a command it may be.
        return self.text(config, entries=False) if isinstance(config, str) else config

    def text(self, text: str, entries: bool = True) -> str:
        """A text without secrets; `entries`: those written as `key: value` too."""
        text = _PEM.sub(self._whole, text)
        text = _SHAPES.sub(self._whole, text)
        text = _CURL.sub(self._credentials, _SIGNED.sub(self._mixed_tail, text))
        if "--" in text:
            text = _USER_OPTION.sub(self._credentials, text)
        if "/" in text:
            text = _WEBHOOK.sub(self._tail, text)
        if "//" in text or "\\/" in text:
            text = _URL_USER.sub(self._user, text)
        if "%40" in text:
            text = _QUOTED_URL_USER.sub(self._quoted_user, text)
        if "@" in text:
            text = _USER_AT.sub(self._random_tail, text)
        if "://" in text:
            text = _URL.sub(lambda url: _QUERY_PAIR.sub(self._query, url[0]), text)
        if "=" in text:
            text = _QUERY_PAIR.sub(self._relative_query, text)
        if ":" in text:
            text = _COOKIE.sub(self._tail, _AUTHORIZATION.sub(self._tail, text))
        text = self._named_values(_SCHEME.sub(self._scheme, text), entries)
        return _NEAR.sub(self._mixed_tail, text) if entries else text

    def _named_values(self, text: str, entries: bool) -> str:
        """The text without what stands behind a telling name."""
        pieces, at = [], 0
        for head in _HEAD.finditer(text):
            key = _secret_name(head["name"])
            if key is None or head.start() < at:
                continue
            found = self._value_of(text, head, key, entries)
            if found is not None and self._is_named(key, found["value"]):
                pieces += [text[at : found.start("value")], self._take(found["value"], is_weak_key(key))]
                at = found.end("value")
        return "".join([*pieces, text[at:]])

    def _value_of(self, text: str, head: re.Match[str], key: str, entries: bool) -> re.Match[str] | None:
        """What `head` is followed by, where that is the value of `key` rather than the next word."""
        sign = head["sign"].strip()
        found = _QUOTED.match(text, head.end()) or _LIST.match(text, head.end())
        if sign == "=":
            bare = _BARE.match(text, head.end())
            # In code: `token = next(rows)`.
            if head["sign"] != "=" and bare is not None and not _MIXED.fullmatch(bare["value"]):
                return found
            return found or bare
        if not sign:  # `--password abc`
            option = head["name"].startswith("--") and not text.startswith("-", head.end())
            return (found or _BARE.match(text, head.end())) if option else None
        if not entries or (head["sign"] == ":" and found is None and "-" not in key):
            return None
        found = found or _PLAIN.match(text, head.end())
        # In prose ("The password: say friend") a plain word before a colon is no key; `api_key` is one anywhere.
        if head["lead"] or "_" in _normal_key(key):
            return found
        return found if found is not None and _is_line(text, head.start(), found.end()) else None

    def _take(self, value: str, weak: bool = False) -> str:
        if value and value != REDACTED:
            self.found.append((value, weak))
        return REDACTED

    def _under(self, key: str, value: Any) -> Any:
        if key == COMMAND_LINES and isinstance(value, list):
            return [self.text(str(line)) for line in value]
        if _normal_key(key) in _HEADERS and isinstance(value, Mapping):
            return {name: self._of_header(str(name), inner) for name, inner in value.items()}
        if _normal_key(key) in _HEADERS and value:  # lines, pairs
            for leaf in _leaves(value):
                self._take(leaf)
                self._take(leaf.partition(":")[2].strip())
            return REDACTED
        # A number is no secret under a key like `kl_per_token`, but may well be a password.
        harmless = (
            value is None or isinstance(value, bool) or (isinstance(value, int | float) and "token" in key.lower())
        )
        if harmless or not is_secret_key(key):
            return self.value(value)
        for leaf in _leaves(value):
            self._take(leaf, is_weak_key(key))
        return REDACTED

    def _of_header(self, name: str, value: Any) -> Any:
        if value is None or isinstance(value, bool) or _HARMLESS_HEADERS.fullmatch(_normal_key(name)):
            return self.value(value)
        for leaf in _leaves(value):
            self._take(leaf, not is_secret_key(name))
        return REDACTED

    def _whole(self, match: re.Match[str]) -> str:
        return self._take(match[0])

    def _tail(self, match: re.Match[str]) -> str:
        return match[1] + self._take(match[2])

    def _random_tail(self, match: re.Match[str]) -> str:
        return self._tail(match) if looks_random(match[2]) else match[0]

    def _mixed_tail(self, match: re.Match[str]) -> str:
        return self._tail(match) if _MIXED.fullmatch(match[2]) else match[0]

    def _quoted_user(self, match: re.Match[str]) -> str:
        self._take(unquote(match[2]).partition(":")[2] or unquote(match[2]))
        return match[1] + REDACTED

    def _credentials(self, match: re.Match[str]) -> str:
        user, _, password = match[2].partition(":")
        if user.isdigit() and password.isdigit():  # `docker run --user 1000:1000`
            return match[0]
        self._take(password)
        return match[1] + REDACTED

    def _user(self, match: re.Match[str]) -> str:
        user, colon, password = match[2].partition(":")
        secret = password if colon and password else user
        self._take(secret)
        self._take(unquote(secret))
        return f"{match[1]}{REDACTED}@"

    def _query(self, match: re.Match[str]) -> str:
        name = unquote_plus(match[2])
        if not (_QUERY_NAME.fullmatch(name) or self._is_named(name, match[3])):
            return match[0]
        return self._of_query(match, name)

    def _relative_query(self, match: re.Match[str]) -> str:
        """Of an address without its beginning, as a log of requests shows it."""
        name = unquote_plus(match[2])
        signs = _SIGNATURE.fullmatch(name) and looks_random(unquote_plus(match[3]))
        named = signs or ("%" in match[2] and self._is_named(name, match[3]))
        return self._of_query(match, name) if named else match[0]

    def _of_query(self, match: re.Match[str], name: str) -> str:
        self._take(unquote_plus(match[3]), is_weak_key(name))
        return f"{match[1]}{match[2]}={self._take(match[3], is_weak_key(name))}"

    def _scheme(self, match: re.Match[str]) -> str:
        """`Basic arithmetic` is no secret."""
        return f"{match[1]} {self._take(match[2])}" if re.search(r"[\d_+/=]|[a-z][A-Z]", match[2]) else match[0]

    def _is_named(self, key: str, value: str) -> bool:
        """Whether `value` is the secret that `key` names."""
        if value.lower() in _NOT_A_VALUE or value.startswith(REDACTED) or not is_secret_key(key):
            return False
        if not any(map(str.isalnum, value)) or is_reference(value):  # `api_key=...`
            return False
        # As under a mapping's key: `kl_per_token=0.1` is no secret.
        if "token" in key.lower() and re.fullmatch(r"[-+0-9.e, ]+", value, re.IGNORECASE):
            return False
        if key.lower().endswith("pin") and re.fullmatch(r"\d{4,}", value):
            return True
        if re.search(r"(?:^|[._-])pwd$", key, re.IGNORECASE) and re.match(r"[/~.]", value):  # the working folder
            return False
        return not is_weak_alone(key) or looks_random(value)


def is_reference(value: str) -> bool:
    """Whether a value says where the secret is."""
    return bool(re.fullmatch(r"(?:file|env):[\w./~-]+|\$\{[^{}]*\}|\$[A-Z_][A-Z0-9_]*", value))


def is_weak_alone(key: str) -> bool:
    """Whether a name is an everyday word by itself: `key`, `params.key`, but not `openai_key` or `SSH_KEY`."""
    return bool(re.fullmatch(rf"(?:.*\.)?(?:{_WEAK_WORDS}|tokens)", key, re.IGNORECASE))


def _leaves(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [leaf for inner in value.values() for leaf in _leaves(inner)]
    if isinstance(value, list | tuple | set | frozenset):
        return [leaf for inner in value for leaf in _leaves(inner)]
    return [] if value is None or isinstance(value, bool) else [str(value)]


@functools.lru_cache(4096)
def _secret_name(name: str) -> str | None:
    """A name that ends in a telling word, else None. Of `MYTOKEN` the word alone: what stands before it without a separator
    says nothing."""
    match = _SECRET_NAME.fullmatch(name[-_LONGEST_NAME:])
    if match is None:
        return None
    return name if match["before"][-1:] in ("_", ".", "-") else match["word"]


def _is_line(text: str, start: int, end: int) -> bool:
    """Whether a key and its value are all of their line, as in YAML."""
    before, after = text[:start].rpartition("\n")[2], text[end:].partition("\n")[0]
    return before.strip() in ("", "-") and not after.strip()


def _normal_key(key: str) -> str:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)
    return re.sub(r"[^a-z0-9]+", "_", spaced.lower()).strip("_")
