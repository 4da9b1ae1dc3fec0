r"""Turn the words of the command line into overrides that mean to Hydra what they mean to the person who typed them.

Hydra's grammar reads `run_name=1e5` as a number, refuses a path with `(` or `=`, and keeps `\n` as two characters. Here
the schema decides: a key that takes text gets the text as typed.

- Between double quotes, `\n`, `\t`, `\r`, `\"`, `\\` and `\uXXXX` are escapes. Every other backslash stays. So does one
  that begins a LaTeX command (`\theta`, `\nu`, `\right`), with a warning.
- Between single quotes, text stays as it is.
- Without quotes, text stays as it is, except that keys of ESCAPED read escapes too.

What Hydra itself understands (lists, mappings, `${...}`, casts, sweeps with -m) goes on to mean the same.
"""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from apportion.platform.errors import ConfigError
from apportion.platform.messages import quoted, shortened, warn

# Text keys whose value is no path or name, so that a backslash without quotes is an escape there.
ESCAPED = ("data.system_prompt", "judge.delimiter", "reward.step_delimiter", "rollout.stop")
# Keys of any type whose text is a path, a name or an address, and names under which a mapping of theirs has such a text.
NAMED = ("data.eval", "data.train", "judge.url", "reward.functions")
NAMES = ("function", "source", "urls")

_FREE: Any = object()  # the type of a key in a mapping without a schema
_LORA_VALUES = ("policy.lora.", "+policy.lora.", "++policy.lora.", "policy.lora={")
_ESCAPE = re.compile(r'\\(?:(?P<sign>["\\])|u(?P<code>[0-9a-fA-F]{4})|(?P<letters>[ntr][A-Za-z]*))')
_SIGNS = {"n": "\n", "t": "\t", "r": "\r"}
_LATEX = re.compile(  # commands that begin with n, r or t
    r"nabla|natural|ne|nearrow|neg|neq|nequiv|newcommand|newline|newpage|nexists|ngeq|ngtr|ni|nleftarrow|nleq|nmid|noindent"
    r"|nolimits|nonumber|normalsize|not|notag|notin|nparallel|nprec|nrightarrow|nsim|nsubseteq|nsucc|nu|nwarrow|rangle|rbrace"
    r"|rbrack|rceil|ref|relax|renewcommand|rfloor|rgroup|rho|right|rightarrow|rightharpoonup|rightleftharpoons|rm|root|rtimes"
    r"|rule|rvert|rVert|tableofcontents|tabular|tag|tan|tanh|tau|tbinom|text(?:bf|color|it|normal|rm|sc|sf|sl|style|superscript|tt|up|width)?"
    r"|tfrac|therefore|theta|thickapprox|thicksim|thinspace|tilde|times|tiny|title|to|top|triangle|triangledown"
    r"|triangleleft|triangleq|triangleright|tt|twoheadrightarrow"
)
_CALL = re.compile(r"[A-Za-z_]\w*\s*\(.*\)", re.DOTALL)  # a cast or a sweep of Hydra's
_RECIPES = ("algorithm", "experiment", "lora")  # groups of files
_MOST_DIGITS = 308  # of a whole number that a float can hold
_LONGEST_KEY = 200  # bytes; Hydra looks for a file of that name
_YAML_WORDS = ("off", "on", "yes", "no")
_OPEN, _CLOSE = "([{", ")]}"


def rewritten(words: list[str], kind: type, sweep: bool = False) -> list[str]:
    """The overrides that Hydra is given for `words`; `kind` is the schema's dataclass, `sweep` whether commas separate
    values. A value of the optional section policy.lora switches the section on. ConfigError for an ambiguous value.

    >>> from apportion.conf.schema import Config
    >>> rewritten(["run_name=1e5", "train.steps=1e3", "model.path=/data/my model (v2)"], Config)
    ["run_name='1e5'", 'train.steps=1000', "model.path='/data/my model (v2)'"]
    """
    for word in words:
        _check_word(word)
    sweep = sweep or any(word.lower() == "hydra.mode=multirun" for word in words)
    wanted = any(word.startswith(_LORA_VALUES) for word in words)
    named = any(word.startswith("lora=") for word in words)
    return [*(["lora=default"] if wanted and not named else []), *(_override(word, kind, sweep) for word in words)]


