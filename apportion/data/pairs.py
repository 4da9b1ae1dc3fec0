"""Rows of preference and demonstration data: what the columns say, as a prompt and one or two answers to it.

A row is one of these; its columns say which, so that sources of several kinds can be mixed:

    prompt, chosen, rejected      text or messages; answers may be messages from the assistant's first on
    chosen, rejected              messages: two conversations that begin alike; the prompt is what they share
    chosen, rejected              text in the hh format ("\\n\\nHuman: ...\\n\\nAssistant: ..."): likewise
    prompt, completion            for supervised fine-tuning; `response` is as good a name
    messages, conversations       for supervised fine-tuning: every turn of the assistant is learned

Messages may be of any form that `data.messages` reads; a `system` column beside a conversation is its first message, and
a `tools` column goes with every form. For supervised fine-tuning a row of a pair stands for its chosen answer, and a row
whose `label` says that its completion is a bad one is refused. Tokens are made in `pair_tokens`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from apportion.data.errors import BadRows, DataError, UnusableError, listed
from apportion.data.messages import Message, clean_messages, clean_tools
from apportion.data.readers import read_file

_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass
class PairColumns:
    """What the columns are called."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completion: str | None = None  # None: `completion`, or else `response`
    messages: str = "messages"
    margin: str | None = None  # how far apart the two are, for the reward model; None: not in the data
    tools: str | None = "tools"  # None: rows have none
    label: str | None = "label"  # whether a completion is a good one; None: rows do not say


@dataclass
class Example:
    """A prompt and one answer (a demonstration) or two (chosen, rejected).

    An answer is text, or messages of which the first and the last are the assistant's.
    """

    prompt: str | list[Message]
    answers: list[str | list[Message]]
    margin: float | None = None
    tools: list[dict[str, Any]] | None = None


GOOD_LABELS = (True, "true", "1", "yes", "good", "desirable", "chosen")
BAD_LABELS = (False, -1, "false", "0", "-1", "no", "bad", "undesirable", "rejected")


def read_pair(values: Mapping[str, Any], columns: PairColumns) -> Example:
    """The pair of a row, or UnusableError.

    >>> row = {"chosen": "\\n\\nHuman: 1 + 1?\\n\\nAssistant: 2", "rejected": "\\n\\nHuman: 1 + 1?\\n\\nAssistant: 3"}
    >>> read_pair(row, PairColumns()).answers
    [[{'role': 'assistant', 'content': '2'}], [{'role': 'assistant', 'content': '3'}]]
    """
    missing = [name for name in (columns.chosen, columns.rejected) if name not in values]
    if missing:
        raise UnusableError(
            "missing_column",
            f"no column {missing[0]!r}, got {listed(values)}; name the right one with data.chosen_column and "
            "data.rejected_column",
        )
    chosen, rejected = (_plain(values[name], name) for name in (columns.chosen, columns.rejected))
    prompt = values.get(columns.prompt)
    _refuse_empty({columns.chosen: chosen, columns.rejected: rejected})
    if _is_hh(chosen) and _is_hh(rejected):  # whole transcripts: a prompt beside them is in them
        chosen, rejected = hh_messages(chosen), hh_messages(rejected)
    if _is_conversation(chosen) and _is_conversation(rejected):
        example = _with_shared_prompt(chosen, rejected)
    elif prompt is None:
        raise UnusableError(
            "missing_column",
            f"no column {columns.prompt!r}, got {listed(values)}; expected one, or conversations that begin alike "
            "in both answers (messages, or text with Human: and Assistant: turns)",
        )
    else:
        example = Example(_prompt(prompt, columns.prompt), [_answer(chosen, "chosen"), _answer(rejected, "rejected")])
    if example.answers[0] == example.answers[1]:
        raise UnusableError("equal", "the chosen answer equals the rejected one, expected two that differ")
    _refuse_silent_turns(example)
    margin = None if columns.margin is None else _margin(values, columns.margin)
    return replace(example, margin=margin, tools=_tools(values, columns))


def read_demonstration(values: Mapping[str, Any], columns: PairColumns) -> Example:
    """The demonstration of a row, or UnusableError.

    >>> read_demonstration({"prompt": "1 + 1?", "response": "2"}, PairColumns())
    Example(prompt='1 + 1?', answers=['2'], margin=None, tools=None)
    """
    example = _demonstration(values, columns)
    _refuse_silent_turns(example)
    return replace(example, tools=_tools(values, columns))


