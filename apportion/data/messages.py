"""One form for messages, whatever form a row wrote them in: what every stage gives to a chat template.

    role and content              OpenAI's and Hugging Face's; null keys, which Arrow adds to rows of a table, are dropped
    from and value                ShareGPT's; its roles become user, assistant, system and tool, also beside content
    content as a list of parts    the texts, joined by a line break; a thought among them becomes `reasoning_content`
    function_call                 becomes `tool_calls`

A message in the one form has a `role`, a `content` that is text, and as far as the row has them `reasoning_content` (of
the assistant), `tool_calls` (`[{type, id, function: {name, arguments}}]`) and `train` (False: not to be learned from).
Every other key stays as it is. A role is one of ROLES, or one that a loaded chat template compares roles with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from apportion.data.errors import DataError, listed, nearest

Message = dict[str, Any]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
# What chat templates know; "ipython", "environment" and "observation" are names of a tool's answer in some of them.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment", "observation")
_ROLE = re.compile(r"[A-Za-z][\w-]{0,39}")  # of a template's own
TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHT_PARTS = {"thinking": "thinking", "reasoning": "text"}  # type of a part -> where its text is
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_NOT_LEARNED = {"weight": (0, 1), "train": (False, True), "training": (False, True), "loss": (False, True)}
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # of a pair that JSON writes for one character: no tokenizer takes it


_templates: dict[str, str] = {}  # chat templates that this process has loaded -> what they write about roles


def know_template(template: Any) -> None:
    """From now on messages may have a role that this chat template compares roles with: a quoted word beside `role`."""
    for text in template.values() if isinstance(template, Mapping) else [template]:
        if isinstance(text, str):
            blocks = (re.split(r"[%}]\}", block, maxsplit=1)[0] for block in re.split(r"\{[%{]", text)[1:])
            _templates[text] = "\n".join(block for block in blocks if "role" in block)


def _of_a_template(role: str) -> bool:
    return _ROLE.fullmatch(role) is not None and any(
        f"{quote}{role}{quote}" in written for written in _templates.values() for quote in ("'", '"')
    )


def clean_messages(value: Any) -> list[Message]:
    """Messages in the one form; DataError where they are not messages or hold something other than text.

    >>> clean_messages([{"from": "human", "value": "hi"}, {"role": "user", "content": [{"type": "text", "text": "ho"}]}])
    [{'role': 'user', 'content': 'hi'}, {'role': 'user', 'content': 'ho'}]
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"got {str(value)[:60]!r}, expected a list of messages")
    return [_message(message, number + 1) for number, message in enumerate(value)]


def clean_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a row, from a list of mappings or its JSON text; None where it has none.

    >>> clean_tools('[{"type": "function", "function": {"name": "weather"}}]')
    [{'type': 'function', 'function': {'name': 'weather'}}]
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"tools: got {value[:60]!r}, expected a list of tools or its JSON text") from None
    if not value:
        return None
    listed = [value] if isinstance(value, Mapping) else value if isinstance(value, list) else []
    # A tool may come as JSON text: Arrow has no type for schemas that differ.
    tools = [without_nulls(_json_mapping(tool) if isinstance(tool, str) else tool) for tool in listed]
    if not tools or any(tool_name(tool) is None for tool in tools):
        raise DataError(
            f"tools: got {str(value)[:60]!r}, expected a list of tools, each with a name; "
            "data.tools_column=null leaves the column out"
        )
    return tools


def tool_name(tool: Any) -> str | None:
    """
    >>> tool_name({"type": "function", "function": {"name": "weather"}}), tool_name({"name": "weather"})
    ('weather', 'weather')
    """
    if not isinstance(tool, Mapping):
        return None
    inner = tool.get("function")
    name = (inner if isinstance(inner, Mapping) else tool).get("name")
    return name if isinstance(name, str) and name else None