def _check_word(word: str) -> None:
    """ConfigError for a key that no configuration has, and for a recipe that is no name: Hydra fails on both."""
    name, equal, value = word.partition("=")
    key = name.lstrip("+~").partition("@")[0]
    if not key:
        raise ConfigError(f"override: got {quoted(word)}, expected key=value: there is no key")
    if len(key.encode("utf-8", "replace")) > _LONGEST_KEY:
        raise ConfigError(f"{shortened(key, 120)}: got an unknown key, expected a key that exists")
    if re.search(rf"(?<![\w'\"])\d{{{_MOST_DIGITS + 1}}}", value):
        raise ConfigError(
            f"{key}: got a number of more than {_MOST_DIGITS} digits, expected a shorter one, or text in quotes"
        )
    if key in _RECIPES and equal:
        parsed = _parsed(value.strip())
        if isinstance(parsed, int | float | list | dict) or "${" in value:
            raise ConfigError(f"{key}: got {shortened(value, 120)}, expected a name: {key}=NAME")


def plain(value: str) -> str:
    """The text that a value of the command line stands for, where the key takes text.

    >>> plain('"my run"'), plain("my run"), plain("'it'")
    ('my run', 'my run', 'it')
    """
    literal = _literal(value.strip())
    if literal is None:
        return value
    quote, inner = literal
    return _unescaped("value", inner) if quote == '"' else inner.replace("\\'", "'")


def _override(word: str, kind: type, sweep: bool) -> str:
    name, equal, value = word.partition("=")
    key = name.lstrip("+")
    if not equal or not value or not re.fullmatch(r"\w+(\.\w+)*", key):  # a deletion, a package, an empty text
        return word
    hint = _type_of(key, kind)
    if not value.strip():  # white space alone, as a line break that the shell wrote
        return f"{name}={_quoted(value)}" if str in (hint, *typing.get_args(hint)) else word
    if not sweep:
        return f"{name}={_value(key, hint, value.strip())}"
    values = _pieces(value)
    if values is None:
        raise _unclosed(key, value)
    return f"{name}={','.join(_value(key, hint, one.strip()) for one in values)}"


def _type_of(key: str, kind: Any) -> Any:
    """The type that the schema gives a key, _FREE inside a mapping of any keys, None for one that does not exist."""
    for name in key.split("."):
        kinds = [kind, *typing.get_args(kind)]
        section = next((part for part in kinds if isinstance(part, type) and is_dataclass(part)), None)
        if section is None:
            return _FREE if any(part is Any or (typing.get_origin(part) or part) is dict for part in kinds) else None
        kind = typing.get_type_hints(section).get(name)
        if kind is None:
            return None
    return kind


def _value(key: str, hint: Any, text: str) -> str:
    """One value, as Hydra is to read it."""
    kinds = (hint, *typing.get_args(hint)) if typing.get_origin(hint) not in (list, dict) else (hint,)
    if text.lower() == "null":
        return text
    if text in ("none", "None") and (type(None) in kinds or key in NAMED):
        if str not in kinds and key not in NAMED:
            return "null"
        raise ConfigError(f"{key}: got {text}, expected null for no value, or the text in quotes: {key}='\"{text}\"'")
    if str in kinds:
        return _text(key, text)
    if int in kinds:
        return _whole(text)
    if hint == list[str]:
        return _nested(text, lambda part, name: part if name else _text(key, part))
    if key in NAMED:
        return _source(key, text) if _inside(text) is None else _nested(text, functools.partial(_named_part, key))
    if hint is _FREE or hint is Any or typing.get_origin(hint) is dict:
        return _nested(text, lambda part, _: _free(key, part))
    return _nested(text, lambda part, _: _decoded(key, part))


def _nested(text: str, leaf: Callable[[str, str | None], str], name: str | None = None) -> str:
    """The text with each value in its lists and mappings replaced by leaf(value, the name that a mapping gives it)."""
    inner = _inside(text)
    if inner is None:
        return leaf(text, name)
    values = []
    for item in inner:
        head, colon, value = item.partition(":") if text[0] == "{" else ("", "", item)
        values.append(f"{head}{colon}{_nested(value.strip(), leaf, head.strip() or name)}")
    return text[0] + ",".join(values) + text[-1]


def _inside(text: str) -> list[str] | None:
    """The elements of a list, or the items of a mapping; None for a text that is neither."""
    if len(text) < 2 or text[0] + text[-1] not in ("[]", "{}"):
        return None
    return _pieces(text[1:-1]) if text[1:-1].strip() else []


def _named_part(key: str, text: str, name: str | None) -> str:
    return _text(key, text) if name is None or name in NAMES else _free(key, text)


def _source(key: str, text: str) -> str:
    """A path, name or address that stands alone. A comma is part of a file's name where there is such a file."""
    if _literal(text) is None and not Path(text).expanduser().exists():
        values = _pieces(text)
        if values is not None and len(values) > 1:
            raise ConfigError(
                f"{key}: got {text!r}, expected one value; write {key}=[{text}] for a list, sweep with -m, or quote a "
                f"name that has a comma: {key}='\"{text}\"'"
            )
    return _text(key, text)


