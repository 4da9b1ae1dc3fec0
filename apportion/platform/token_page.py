"""A page on which a person sees which token got which credit, from a run's `samples.jsonl` alone.

One file without scripts or anything loaded from elsewhere. All text of prompts, models and judges is escaped, and what
it has too much of is left out with a line that says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any
from unicodedata import category

from apportion.platform.errors import ApportionError
from apportion.platform.files import write_text_atomically
from apportion.platform.foreign import refuse_link
from apportion.platform.messages import quoted
from apportion.platform.run_state import is_count, is_number
from apportion.platform.tracking import SAMPLES_FILE, read_samples

PAGE_FILE = "tokens.html"
STEPS_SHOWN = 5  # spread evenly over the run, the first and the last among them
TOKENS_SHOWN = 20_000  # of one sample
LONGEST_TEXT = 100_000  # characters of a prompt, a critique, or all tokens of a sample
LARGEST_PAGE = 20_000_000  # characters; a browser still scrolls through it
_HIDDEN = ("Cc", "Cf", "Cs", "Co")  # Unicode's control, format, surrogate and private characters
_KEPT = "\n\t\u200c\u200d"  # the joiners are part of words and emoji
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.7 ui-monospace, monospace; margin: .3rem 0 }}
pre.prompt {{ color: #666 }} .mark {{ color: #999 }} .fact {{ color: #666; font-size: 13px }}
article {{ border-top: 1px solid #ddd; padding: .6rem 0 }}
</style></head><body>
<h1>{title}</h1>
<p>Each token of a response on its advantage: <span style="background:{up}">for</span> and <span style="background:{down}">against</span>,
as strong as the largest of its sample; point at one for the number. Tokens without colour got none.</p>
"""


def write_token_page(run_folder: str | Path) -> Path:
    """Write `tokens.html` into a run's folder. ApportionError where the run kept no samples."""
    folder = Path(run_folder)
    refuse_link(folder / SAMPLES_FILE)
    samples = read_samples(folder) if has_samples(folder) else []
    for number, sample in enumerate(samples, start=1):
        _check(sample, f"{folder / SAMPLES_FILE}:{number}")
    if not samples:
        raise ApportionError(
            f"{folder}: got no samples, expected a run's folder with {SAMPLES_FILE}; tracking.samples_per_step says how many "
            "a step keeps"
        )
    shown = spread_steps(sorted({sample["step"] for sample in samples}), STEPS_SHOWN)
    lines = [HEAD.format(title=_text(f"Credit of tokens: {folder.resolve().name}"), up=colour(1.0), down=colour(-1.0))]
    lines += _articles([sample for step in shown for sample in samples if sample["step"] == step])
    page = folder / PAGE_FILE
    write_text_atomically(page, "\n".join([*lines, "</body></html>", ""]))  # a link there is replaced, not followed
    return page