def _demonstration(values: Mapping[str, Any], columns: PairColumns) -> Example:
    conversation = columns.messages
    if conversation == PairColumns.messages and values.get(conversation) is None and "conversations" in values:
        conversation = "conversations"
    if conversation in values:
        _refuse_bad_label(values, columns)
        return _from_conversation(_with_system(_messages(values[conversation], conversation), values.get("system")))
    names = [columns.completion] if columns.completion else ["completion", "response"]
    completion = next((name for name in names if name in values), None)
    if completion is not None:
        if columns.prompt not in values:
            raise UnusableError(
                "missing_column",
                f"no column {columns.prompt!r}, got {listed(values)}; name it with data.prompt_column",
            )
        _refuse_bad_label(values, columns)
        _refuse_empty({completion: values[completion]})
        return Example(_prompt(values[columns.prompt], columns.prompt), [_answer(values[completion], completion)])
    if columns.chosen not in values:
        raise UnusableError(
            "missing_column",
            f"no column {columns.messages!r}, {names[0]!r} or {columns.chosen!r}, got {listed(values)}; name the "
            "right one with data.messages_column, data.completion_column or data.chosen_column",
        )
    chosen = _plain(values[columns.chosen], columns.chosen)
    _refuse_empty({columns.chosen: chosen})
    if _is_hh(chosen):
        chosen = hh_messages(chosen)
    if _is_conversation(chosen):
        messages = _ending_with_an_answer(_messages(chosen, columns.chosen))
        return Example(messages[:-1], [messages[-1:]])
    if columns.prompt not in values:
        raise UnusableError("missing_column", f"no column {columns.prompt!r}, got {listed(values)}")
    return Example(_prompt(values[columns.prompt], columns.prompt), [_answer(chosen, columns.chosen)])


Reader = Callable[[Mapping[str, Any], PairColumns], Example]


def row_check(read: Reader, columns: PairColumns) -> Callable[[Mapping[str, Any], str], tuple[str, str] | None]:
    """What `load_sources` asks of a row while it loads it."""

    def check(values: Mapping[str, Any], column: str) -> tuple[str, str] | None:
        try:
            read(values, columns)
        except UnusableError as error:
            return error.reason, str(error)
        return None

    return check


