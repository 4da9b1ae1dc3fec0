"""Kinds of failures: who failed, and with which exception or in which words, whatever the values were."""

from __future__ import annotations

import re
from collections.abc import Iterable

MOST_KINDS = 20  # of one report, and of a run
_VALUES = re.compile(r"'[^']*'|\"[^\"]*\"|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|\b(?:nan|inf)\b")
_RAISED = re.compile(r"\n[ \t]+\S[^\n]*\n(\w[\w.]*)(?=:|\n|$)")  # below the last line of a traceback


def kind_of(text: str) -> str:
    """The kind of a failure whose message is `text`: one line, or a name and a traceback.

    >>> kind_of('f:\\nTraceback (most recent call last):\\n  File "x", line 3\\n    1 / 0\\nZeroDivisionError: by 0')
    'f: ZeroDivisionError'
    >>> kind_of("f: got 3 rewards for 'ab'") == kind_of("f: got 17 rewards for 'c'")
    True
    """
    first, _, rest = text.partition("\n")
    raised = _RAISED.findall("\n" + rest)
    if raised:
        return f"{first.partition(':')[0]}: {raised[-1]}"
    return _VALUES.sub("_", first)[:120]


def first_of_each_kind(texts: Iterable[str]) -> dict[str, str]:
    """Kind -> the first text of it, of at most `MOST_KINDS` kinds."""
    kinds: dict[str, str] = {}
    for text in texts:
        kind = kind_of(text)
        if kind not in kinds and len(kinds) < MOST_KINDS:
            kinds[kind] = text
    return kinds
