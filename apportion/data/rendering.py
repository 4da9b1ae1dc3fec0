"""A conversation through a chat template, and whether what comes out says what the row says.

A template is a program that may leave out what it does not know: tool calls, thoughts, a role, content of an unexpected
form. So after each rendering every message's text and every tool call (its name, each argument) is looked for, in the
order of the messages, each at its own place. White space around a text may go, as templates trim. A tool's answer
and arguments may be written as JSON writes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from apportion.data import templates
from apportion.data.errors import FAULTY_TEMPLATE, DataError, UnusableError, reason_of
from apportion.data.find import Place, find_message
from apportion.data.messages import REASONING_KEYS, Message, tool_name

NOT_RENDERED = "not_rendered"  # what a row is counted under whose text the template leaves out or changes
LEADING_ROLES = ("system", "developer")  # some templates show what these say in a later message
PLACES = 64  # of such a text that are tried: a template that repeats it without end is not searched without end
SHORT = 24  # characters: a text this short may be found in what the template itself writes
SHAPES = 4096  # kept; more than any data has
REFUSES = "the chat template refuses these messages"
OVERRUN = "template_limit"  # what a row is counted under with which the template goes past a limit
FAULTY_AFTER = 2  # conversations past a limit: each may take the whole of it


@dataclass
class Rendered:
    text: str
    messages: list[Message]  # as the template saw them
    reasoning_left_out: int = 0  # messages of the assistant of which it shows the answer alone


@dataclass
class Renderer:
    """The chat template of a tokenizer, with the arguments of the run."""

    tokenizer: Any
    template_kwargs: Mapping[str, Any]
    _shapes: dict[Any, int | None] = field(default_factory=dict)
    _overruns: list[str] = field(default_factory=list)  # the limits that the template went past, one for each time

    def text(self, messages: list[Message], tools: Any, asks: bool, refuses: str = REFUSES, cure: str = "") -> str:
        """What the template writes, unchecked; `asks` adds the beginning of the assistant's next message.

        DataError where it refuses the messages (`refuses` and `cure` say so) or goes past a limit. After the second time
        past a limit it runs no more: the template is at fault rather than a row.
        """
        if len(self._overruns) < FAULTY_AFTER:
            try:
                return templates.apply(self.tokenizer, messages, tools, asks, self.template_kwargs)
            except templates.Refused as error:
                raise DataError(f"{refuses} ({error}){cure}") from error
            except templates.Overrun as error:
                self._overruns.append(str(error))
        said = f"the chat template {self._overruns[-1]}"
        if len(self._overruns) < FAULTY_AFTER:
            raise UnusableError(
                OVERRUN,
                f"{said}; set model.chat_template to one that does not, or leave such rows out with data.on_bad_row=skip",
            )
        raise UnusableError(
            FAULTY_TEMPLATE,
            f"{said}, for {FAULTY_AFTER} conversations by now, so data.on_bad_row=skip does not help; set "
            "model.chat_template to one that does not",
        )

    def checked(self, messages: list[Message], tools: list[dict[str, Any]] | None, asks: bool) -> Rendered:
        """The rendering of messages in the one form, with tool arguments written as the template takes them.

        UnusableError where it does not say what the messages say.
        """
        return faithful(messages, lambda form: self._checked(form, tools, asks))

    def _checked(self, form: list[Message], tools: list[dict[str, Any]] | None, asks: bool) -> Rendered:
        text = self.text(form, tools, asks)
        return Rendered(text, form, self.check(text, form, tools, asks))

    def check(self, text: str, messages: list[Message], tools: list[dict[str, Any]] | None, asks: bool) -> int:
        """How many of the assistant's messages lack their reasoning in `text`; UnusableError where more is missing."""
        places = _places(text, messages)
        if any(_is_short(message) for message in messages):
            missing = self._missing_of_shape(messages, tools, asks)
            if missing is not None:
                raise left_out(messages[missing], missing)
        for tool in tools or []:
            if str(tool_name(tool)) not in text:
                raise UnusableError(
                    NOT_RENDERED,
                    f"the chat template does not show the tool {tool_name(tool)!r} of the row's tools; set "
                    "model.chat_template to one that knows tools, or data.tools_column=null to leave them out",
                )
        _refuse_dumps(text, messages)
        self._refuse_none(text, messages, tools)
        return sum(place.reasoning_left_out for place in places)

    def _missing_of_shape(self, messages: list[Message], tools: Any, asks: bool) -> int | None:
        """Which message the template does not show in a conversation of this shape, found with words that it does not
        write itself in the places of all texts; None where it shows them all, or refuses such words."""
        shape = [
            (m["role"], bool(m["content"].strip()), "reasoning_content" in m, len(m.get("tool_calls", ())))
            for m in messages
        ]
        key = (str(self.tokenizer.chat_template), tuple(shape), tools is not None, asks)
        if key not in self._shapes:
            if len(self._shapes) >= SHAPES:
                self._shapes.clear()
            self._shapes[key] = self._missing(messages, tools, asks)
        return self._shapes[key]

    def _missing(self, messages: list[Message], tools: Any, asks: bool) -> int | None:
        marked = [_marked(message, number) for number, message in enumerate(messages)]
        found: list[int | None] = []
        for form in forms(marked):
            try:
                found.append(_first_missing(self.text(form, tools, asks), form))
            except DataError as error:  # of a template that looks into the texts: nothing is known then
                if reason_of(error) == FAULTY_TEMPLATE:
                    raise
        return None if None in found or not found else found[0]

    def _refuse_none(self, text: str, messages: list[Message], tools: Any) -> None:
        if "None" not in text or _writes_none(self._template(tools)):
            return
        own = sum(said.count("None") for said in strings([messages, tools, dict(self.template_kwargs)]))
        if text.count("None") > own:
            before = text[: text.index("None")][-20:]
            raise UnusableError(
                NOT_RENDERED,
                f"the chat template writes None, which the row does not say (after {before!r}): it prints a key that the "
                "messages lack; set model.chat_template to one that does not",
            )

    def _template(self, tools: Any) -> str:
        chosen = getattr(self.tokenizer, "get_chat_template", None)
        return str(chosen(tools=tools) if chosen is not None else self.tokenizer.chat_template)


