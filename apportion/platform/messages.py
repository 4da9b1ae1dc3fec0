"""Print text for people on the terminal: the exit for all that we print. It may quote a model, a data row, or a configuration
that somebody else wrote, so it is shown as text: no escape sequence steers the terminal, no value fills it, no secret is in it.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from typing import IO

from apportion.platform.known_secrets import known, redacted_text
from apportion.platform.streams import mask_output

LONGEST_WORD = 400  # characters without white space, as a path may have
LONGEST_LINE = 4000
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")


def mask_secrets(words: list[str]) -> list[str]:
    """Let no secret of the environment, or of a command's words, out of this process through what it prints. Gives the words."""
    for word in words:
        known.learn_text(word)
    mask_output()
    return words


def say(text: str, stream: IO[str] | None = None) -> None:
    """Print a text for people (default: on stdout)."""
    print(redacted_text(terminal_text(text)), file=stream, flush=True)


def warn(text: str) -> None:
    say(f"warning: {text}", sys.stderr)


def plain_text(text: str) -> str:
    """Without escape sequences, control and direction characters; runs of white space become one space."""
    return harmless(re.sub(r"\s+", " ", _ESCAPES.sub("", text))).strip()


def terminal_text(text: str) -> str:
    """As `plain_text`, with its lines and tabs as they are: what a person reads may quote a model or a row.

    >>> terminal_text("policy-0: died\\n\\tsaid \\x1b]0;mine\\x07hello")
    'policy-0: died\\n\\tsaid hello'
    """
    return harmless(_ESCAPES.sub("", text), "\n\t")


def harmless(text: str, kept: str = "") -> str:
    return "".join(c for c in text if c in kept or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"))


def brief(line: str) -> str:
    """A message in which long values are shortened in their middle: a person reads what is wrong and what to do.

    >>> brief("rollout.engine: got " + "y" * 5000 + ", expected vllm")[:60]
    'rollout.engine: got yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy'
    >>> len(brief("rollout.engine: got " + "y" * 5000 + ", expected vllm"))
    178
    """
    line = re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: shortened(word[0], 120), line)
    return shortened(line, LONGEST_LINE)


def shortened(text: str, limit: int) -> str:
    """The text; of a longer one than `limit` its beginning, its length and its end."""
    if len(text) <= limit:
        return text
    text = redacted_text(text)  # first: half a secret is no known one
    if len(text) <= limit:
        return text
    return f"{text[: limit * 2 // 3]}...({len(text):,} characters)...{text[-(limit // 3) :]}"


def quoted(value: object) -> str:
    """A value as an error quotes it.

    >>> quoted("fast"), quoted(1.5), len(quoted("x" * 5000))
    ("'fast'", '1.5', 144)
    """
    return shortened(repr(value), 120)