def _articles(samples: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    size, step = 0, None
    for index, sample in enumerate(samples):
        if size > LARGEST_PAGE:
            left = f"{len(samples) - index:,} more samples are not shown: {SAMPLES_FILE} has them"
            return [*lines, f'<p class="fact">{left}</p>']
        if sample["step"] != step:
            step = sample["step"]
            lines.append(f"<h2>Step {step}</h2>")
        lines.append(_article(sample))
        size += len(lines[-1])
    return lines


def _check(sample: dict[str, Any], where: str) -> None:
    """ApportionError for a sample that no run of this version writes."""
    for name, (fits, expected) in _VALUES.items():
        if not fits(sample.get(name)):
            raise ApportionError(f"{where}: {name}: got {quoted(sample.get(name))}, expected {expected}")
    advantages = sample.get("advantages")
    if advantages and len(advantages) != len(sample["tokens"]):
        raise ApportionError(
            f"{where}: advantages: got {len(advantages):,}, expected one for each of {len(sample['tokens']):,} tokens"
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    """Whether it is a number or null. NaN and infinity count: a run may write them."""
    return value is None or isinstance(value, float) or is_number(value)


def _is_critique(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(value.get(name)) for name in ("failure", "answer"))


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {  # whether a value fits, and what is expected
    "prompt": (_is_text, "text"),
    "tokens": (_list_of(_is_text), "a list of texts"),
    "advantages": (lambda value: value is None or _list_of(_is_number)(value), "null or a list of numbers"),
    "reward": (_is_number, "a number or null"),
    "finish_reason": (_is_text, "text"),
    "policy_version": (is_count, "a whole number from 0"),
    "critiques": (lambda value: value is None or _list_of(_is_critique)(value), "critiques with failure and answer"),
}


def has_samples(folder: Path) -> bool:
    file = folder / SAMPLES_FILE
    return file.is_file() and file.stat().st_size > 0


def spread_steps(steps: list[int], count: int) -> list[int]:
    """At most `count` of them, evenly from the first to the last.

    >>> spread_steps([1, 2, 3, 4, 5, 6, 7], 3)
    [1, 4, 7]
    """
    if len(steps) <= count:
        return steps
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def colour(strength: float) -> str:
    """Green for, red against; `strength` from -1 to 1.

    >>> colour(-0.5)
    'rgba(214, 39, 40, 0.35)'
    """
    red, green, blue = (44, 160, 44) if strength > 0 else (214, 39, 40)
    return f"rgba({red}, {green}, {blue}, {0.7 * abs(strength):.2f})"


def _article(sample: dict[str, Any]) -> str:
    facts = [
        f"reward {_number(sample['reward'])}",
        f"{len(sample['tokens'])} tokens",
        f"ended by {sample['finish_reason']}",
    ]
    facts.append(f"weights {sample['policy_version']}")
    if "wrong_steps" in sample:
        facts.append(f"wrong steps {sample['wrong_steps']}")
    lines = [
        "<article>",
        f'<p class="fact">{_text(" · ".join(facts))}</p>',
        f'<pre class="prompt">{_text(sample["prompt"])}</pre>',
        f"<pre>{_tokens(sample)}</pre>",
    ]
    for critique in sample.get("critiques") or []:
        text = critique["failure"] or critique["answer"]
        if text:
            lines.append(f'<p class="fact">critique: {_text(text)}</p>')
    return "\n".join([*lines, "</article>"])


def _tokens(sample: dict[str, Any]) -> str:
    advantages = sample.get("advantages") or [None] * len(sample["tokens"])
    largest = max((abs(a) for a in advantages if a is not None and math.isfinite(a)), default=0.0)
    shown: list[str] = []
    length = 0
    for text, value in zip(sample["tokens"], advantages, strict=True):
        length += len(text)
        if len(shown) == TOKENS_SHOWN or length > LONGEST_TEXT:
            left = len(sample["tokens"]) - len(shown)
            return "".join(shown) + f'<span class="mark">... {left:,} more tokens are not shown</span>'
        shown.append(_token(text, value, largest))
    return "".join(shown)


def _token(text: str, advantage: float | None, largest: float) -> str:
    shown = _text(text).replace("\n", '<span class="mark">↵</span>\n')
    if advantage is None or not math.isfinite(advantage) or advantage == 0 or largest == 0:
        return f"<span>{shown}</span>"
    return f'<span style="background:{colour(advantage / largest)}" title="{advantage:+.4g}">{shown}</span>'


def _text(text: str) -> str:
    """A text as HTML. What is invisible, changes the direction of other text, or is half a character, is shown by its code.

    >>> _text("<a>\\x1b[2J\\u202eb")
    '&lt;a&gt;\\\\x1b[2J\\\\u202eb'
    """
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]}... ({len(text) - LONGEST_TEXT:,} more characters are not shown)"
    return escape("".join(c if c in _KEPT or category(c) not in _HIDDEN else _code(c) for c in text))


def _code(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