Result = TypeVar("Result")


def faithful(messages: list[Message], use: Callable[[list[Message]], Result]) -> Result:
    """What `use` gives of the first form of the messages that the template takes and shows whole; else its error."""
    errors: list[DataError] = []
    for form in forms(messages):
        try:
            return use(form)
        except DataError as error:
            if reason_of(error) in (OVERRUN, FAULTY_TEMPLATE):  # another form would take as long
                raise
            errors.append(error)
    raise next((error for error in errors if isinstance(error, UnusableError)), errors[0])


def forms(messages: list[Message]) -> Iterator[list[Message]]:
    """The messages as templates want them: thoughts under each name that is in use, the arguments of tool calls as
    mappings, which most take, then as JSON text."""
    named = [
        {**m, **dict.fromkeys(REASONING_KEYS, m["reasoning_content"])} if "reasoning_content" in m else m
        for m in messages
    ]
    if not any("tool_calls" in message for message in named):
        yield named
        return
    for convert in (_arguments_mapping, _arguments_text):
        yield [
            {**m, "tool_calls": [convert(call) for call in m["tool_calls"]]} if "tool_calls" in m else m for m in named
        ]


def left_out(message: Message, index: int, what: str | None = None) -> UnusableError:
    """The error for a message that the template does not show, or `what` of it."""
    said = what or ("the tool calls" if not message["content"].strip() and "tool_calls" in message else "the text")
    return UnusableError(
        NOT_RENDERED,
        f"the chat template leaves out or changes {said} of message {index + 1} ({message['role']}: "
        f"{message['content'][:30]!r}); set model.chat_template to one that shows it, or leave such rows out with "
        "data.on_bad_row=skip",
    )