def _text(key: str, text: str) -> str:
    """A value that is text, quoted where Hydra would not read it as that text."""
    literal = _literal(text)
    if literal is not None:
        if literal[0] == '"':
            return _quoted(_unescaped(key, literal[1]))
        if key in ESCAPED and (found := _ESCAPE.search(literal[1])) is not None and found[0] != "\\\\":
            _warn(f"{key}: {text} holds a backslash, not what {found[0][:2]} stands for; use double quotes for that")
        return text
    if key in ESCAPED and (read := _unescaped(key, text)) != text:
        return _quoted(read)
    parsed = _parsed(text)
    if isinstance(parsed, str) or (_CALL.fullmatch(text) and parsed is not _REFUSED):
        return text
    several = _pieces(text) if text[0] in "'\"" else None
    if several is not None and all(_literal(one.strip()) for one in several):  # a sweep without -m, which Hydra refuses
        return text
    return _quoted(text)


def _free(key: str, text: str) -> str:
    """A value without a type in the schema: Hydra's reading, except for what no one can mean by it."""
    if text.lower() in _YAML_WORDS:
        word = "true" if text.lower() in ("on", "yes") else "false"
        raise ConfigError(f"{key}: got {text}, expected {word}, or the text in quotes: '\"{text}\"'")
    if text[:1] in ("[", "{") or _literal(text) is not None or _parsed(text) is not _REFUSED or "," in text:
        return _decoded(key, text)
    return _quoted(text)


def _decoded(key: str, text: str) -> str:
    """The value with the escapes of a text in double quotes read, else as it is."""
    literal = _literal(text)
    return _quoted(_unescaped(key, literal[1])) if literal is not None and literal[0] == '"' else text


def _whole(text: str) -> str:
    """A whole number in the notation of others, `1e3`, as an integer."""
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?", text) and float(text).is_integer():
        return text if text.lstrip("+-").isdigit() else str(int(float(text)))
    return text


# --- text ---


def _unescaped(key: str, text: str) -> str:
    def sign(found: re.Match[str]) -> str:
        if found["sign"]:
            return found["sign"]
        if found["code"]:
            return chr(int(found["code"], 16))
        letters = found["letters"]
        if _LATEX.fullmatch(letters):
            _warn(f"{key}: \\{letters} is read as LaTeX, not as an escape; for a line break or a tab, type one")
            return found[0]
        return _SIGNS[letters[0]] + letters[1:]

    return _ESCAPE.sub(sign, text)


def _warn(text: str) -> None:
    warn(text)


def _quoted(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=text, quote=Quote.single).with_quotes()


_REFUSED: Any = object()


def _parsed(text: str) -> Any:
    """What Hydra reads in a value: a str, a number, a bool, a QuotedString, a container or a sweep; _REFUSED if nothing."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(f"key={text}")._value
    except (HydraException, RecursionError):
        return _REFUSED


def _literal(text: str) -> tuple[str, str] | None:
    """(quote, what is between) of a text that is in quotes as a whole."""
    if text[:1] in ("'", '"') and _end_of_literal(text, 0) == len(text):
        return text[0], text[1:-1]
    return None


def _end_of_literal(text: str, start: int) -> int | None:
    """The place behind the quote that closes the one at `start`; None where none does."""
    at = start + 1
    while at < len(text):
        if text[at] == text[start]:
            return at + 1
        at += 2 if text[at] == "\\" else 1
    return None


def _pieces(text: str) -> list[str] | None:
    """The text split at commas outside of quotes and brackets; None where a quote or a bracket does not close."""
    pieces, begin, at, fresh = [], 0, 0, True
    open_brackets: list[str] = []
    while at < len(text):
        sign = text[at]
        if fresh and sign in "'\"":  # only at the beginning of a value: it's an apostrophe elsewhere
            end = _end_of_literal(text, at)
            if end is None:
                return None
            at, fresh = end, False
            continue
        if sign in _OPEN:
            open_brackets.append(_CLOSE[_OPEN.index(sign)])
        elif sign in _CLOSE and (not open_brackets or open_brackets.pop() != sign):
            return None
        elif sign == "," and not open_brackets:
            pieces.append(text[begin:at])
            begin = at + 1
        fresh = sign in ",:[{(" or (fresh and sign.isspace())
        at += 2 if sign == "\\" else 1
    return None if open_brackets else [*pieces, text[begin:]]


def _unclosed(key: str, text: str) -> ConfigError:
    return ConfigError(
        f"{key}: got {quoted(text)}, whose quotes or brackets do not close, expected values separated by commas; put a text "
        f"that has such a sign in quotes: {key}='\"...\"'"
    )
