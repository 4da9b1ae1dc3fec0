"""Which characters and tokens of a rendered answer carry a loss: what the assistant said, and what ends its turn.

Learned as well is what a template writes around that as a form: white space, special tokens with at most one word after
each (a channel's name), and what frames a thought or a tool call. An empty reasoning block and any other text of the
template's own, such as a date, stay in the sequence without a loss.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from apportion.data.find import THINK_TAG, Place, find_message
from apportion.data.messages import Message
from apportion.data.reasoning import CLOSING, OPENING

_EMPTY_THOUGHT = re.compile(rf"\s*(?:{OPENING})\s*(?:{CLOSING})\s*")

Interval = tuple[int, int]  # of characters, the second one outside


def find_answer(span: str, question: str, message: Message) -> Place | None:
    """Where `span`, which follows `question`, has the whole message, reasoning included."""
    place = find_message(span, message, 0, keeps_reasoning=True)
    if place is not None:
        return place
    tag = THINK_TAG.match(message["content"].lstrip())
    if tag is None or not question.rstrip().endswith(tag[0]):
        return None
    # The generation prompt opens the thought that the answer opens too.
    content = message["content"].lstrip().removeprefix(tag[0])
    return find_message(span, {**message, "content": content}, 0, keeps_reasoning=True)


def learned_characters(span: str, place: Place, message: Message, ends: Ends) -> list[Interval]:
    """The characters of `span` that carry a loss."""
    start = _start(span[: place.start], message, ends)
    after = span[place.end :]
    at, length = ends.find(after)
    end = place.end + at + length
    if "tool_calls" in message or ends.is_form(after[:at]):
        return [(start, end)]
    return [(start, place.end), (place.end + at, end)]


def learned_tokens(tokenizer: Any, span: str, learned: Sequence[Interval]) -> tuple[list[int], list[bool]]:
    """The ids of a text, and for each whether it is in one of the intervals."""
    if not getattr(tokenizer, "is_fast", False):
        return _in_chunks(tokenizer, span, learned)
    encoded = tokenizer(span, add_special_tokens=False, return_offsets_mapping=True)
    mask: list[bool] = []
    reached = 0
    for begin, end in encoded["offset_mapping"]:
        begin = min(begin, reached)  # a tokenizer may leave white space out of the offsets
        if begin >= end:  # a further token of one character
            mask.append(bool(mask) and mask[-1])
        else:
            mask.append(any(begin < stop and end > start for start, stop in learned))
        reached = max(reached, end)
    return list(encoded["input_ids"]), mask


def _in_chunks(tokenizer: Any, span: str, learned: Sequence[Interval]) -> tuple[list[int], list[bool]]:
    """For tokenizers that do not say where a token lies: each interval and each gap for itself."""
    bounds = sorted({0, len(span), *(bound for interval in learned for bound in interval)})
    ids: list[int] = []
    mask: list[bool] = []
    for begin, end in pairwise(bounds):
        chunk = list(tokenizer(span[begin:end], add_special_tokens=False)["input_ids"])
        ids += chunk
        mask += [any(start <= begin and end <= stop for start, stop in learned)] * len(chunk)
    return ids, mask


class Ends:
    """What may end a turn: the tokenizer's eos, or else another special token."""

    def __init__(self, tokenizer: Any) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {*tokenizer.all_special_tokens, *(str(token.content) for token in added if token.special)}
        self.eos = str(tokenizer.eos_token)
        self.special = sorted(special, key=len, reverse=True)
        one = "|".join(re.escape(token) for token in self.special)
        self._any = re.compile(one)
        self._form = re.compile(rf"\s*(?:(?:{one})\s*(?:\w+\s*(?={one}))?)*")

    def find(self, after: str) -> Interval:
        """(place, length) of what ends a turn in the text after an answer; of all of it where nothing special does."""
        at = after.find(self.eos)
        if at >= 0:
            return at, len(self.eos)
        found = self._any.search(after)
        return (found.start(), len(found[0])) if found else (0, len(after))

    def is_form(self, text: str) -> bool:
        """Whether it is white space and special tokens, with at most one word between two of them."""
        return self._form.fullmatch(text) is not None

    def shared(self, answered: str, whole: str, least: int) -> str | None:
        """`answered` up to where `whole` goes on, without special tokens that a template writes at the end of all alone.
        None where that is less than `least` characters."""
        while not whole.startswith(answered):
            shorter = answered.rstrip()
            if shorter == answered:
                shorter = next((answered.removesuffix(token) for token in self.special if answered.endswith(token)), "")
            if len(shorter) <= least:
                return None
            answered = shorter
        return answered


def _start(before: str, message: Message, ends: Ends) -> int:
    """How many characters before the assistant's words carry no loss."""
    empty = _EMPTY_THOUGHT.match(before)
    start = empty.end() if empty else 0
    frames = "reasoning_content" in message or ("tool_calls" in message and not message["content"].strip())
    return start if frames or ends.is_form(before[start:]) else len(before)