def strings(value: Any) -> Iterator[str]:
    """Every text in a nest of mappings and lists, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from strings(key)
            yield from strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)


# places


def _places(text: str, messages: Sequence[Message]) -> list[Place]:
    """Where each message is, in their order; UnusableError where one is not."""
    places = _in_order(text, messages)
    if isinstance(places, list):
        return places
    first = messages[0]
    said = first["content"].strip()
    if first["role"] in LEADING_ROLES and said and len(messages) > 1:
        # Some templates put the system message into a later one. What it takes there is nobody else's.
        start, tried = text.find(said), 0
        while start >= 0 and tried < PLACES:
            others = _in_order(text[:start] + "\0" * len(said) + text[start + len(said) :], messages[1:])
            if isinstance(others, list):
                return [Place(start, start + len(said)), *others]
            start, tried = text.find(said, start + 1), tried + 1
    raise left_out(messages[places], places)


def _in_order(text: str, messages: Sequence[Message]) -> list[Place] | int:
    """The messages' places, or the index of the first that has none."""
    places: list[Place] = []
    position = 0
    for index, message in enumerate(messages):
        place = find_message(text, message, position)
        if place is None:
            return index
        places.append(place)
        position = place.end
    return places


# messages of another kind


def _arguments_mapping(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        arguments = parsed if isinstance(parsed, dict) else arguments
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _arguments_text(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": written}}


def _is_short(message: Message) -> bool:
    return len(message["content"]) < SHORT or "tool_calls" in message or "reasoning_content" in message


def _word(number: int, name: str) -> str:
    return f"apportion{name}{number}x"  # a word that no template writes or changes


def _marked(message: Message, number: int) -> Message:
    """The message with words of our own in the place of every text."""
    marked = dict(message)
    if message["content"].strip():
        marked["content"] = _word(number, "said")
    if "reasoning_content" in message:
        marked["reasoning_content"] = _word(number, "thought")
    if "tool_calls" in message:
        marked["tool_calls"] = [
            {
                **call,
                "function": {
                    "name": _word(number, f"call{place}of"),
                    "arguments": {"a": _word(number, f"argument{place}of")},
                },
            }
            for place, call in enumerate(message["tool_calls"])
        ]
    return marked


def _first_missing(text: str, marked: Sequence[Message]) -> int | None:
    for number, message in enumerate(marked):
        words = [
            said
            for said in strings([message["content"], message.get("tool_calls", [])])
            if said.startswith("apportion") and said.endswith("x")
        ]
        if any(word not in text for word in words):
            return number
    return None


# what is no text of the row


def _refuse_dumps(text: str, messages: Sequence[Message]) -> None:
    """UnusableError where a mapping or list of a message is in the text as Python or JSON prints it."""
    if "{" not in text:
        return
    for index, message in enumerate(messages):
        whole = [str(message), json.dumps(message, ensure_ascii=False, default=str)]
        printed = [str(c) for c in _containers([c["function"]["arguments"] for c in message.get("tool_calls", [])])]
        for dump in [*whole, *printed]:
            if dump in text and text.count(dump) > sum(own.count(dump) for own in strings(messages)):
                raise UnusableError(
                    NOT_RENDERED,
                    f"the chat template shows message {index + 1} ({message['role']}) as a dump of a container "
                    f"({dump[:40]!r}); set model.chat_template to one that shows its text",
                )


def _containers(value: Any) -> Iterator[Any]:
    """Mappings and lists within `value` that Python prints otherwise than JSON."""
    if isinstance(value, Mapping | list):
        if value and str(value) != json.dumps(value, ensure_ascii=False, default=str):
            yield value
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _containers(inner)


@lru_cache(maxsize=16)
def _writes_none(template: str) -> bool:
    """Whether the template itself has the word None in a text that it writes."""
    from jinja2 import Environment, TemplateError

    try:
        return any(kind in ("data", "string") and "None" in said for _, kind, said in Environment().lex(template))
    except TemplateError:
        return True
