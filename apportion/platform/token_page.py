"""A page on which a person sees which token got which credit, from a run's `samples.jsonl` alone.

One file without scripts or anything loaded from elsewhere. All text of prompts, models and judges is escaped.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import Any

from apportion.platform.errors import ApportionError
from apportion.platform.tracking import SAMPLES_FILE, read_samples

PAGE_FILE = "tokens.html"
STEPS_SHOWN = 5  # spread evenly over the run, the first and the last among them
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
    samples = read_samples(folder) if has_samples(folder) else []
    if not samples:
        raise ApportionError(
            f"{folder}: got no samples, expected a run's folder with {SAMPLES_FILE}; tracking.samples_per_step says how many "
            "a step keeps"
        )
    shown = spread_steps(sorted({sample["step"] for sample in samples}), STEPS_SHOWN)
    lines = [HEAD.format(title=escape(f"Credit of tokens: {folder.resolve().name}"), up=colour(1.0), down=colour(-1.0))]
    for step in shown:
        lines.append(f"<h2>Step {step}</h2>")
        lines += [_article(sample) for sample in samples if sample["step"] == step]
    page = folder / PAGE_FILE
    # A model may write half of a surrogate pair, which no file can hold.
    page.write_text("\n".join([*lines, "</body></html>", ""]), encoding="utf-8", errors="backslashreplace")
    return page


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
        f'<p class="fact">{escape(" · ".join(facts))}</p>',
        f'<pre class="prompt">{escape(sample["prompt"])}</pre>',
        f"<pre>{_tokens(sample)}</pre>",
    ]
    for critique in sample.get("critiques") or []:
        text = critique["failure"] or critique["answer"]
        if text:
            lines.append(f'<p class="fact">critique: {escape(text)}</p>')
    return "\n".join([*lines, "</article>"])


def _tokens(sample: dict[str, Any]) -> str:
    advantages = sample.get("advantages") or [None] * len(sample["tokens"])
    largest = max((abs(a) for a in advantages if a is not None and math.isfinite(a)), default=0.0)
    return "".join(_token(text, value, largest) for text, value in zip(sample["tokens"], advantages, strict=True))


def _token(text: str, advantage: float | None, largest: float) -> str:
    shown = escape(text).replace("\n", '<span class="mark">↵</span>\n')
    if advantage is None or not math.isfinite(advantage) or advantage == 0 or largest == 0:
        return f"<span>{shown}</span>"
    return f'<span style="background:{colour(advantage / largest)}" title="{advantage:+.4g}">{shown}</span>'


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
