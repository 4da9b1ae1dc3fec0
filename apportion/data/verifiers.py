"""Ready-made reward functions for answers that can be checked, with the signature f(prompts, completions, **columns).

A completion is text, or a list of messages whose last one is the answer. An answer that is wrong is 0.0; an `answer`
column that cannot be understood raises, so that the sample counts as failed rather than as wrong.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from apportion.data.answers import after_mark, answer_text, first_number, last_box, last_number, number_of
from apportion.data.errors import DataError, nearest
from apportion.data.reasoning import CLOSING, OPENING

Completions = Sequence[Any]  # str, or messages [{"role": "assistant", "content": str}]

THINK_THEN_ANSWER = r"^\s*<think>.*?</think>\s*<answer>.*?</answer>\s*$"
_OPENED = re.compile(rf"(?:\s*(?:</?[A-Za-z][\w:-]*>|{OPENING}|{CLOSING}))+\s*\Z")
_TAG = re.compile(r"[<◁\[]")
OPENING_CHARACTERS = 200


def completion_text(completion: Any) -> str:
    """The text of a completion.

    >>> completion_text("42"), completion_text([{"role": "assistant", "content": "42"}])
    ('42', '42')
    """
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def opening_of(prompt: Any) -> str:
    """The tags that end a prompt's text: what a chat template wrote of the response itself. Messages have none.

    >>> opening_of("<|im_start|>assistant\\n<think>\\n"), opening_of("Is 2 < 3?"), opening_of([{"role": "user"}])
    ('\\n<think>\\n', '', '')
    """
    found = _OPENED.search(prompt[-OPENING_CHARACTERS:]) if isinstance(prompt, str) else None
    return found[0] if found else ""


def exact_match(
    prompts: Sequence[Any], completions: Completions, answer: Sequence[Any], ignore_case: bool = False, **columns: Any
) -> list[float | None]:
    """1.0 where the completion is the answer, but for white space around and between words."""

    def same(text: str, wanted: str) -> bool:
        got, want = " ".join(text.split()), " ".join(wanted.split())
        return got.casefold() == want.casefold() if ignore_case else got == want

    return [float(same(completion_text(c), _as_text(a))) for c, a in zip(completions, answer, strict=True)]


def numeric_match(
    prompts: Sequence[Any], completions: Completions, answer: Sequence[Any], tolerance: float = 0.0, **columns: Any
) -> list[float | None]:
    """1.0 where the last number of the completion (of its last \\boxed{}) is within `tolerance` of the answer."""
    return [
        _within(_as_number(a), _number_said(completion_text(c), opening_of(p)), tolerance)
        for p, c, a in zip(prompts, completions, answer, strict=True)
    ]


def gsm8k(
    prompts: Sequence[Any], completions: Completions, answer: Sequence[Any], tolerance: float = 0.0, **columns: Any
) -> list[float | None]:
    """As `numeric_match`, for answers that end in `#### 42`. A completion may mark its own answer that way: then the
    number right after the last mark is the one that counts."""
    return [
        _within(_as_number(_after_mark(a)), _number_marked(completion_text(c), opening_of(p)), tolerance)
        for p, c, a in zip(prompts, completions, answer, strict=True)
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
    compiled = re.compile(pattern, re.DOTALL)

    def has_form(prompt: Any, text: str) -> bool:
        # What the template wrote may be all of these tags or the last ones; a model may write them once more.
        opening = opening_of(prompt)
        openings = ["", *(opening[tag.start() :] for tag in _TAG.finditer(opening))]
        return any(compiled.search(start + text) for start in openings)

    return [float(has_form(p, completion_text(c))) for p, c in zip(prompts, completions, strict=True)]


def math_verify(
    prompts: Sequence[Any], completions: Completions, answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1.0 where the completion's last mathematical answer equals the `answer` column, by math-verify.

    math-verify limits its own time with signals, which Python only sees between two of its own instructions; here they
    are off, and the caller kills the process that this runs in.
    """
    from apportion.data.expressions import equal_expressions

    return [
        float(equal_expressions(completion_text(c), a, opening_of(p)))
        for p, c, a in zip(prompts, completions, answer, strict=True)
    ]


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


def _as_text(answer: Any) -> str:
    if answer is None or not str(answer).strip():
        raise DataError(f"answer: got {answer!r}, expected text")
    return str(answer)


def _as_number(answer: Any) -> Fraction:
    number = None if answer is None or isinstance(answer, bool) else number_of(str(answer))
    if number is None:
        raise DataError(
            f"answer: got {_shown(answer)}, expected a number alone, as 1,080, $18.90, 50%, 3/4 or 7 apples"
        )
    return number


def _after_mark(answer: Any) -> Any:
    marked = after_mark(answer) if isinstance(answer, str) else None
    return answer if marked is None else marked