def without_nulls(value: Any) -> Any:
    """`value` without the keys whose value is null, at any depth. Nulls that are elements of a list stay.

    >>> without_nulls({"city": "Oslo", "unit": None, "days": [{"from": None, "to": 2}]})
    {'city': 'Oslo', 'days': [{'to': 2}]}
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def check_characters(text: Any) -> None:
    """DataError where a text, or one in messages, holds half a character (a lone surrogate)."""
    whole = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, default=str)
    found = _HALF_CHARACTER.search(whole)
    if found:
        raise DataError(f"got half a character ({found[0]!r}) in the text, expected whole ones")


def as_messages(prompt: str | list[Message]) -> list[Message]:
    """A text as one message of the user, messages in the one form."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else clean_messages(prompt)


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"got message {str(message)[:60]!r}, expected role and content")
    role = message.get("role") if message.get("role") is not None else message.get("from")
    if not isinstance(role, str) or not ("content" in message or "value" in message):
        raise DataError(f"got message {str(dict(message))[:60]!r}, expected role and content")
    who = f"message {number} ({role if role in ROLES else listed([role])})"
    content = message.get("content")
    if message.get("role") is None:
        role, content, message = _from_sharegpt(role, message.get("value"), message, who)
    elif role in SHAREGPT_ROLES and role not in ROLES:  # OpenAI's keys with ShareGPT's names: a template knows no "gpt"
        role, content, message = _from_sharegpt(role, content, message, who)
    elif role not in ROLES and not _of_a_template(role):
        raise DataError(
            f"{who}: got role {role!r:.40}, expected one of {', '.join(ROLES)}{nearest(role, ROLES)}, or one that "
            "model.chat_template compares roles with"
        )
    others = {k: v for k, v in message.items() if v is not None and k not in ("role", "content", "from", "value")}
    others = without_nulls(others)
    thoughts: list[str] = [others.pop(key) for key in REASONING_KEYS if key in others]
    if any(not isinstance(thought, str) for thought in thoughts):
        raise DataError(f"{who}: got reasoning {str(thoughts)[:60]}, expected text")
    calls = _calls(others.pop("tool_calls", None), others.pop("function_call", None), who)
    learned = _learned(others, who)
    text = _text(content, thoughts, who, needed=not (calls or thoughts))
    out: Message = {"role": "tool" if role == "function" else role, "content": text}
    if any(thought.strip() for thought in thoughts):
        out["reasoning_content"] = "\n".join(dict.fromkeys(thoughts))
    if calls:
        out["tool_calls"] = calls
    if not learned:
        out["train"] = False
    return out | others


def _from_sharegpt(role: str, content: Any, message: Mapping[str, Any], who: str) -> tuple[str, Any, Mapping[str, Any]]:
    known = SHAREGPT_ROLES.get(role.lower()) or (role if _of_a_template(role) else None)
    if known is None:
        raise DataError(
            f"{who}: got from {role!r:.40}, expected one of {', '.join(SHAREGPT_ROLES)}, or one that "
            "model.chat_template compares roles with"
        )
    if role.lower() != "function_call":
        return known, content, message
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        raise DataError(f"{who}: got {str(content)[:60]!r}, expected JSON with name and arguments") from None
    return known, "", {**message, "tool_calls": calls if isinstance(calls, list) else [calls]}


def _text(content: Any, thoughts: list[str], who: str, needed: bool) -> str:
    """The content as one text; thoughts among its parts are added to `thoughts`."""
    if isinstance(content, str):
        return content
    if content is None:
        if needed:
            raise DataError(f"{who}: content is null, expected text (null is for the assistant beside tool_calls)")
        return ""
    if not isinstance(content, list):
        raise DataError(f"{who}: got content {str(content)[:60]!r}, expected text or a list of text parts")
    texts: list[str] = []
    for part in content:
        kind = part.get("type") or "text" if isinstance(part, Mapping) else "text"
        kind = kind if isinstance(kind, str) else str(kind)[:40]
        where = THOUGHT_PARTS.get(kind, "text")
        text = part.get(where) if isinstance(part, Mapping) else part
        if (kind not in TEXT_PARTS and kind not in THOUGHT_PARTS) or not isinstance(text, str):
            raise DataError(
                f"{who}: got a part of type {kind!r} ({str(part)[:60]}), expected text parts alone "
                f"({', '.join(TEXT_PARTS)}): models here read text"
            )
        (thoughts if kind in THOUGHT_PARTS else texts).append(text)
    return "\n".join(texts)


def _calls(calls: Any, single: Any, who: str) -> list[dict[str, Any]]:
    """Tool calls, each as {type, function: {name, arguments}} beside its other keys; arguments stay text or mapping."""
    calls = [single] if single and not calls else calls or []
    if not isinstance(calls, list):
        raise DataError(f"{who}: got tool_calls {str(calls)[:60]!r}, expected a list")
    return [_call(call, who) for call in calls]


def _call(call: Any, who: str) -> dict[str, Any]:
    call = _json_mapping(call) if isinstance(call, str) else call
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{who}: got tool call {str(call)[:60]!r}, expected a function with a name and arguments")
    arguments = function.get("arguments", function.get("parameters"))
    arguments = {} if arguments is None or arguments == "" else arguments
    if not isinstance(arguments, str | Mapping):
        raise DataError(f"{who}: got arguments {str(arguments)[:60]!r}, expected a mapping or its JSON text")
    inner = {k: v for k, v in function.items() if k not in ("name", "arguments", "parameters")}
    out: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if "function" not in call:
        return out
    out["function"] |= inner
    return {**{k: v for k, v in call.items() if k not in ("type", "function")}, **out}


def _learned(others: dict[str, Any], who: str) -> bool:
    """Whether the row lets the message be learned; takes the keys that say so out of `others`."""
    learned = True
    for key, (no, yes) in _NOT_LEARNED.items():
        value = others.pop(key, yes)
        if value not in (no, yes):
            raise DataError(f"{who}: got {key} {value!r}, expected {no} or {yes}")
        learned = learned and bool(value)
    return learned


def _json_mapping(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