def hh_messages(text: str) -> list[Message]:
    """The turns of an hh transcript, without the white space around each.

    >>> hh_messages("\\n\\nHuman: hi\\n\\nAssistant: yes?\\n\\nHuman: no")[1:]
    [{'role': 'assistant', 'content': 'yes?'}, {'role': 'user', 'content': 'no'}]
    """
    _, *parts = _HH_TURN.split(text)
    return [
        {"role": _HH_ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def prompts_of(path: str) -> Iterator[dict[str, Any]]:
    """The prompts of a file of pairs, each once, as rows for reinforcement learning.

    As a source: `{source: "function:apportion.data.pairs:prompts_of", path: pairs.jsonl.gz}`. Rows that give no pair
    are left out.
    """
    from pathlib import Path

    seen: set[str] = set()
    for row in read_file(Path(path), BadRows("skip")):
        try:
            pair = read_pair(row.values, PairColumns())
        except UnusableError:
            continue
        if str(pair.prompt) not in seen:
            seen.add(str(pair.prompt))
            yield {"prompt": pair.prompt} | ({"tools": pair.tools} if pair.tools else {})


def _refuse_empty(answers: Mapping[str, Any]) -> None:
    for name, value in answers.items():
        if value is None or not value or (isinstance(value, str) and not value.strip()):
            raise UnusableError("empty", f"column {name!r} is empty, expected text or messages")


def _refuse_silent_turns(example: Example) -> None:
    """UnusableError where a turn to learn says nothing: it would teach to end at once."""
    for message in (message for answer in example.answers if isinstance(answer, list) for message in answer):
        silent = not (message["content"].strip() or "tool_calls" in message or "reasoning_content" in message)
        if silent and message["role"] == "assistant" and message.get("train", True):
            raise UnusableError(
                "empty",
                "a turn of the assistant is empty, expected an answer; train: false keeps it from being learned",
            )


def _is_hh(value: Any) -> bool:
    return isinstance(value, str) and bool(_HH_TURN.match(value.lstrip())) and "Assistant:" in value


def _is_conversation(value: Any) -> bool:
    """Messages that begin before the assistant's answer."""
    return isinstance(value, list) and isinstance(value[0], Mapping) and value[0].get("role") != "assistant"


def _messages(value: Any, column: str) -> list[Message]:
    try:
        return clean_messages(value)
    except DataError as error:
        raise UnusableError("broken", f"column {column!r}: {error}") from None


def _plain(value: Any, column: str) -> Any:
    """Messages in the one form; anything else as it is."""
    return _messages(value, column) if isinstance(value, list) and value else value


def _with_system(messages: list[Message], system: Any) -> list[Message]:
    """With the text of a `system` column, unless the messages have such a message of their own."""
    if not isinstance(system, str) or not system.strip() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _tools(values: Mapping[str, Any], columns: PairColumns) -> list[dict[str, Any]] | None:
    try:
        return clean_tools(values.get(columns.tools)) if columns.tools else None
    except DataError as error:
        raise UnusableError("broken", str(error)) from None


def _refuse_bad_label(values: Mapping[str, Any], columns: PairColumns) -> None:
    """UnusableError where the row says that its completion is no good one (KTO's form), or says what nobody knows."""
    label = values.get(columns.label) if columns.label else None
    if label is None:
        return
    said = label.strip().lower() if isinstance(label, str) else label
    if said in BAD_LABELS:
        raise UnusableError(
            "label", f"column {columns.label!r}: got {label!r}, so this is a bad answer, which is not learned"
        )
    if said not in GOOD_LABELS:
        raise UnusableError(
            "label", f"column {columns.label!r}: got {label!r}, expected true or false (a good or a bad answer); "
            "data.label_column=null leaves the column out",
        )  # fmt: skip


def _prompt(value: Any, column: str) -> str | list[Message]:
    if isinstance(value, str) and value.strip():
        return value
    if not value or isinstance(value, str):
        raise UnusableError("empty", f"column {column!r} is empty, expected text or messages")
    messages = _messages(value, column)
    if messages[-1]["role"] == "assistant":
        raise UnusableError("broken", f"column {column!r}: the last message is the assistant's, expected a question")
    return messages


def _answer(value: Any, column: str) -> str | list[Message]:
    if isinstance(value, str):
        return value
    messages = _ending_with_an_answer(_messages(value, column))
    if messages[0]["role"] != "assistant":
        raise UnusableError(
            "broken", f"column {column!r}: got messages that begin with {messages[0]['role']!r}, expected the assistant"
        )
    return messages


def _ending_with_an_answer(messages: list[Message]) -> list[Message]:
    """Up to the assistant's last turn; what nobody answered teaches nothing."""
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    if not messages or not (messages[-1]["content"].strip() or "tool_calls" in messages[-1]):
        raise UnusableError("empty", "the assistant's last turn is empty or missing, expected an answer")
    return messages


def _from_conversation(messages: list[Message]) -> Example:
    """Every turn of the assistant is an answer; what goes before the first one is the prompt."""
    messages = _ending_with_an_answer(messages)
    before = list(takewhile(lambda message: message["role"] != "assistant", messages))
    if not before:
        raise UnusableError("broken", "the assistant speaks first, expected a question before its answer")
    return Example(before, [messages[len(before) :]])


def _with_shared_prompt(chosen: Sequence[Message], rejected: Sequence[Message]) -> Example:
    first, second = _messages(list(chosen), "chosen"), _messages(list(rejected), "rejected")
    if first == second:
        raise UnusableError("equal", "the chosen conversation equals the rejected one, expected two that differ")
    first, second = _ending_with_an_answer(first), _ending_with_an_answer(second)
    pairs = zip(first, second, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if shared == len(first) or shared == len(second):
        raise UnusableError("broken", "one conversation is the beginning of the other, expected two different answers")
    if shared == 0 or first[shared]["role"] != "assistant" or second[shared]["role"] != "assistant":
        raise UnusableError(
            "broken", f"the conversations part at message {shared + 1}, which is not an answer in both; expected the "
            "same prompt",
        )  # fmt: skip
    return Example(first[:shared], [first[shared:], second[shared:]])


def _margin(values: Mapping[str, Any], column: str) -> float:
    value = values.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise UnusableError("broken", f"column {column!r}: got {value!r}, expected a number of at least 0")
    return float(value)
