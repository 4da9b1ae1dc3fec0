"""Ready-made reward functions for answers that can be checked, with the signature f(prompts, completions, **columns).

A completion is text, or a list of messages whose last one is the answer. An answer that is wrong is 0.0; an `answer`
column that cannot be understood raises, so that the sample counts as failed rather than as wrong.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from apportion.data.errors import DataError

Completions = Sequence[Any]  # str, or messages [{"role": "assistant", "content": str}]

# A minus right after a digit, letter or closing bracket subtracts: the last number of "12-7" is 7.
NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-\u2212])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,4}(?![0-9]))?"
    r"|(?:(?<![\w)\]}])[-\u2212])?(?<![\w.])\.[0-9]+"
)
THINK_THEN_ANSWER = r"^\s*<think>.*?</think>\s*<answer>.*?</answer>\s*$"


def completion_text(completion: Any) -> str:
    """The text of a completion.

    >>> completion_text("42"), completion_text([{"role": "assistant", "content": "42"}])
    ('42', '42')
    """
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def last_number(text: str) -> Decimal | None:
    """The last number in a text, or None; thousands may be parted by commas.

    >>> last_number("so 1,250 - 3 is $1,247."), last_number("12-7"), last_number("x = -3.50"), last_number("none")
    (Decimal('1247'), Decimal('7'), Decimal('-3.50'), None)
    """
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("\u2212", "-")) if found else None


def exact_match(
    prompts: Sequence[Any], completions: Completions, answer: Sequence[Any], ignore_case: bool = False, **columns: Any
) -> list[float | None]:
    """1.0 where the completion is the answer, but for white space around and between words."""

    def same(text: str, wanted: Any) -> bool:
        if wanted is None or not str(wanted).strip():
            raise DataError(f"answer: got {wanted!r}, expected text")
        got, want = " ".join(text.split()), " ".join(str(wanted).split())
        return got.casefold() == want.casefold() if ignore_case else got == want

    return [float(same(completion_text(c), a)) for c, a in zip(completions, answer, strict=True)]


def numeric_match(
    prompts: Sequence[Any], completions: Completions, answer: Sequence[Any], tolerance: float = 0.0, **columns: Any
) -> list[float | None]:
    """1.0 where the last number of the completion is within `tolerance` of the answer."""
    return [
        _numbers_match(last_number(completion_text(c)), _as_number(a), tolerance)
        for c, a in zip(completions, answer, strict=True)
    ]


def gsm8k(
    prompts: Sequence[Any], completions: Completions, answer: Sequence[Any], tolerance: float = 0.0, **columns: Any
) -> list[float | None]:
    """As `numeric_match`, for answers that end in `#### 42`; a completion may mark its own answer that way."""

    def after_mark(text: str) -> str:
        return text.rpartition("####")[2]

    return [
        _numbers_match(last_number(after_mark(completion_text(c))), _as_number(after_mark(str(a))), tolerance)
        for c, a in zip(completions, answer, strict=True)
    ]


def regex_match(
    prompts: Sequence[Any], completions: Completions, pattern: str, full: bool = False, **columns: Any
) -> list[float | None]:
    """1.0 where `pattern` is found in the completion (`full`: describes all of it); `.` matches a line's end too."""
    compiled = re.compile(pattern, re.DOTALL)
    search = compiled.fullmatch if full else compiled.search
    return [float(search(completion_text(c)) is not None) for c in completions]


def format_match(
    prompts: Sequence[Any], completions: Completions, pattern: str = THINK_THEN_ANSWER, **columns: Any
) -> list[float | None]:
    """1.0 where the completion has the form <think>...</think><answer>...</answer>, or that of `pattern`."""
    return regex_match(prompts, completions, pattern)


def math_verify(
    prompts: Sequence[Any], completions: Completions, answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1.0 where the completion's last mathematical answer equals the `answer` column, by math-verify.

    math-verify limits its own time with signals, which Python only sees between two of its own instructions; here they
    are off, and the caller kills the process that this runs in.
    """
    return [_math_verify(completion_text(c), a) for c, a in zip(completions, answer, strict=True)]


def gym(
    prompts: Sequence[Any],
    completions: Completions,
    task: Sequence[str],
    entry: Sequence[dict[str, Any]],
    task_parameters: Sequence[dict[str, Any]],
    tag: str = "answer",
    **columns: Any,
) -> list[float | None]:
    """The reasoning-gym task's own score (0 to 1) of what stands between <answer> tags, or of the whole completion."""
    scores: list[float | None] = []
    for completion, name, item, parameters in zip(completions, task, entry, task_parameters, strict=True):
        text = completion_text(completion)
        tagged = re.findall(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", text, re.DOTALL)
        given = (tagged[-1] if tagged else text).strip()
        scores.append(float(_gym_task(name, parameters).score_answer(given, item)))
    return scores


_GYM_TASKS: dict[tuple[str, str], Any] = {}  # by name and parameters; making one costs more than scoring an answer


def _gym_task(name: str, parameters: dict[str, Any]) -> Any:
    import reasoning_gym

    key = (name, repr(sorted(parameters.items())))
    if key not in _GYM_TASKS:
        _GYM_TASKS[key] = reasoning_gym.create_dataset(name, **parameters)
    return _GYM_TASKS[key]


def _as_number(answer: Any) -> Decimal:
    number = None if answer is None or isinstance(answer, bool) else last_number(str(answer))
    if number is None:
        raise DataError(f"answer: got {answer!r}, expected a number")
    return number


def _numbers_match(got: Decimal | None, want: Decimal, tolerance: float) -> float:
    if got is None:
        return 0.0
    if got == want:
        return 1.0
    return float(tolerance > 0 and math.isclose(float(got), float(want), rel_tol=0.0, abs_tol=tolerance))


def _math_verify(text: str, answer: Any) -> float:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once that its own time limit is off
    # str() would make expressions of them: None is the product of N, o, n and e.
    missing = answer is None or isinstance(answer, bool) or (isinstance(answer, float) and not math.isfinite(answer))
    written = "" if missing else str(answer).rpartition("####")[2].strip()
    forms = [written] if "$" in written or "boxed" in written else [f"${written}$", written]
    for form in forms if written else []:
        gold = parse(form, parsing_timeout=None)
        if gold:
            break
    else:
        raise DataError(f"answer: got {answer!r}, expected a mathematical expression")
    return float(verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None, raise_on_error=True))


VERIFIERS: dict[str, Callable[..., list[float | None]]] = {
    "exact_match": exact_match,
    "numeric_match": numeric_match,
    "gsm8k": gsm8k,
    "regex_match": regex_match,
    "format": format_match,
    "math_verify": math_verify,
    "gym": gym,
}

# Verifiers that one odd completion can keep busy without end, and that therefore run in a process that can be killed. Each
# with arguments that load its library, None where there is none to load.
IN_A_PROCESS: dict[str, dict[str, Any] | None] = {
    "regex_match": None,
    "format": None,
    "math_verify": {"prompts": [""], "completions": ["$1$"], "answer": ["1"]},
    "gym": {
        "prompts": [""],
        "completions": ["1"],
        "task": ["gcd"],
        "entry": [{"answer": "1"}],
        "task_parameters": [{}],
    },
}