def _shown(answer: Any) -> str:
    text = repr(answer)
    return text if len(text) <= 80 else f"{text[:40]}...{text[-30:]}"


def _number_said(text: str, opening: str) -> Fraction | None:
    """The number that a completion gives as its answer."""
    said = answer_text(text, opening)
    if said is None:
        return None
    boxed, content = last_box(said)
    if boxed:
        return None if content is None else number_of(content)
    return last_number(said)


def _number_marked(text: str, opening: str) -> Fraction | None:
    said = answer_text(text, opening)
    if said is None:
        return None
    marked = after_mark(said)
    return _number_said(said, "") if marked is None else first_number(marked)


def _within(want: Fraction, got: Fraction | None, tolerance: float) -> float:
    return float(got is not None and abs(got - want) <= Fraction(str(tolerance)))


def check_settings(verifier: str, params: Mapping[str, Any]) -> None:
    """DataError where `params` cannot be the settings of `verifier`: a column's name among them, or a wrong kind."""
    for key in params:
        if key in COLUMNS[verifier]:
            path = params[key] if isinstance(params[key], str) and params[key] else "NAME"
            raise DataError(
                f"got params {key!r}, which every row has its own of and params are the same for all; "
                f"name the data's column, or a path inside one, with columns: {{{key}: {path}}}"
            )
    taken = inspect.signature(VERIFIERS[verifier]).parameters
    settings = [name for name in taken if name in _SETTINGS]
    for key in params:
        if key not in settings:
            expected = " or ".join(settings) or "none"
            raise DataError(f"got params {key!r}, expected {expected}{nearest(key, settings)}")
    for key, (fits, expected) in _SETTINGS.items():
        if key in params and not fits(params[key]):
            raise DataError(f"got {key} {params[key]!r}, expected {expected}")
    if verifier == "regex_match" and "pattern" not in params:
        raise DataError("got no pattern, expected params: {pattern: REGULAR_EXPRESSION}")
    if "pattern" in params:
        try:
            re.compile(params["pattern"], re.DOTALL)
        except (re.error, RecursionError, OverflowError) as error:
            raise DataError(f"got pattern {params['pattern']!r}, not a regular expression ({error})") from None


_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tolerance": (
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < float("inf"),
        "a number of at least 0",
    ),
    "ignore_case": (lambda v: isinstance(v, bool), "true or false"),
    "full": (lambda v: isinstance(v, bool), "true or false"),
    "pattern": (lambda v: isinstance(v, str) and bool(v), "a regular expression"),
    "tag": (lambda v: isinstance(v, str) and bool(v), "a tag's name, as answer"),
}


def check_answer(verifier: str, columns: Mapping[str, Any]) -> None:
    """DataError where `verifier` cannot read one row's columns. For `math_verify`, which imports and runs its library,
    see `IN_A_PROCESS`."""
    if verifier == "exact_match":
        _as_text(columns.get("answer"))
    elif verifier == "numeric_match":
        _as_number(columns.get("answer"))
    elif verifier == "gsm8k":
        _as_number(_after_mark(columns.get("answer")))
    elif verifier == "math_verify":
        from apportion.data.expressions import read_answer

        read_answer(columns.get("answer"))
    elif verifier == "gym":
        _check_gym(columns)


def _check_gym(columns: Mapping[str, Any]) -> None:
    for name, kind, expected in (
        ("task", str, "a task's name"),
        ("entry", Mapping, "the task's own item"),
        ("task_parameters", Mapping, "the task's parameters"),
    ):
        if not isinstance(columns.get(name), kind):
            raise DataError(f"{name}: got {_shown(columns.get(name))}, expected {expected}, as a gym: source has it")


VERIFIERS: dict[str, Callable[..., list[float | None]]] = {
    "exact_match": exact_match,
    "numeric_match": numeric_match,
    "gsm8k": gsm8k,
    "regex_match": regex_match,
    "format": format_match,
    "math_verify": math_verify,
    "gym": gym,
}

# What each verifier reads of the data; every other parameter is a setting, the same for all samples.
COLUMNS: dict[str, tuple[str, ...]] = {
    "exact_match": ("answer",),
    "numeric_match": ("answer",),
    "gsm8k": ("answer",),
    "regex_match": (),
    "format": (),
    "math_verify": ("answer",),
    "gym": ("task", "entry", "task_parameters"),
}

# Verifiers that one odd completion can keep busy without end, and that therefore run in a process that can be killed. Each
# with arguments that load its library, None where there is none to load.
IN_A_PROCESS: dict[str, dict[str, Any] | None] = {
    "regex_match": None,
    "format": None,
    "math_verify": {"prompts": [""], "completions": ["$x$"], "answer": ["x"]},
    "gym": {
        "prompts": [""],
        "completions": ["1"],
        "task": ["gcd"],
        "entry": [{"answer": "1"}],
        "task_parameters": [{}],
    },
}
