"""Where a rendered text shows a message."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apportion.data.messages import Message
from apportion.data.reasoning import CLOSING, OPENING

THINK_TAG = re.compile(f"({OPENING}|{CLOSING})")
CLOSING_TAG = re.compile(CLOSING)
THOUGHT = re.compile(f"(?:{OPENING}).*?(?:{CLOSING})", re.DOTALL)


@dataclass(frozen=True)
class Place:
    """What a message takes of a text, its tool calls included."""

    start: int
    end: int
    reasoning_left_out: bool = False


def find_message(text: str, message: Message, position: int, keeps_reasoning: bool = False) -> Place | None:
    """The first place from `position` on with the message's text and calls; None where something is missing.

    Of the assistant's words the reasoning may be missing, unless `keeps_reasoning`.

    >>> answer = {"role": "assistant", "content": "<think>1 and 1</think> 2"}
    >>> find_message("a: <think>\\n1 and 1\\n</think>\\n\\n2;", answer, 0)
    Place(start=3, end=30, reasoning_left_out=False)
    >>> find_message("a: 2;", answer, 0)
    Place(start=3, end=4, reasoning_left_out=True)
    """
    calls = message.get("tool_calls", [])
    for pieces, left_out in _ways(message):
        if left_out and keeps_reasoning:
            continue
        body = _find_pieces(text, pieces, position, message["role"] == "tool")
        if body is None:
            continue
        place = _with_calls(text, calls, body)
        if place is None and calls and pieces:  # some templates write the calls before the text
            spoken = _with_calls(text, calls, (position, position))
            body = _find_pieces(text, pieces, spoken[1], False) if spoken is not None else None
            place = (spoken[0], body[1]) if spoken is not None and body is not None else None
        if place is not None:
            return Place(*place, left_out)
    return None


def _ways(message: Message) -> Iterator[tuple[list[str], bool]]:
    """What the message's text may become, as pieces in their order; and whether its reasoning is then left out."""
    content, thought = message["content"].strip(), message.get("reasoning_content", "").strip()
    yield [piece for piece in (thought, content) if piece], False
    if message["role"] != "assistant":
        return
    tagged = THINK_TAG.search(content) is not None
    if tagged:
        yield [*([thought] if thought else []), *_split(content)], False
    if thought:
        yield [content] if content else [], True
    if tagged:
        yield [piece for piece in (CLOSING_TAG.split(content)[-1].strip(),) if piece], True
        yield [piece.strip() for piece in _without_thoughts(content) if piece.strip()], True


def _without_thoughts(content: str) -> list[str]:
    """What is before, between and after the thoughts of `content`. After the last closing tag no opening one is looked
    at: each would be followed to the end."""
    end = max((tag.end() for tag in CLOSING_TAG.finditer(content)), default=0)
    pieces = THOUGHT.split(content[:end])
    return [*pieces[:-1], pieces[-1] + content[end:]]


def _split(content: str) -> list[str]:
    return [piece.strip() for piece in THINK_TAG.split(content) if piece.strip()]


def _find_pieces(text: str, pieces: Sequence[str], position: int, escaped: bool) -> tuple[int, int] | None:
    start = None
    for piece in pieces:
        found, length = _find(text, piece, position, escaped)
        if found < 0:
            return None
        start, position = found if start is None else start, found + length
    return position if start is None else start, position


def _with_calls(text: str, calls: Sequence[Mapping[str, Any]], body: tuple[int, int]) -> tuple[int, int] | None:
    """`body` with the calls after it."""
    start, end = body
    empty = start == end
    for call in calls:
        found = [_find_value(text, value, end) for value in _values(call["function"])]
        if any(place < 0 for place, _ in found):
            return None
        start = min(place for place, _ in found) if empty else start
        end, empty = max(place + length for place, length in found), False
    return start, end


def _values(function: Mapping[str, Any]) -> Iterator[Any]:
    """A call's name, and the keys and values of its arguments."""
    yield function["name"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    yield from _leaves(arguments)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _find_value(text: str, value: Any, position: int) -> tuple[int, int]:
    if isinstance(value, str):
        return _find(text, value.strip(), position, True)
    written = dict.fromkeys((json.dumps(value, default=str), str(value)) if value is not None else ("null",))
    found = [(text.find(way, position), len(way)) for way in written]
    return min((place for place in found if place[0] >= 0), default=(-1, 0))


def _find(text: str, said: str, position: int, escaped: bool) -> tuple[int, int]:
    """(place, length) of the first occurrence; (-1, 0) where there is none."""
    found = [(text.find(said, position), len(said))]
    if escaped:
        found += [(text.find(way, position), len(way)) for way in _as_json(said)]
    return min((place for place in found if place[0] >= 0), default=(-1, 0))


def _as_json(said: str) -> list[str]:
    """How JSON writes a text: with and without escapes of other alphabets, and of what HTML reads."""
    plain = [json.dumps(said, ensure_ascii=False)[1:-1], json.dumps(said)[1:-1]]
    html = [
        way.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("'", "\\u0027")
        for way in plain
    ]
    return [way for way in dict.fromkeys([*plain, *html]) if way != said]
