"""Mathematical answers that are more than one number, read and compared by math-verify.

math-verify reads whatever it can of a text, and what it can not it leaves out: `3 apples and 4 pears` becomes a product
of letters, `0.\\overline{3}` becomes 0. So a delimited answer (an answer column, the content of a \\boxed{}) is refused
here first where it is not one expression; a plain number is read by `answers.number_of` and never by math-verify.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from apportion.data.answers import after_mark, answer_text, first_number, last_box, number_of
from apportion.data.errors import DataError
from apportion.data.notation import latex_powers, repeating_decimals

_NO_ANSWER = frozenset({"nan", "none", "null", "inf", "infinity", "undefined", "n/a"})
# A date, a range or a difference: math-verify divides and subtracts them.
_AMBIGUOUS = re.compile(r"\d+-\d+-\d+|\d+(?:/\d+){2,}|\d(?:[\d.,]*\d)?\s*[-\u2013]\s*\d[\d.,]*")
_UNREADABLE = re.compile(
    r"(?<!\d)(?:[01]?\d|2[0-4]):[0-5]\d(?!\d)|\d:\d+:\d|(?<![_\d])\d+\s+\d"
)  # a time, three shares, 1 080
_BASE = re.compile(r"\d_\s*\{?\s*(\d+)")
_OUTER = re.compile(r"\$\$(.*)\$\$|\$([^$]*)\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+"
)
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[a-z]+\*?\}(?:\{[clr|]+\})?")
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|max|min|gcd|lcm|det"
_BARE_FUNCTION = re.compile(rf"(?<![\\A-Za-z])({_FUNCTIONS}|pi)(?![A-Za-z])")
_BARE_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*(?:\(([^()]*)\)|\{([^{}]*)\})|√\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))")
_PHRASE = re.compile(r"\(?([^\W\d_]+(?:[\s'’-]+[^\W\d_]+)*)\)?\.?")
_WORDS = re.compile(r"[A-Za-z]{3,}|\b(?:or|to|of|is|no|an|if|at|by)\b")
_ANNOUNCED = re.compile(  # "The answer is (B)."; what is one phrase or letter alone
    r".*\banswer(?:\s+is|\s*:)[\s:*]*(\(?[^\W\d_]+(?:[\s'’-]+[^\W\d_]+)*\)?)[\s.*]*\Z", re.IGNORECASE | re.DOTALL
)
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_SIGNS = re.compile(r"\\?%|\\\$|[€£¥₹₩]")


def read_expression(text: str) -> list[Any] | None:
    """math-verify's reading of a text that is one mathematical answer as a whole, or None where it is not one.

    A percent or currency sign is left out, as a unit is; a phrase (`Monday`, `even`) is a name.
    """
    body = _without_delimiters(text)
    number = number_of(body)
    if number is not None:
        import sympy

        return [sympy.Rational(number.numerator, number.denominator)]
    if not body or _AMBIGUOUS.fullmatch(body) or _UNREADABLE.search(body):
        return None
    if "$" in body.replace("\\$", ""):  # prose that says itself where its mathematics is
        return _parsed(text) or None
    phrase = _PHRASE.fullmatch(body)
    if phrase and (len(phrase[1]) > 2 or phrase[1].casefold() == "no") and not _BARE_FUNCTION.fullmatch(body):
        return _parsed(f"$\\text{{{phrase[1].casefold()}}}$") or None
    body = _BARE_ROOT.sub(lambda found: f"\\sqrt{{{next(g for g in found.groups() if g)}}}", body)
    body = _BARE_FUNCTION.sub(r"\\\1 ", _SIGNS.sub("", body)).replace("**", "^").replace("∞", r"\infty ")
    if _WORDS.search(_COMMAND.sub(" ", _ENVIRONMENT.sub(" ", body))):
        return None
    return _parsed_signs(repeating_decimals(body)) or None


def read_answer(answer: Any) -> list[Any]:
    """What an answer column says. DataError where that is no mathematical expression."""
    # str() would make expressions of them: None is the product of N, o, n and e.
    missing = answer is None or isinstance(answer, bool)
    marked = None if missing else after_mark(str(answer))
    written = "" if missing else (str(answer) if marked is None else marked).strip()
    boxed, content = last_box(written)
    expression = read_expression((content or "") if boxed else written)
    if expression is None or written.casefold() in _NO_ANSWER:
        raise DataError(f"answer: got {answer!r}, expected a mathematical expression")
    return expression


def equal_expressions(text: str, answer: Any, opening: str = "") -> bool:
    """Whether the completion `text` ends in the answer: in its last \\boxed{}, else after its last ####, else anywhere."""
    from math_verify import verify

    gold = read_answer(answer)
    said = answer_text(text, opening)
    if said is None:
        return False
    bases = [_BASE.findall(written) for written in (str(answer), said)]
    if all(bases) and bases[0][-1] != bases[1][-1]:  # math-verify leaves the base of 12_{5} out
        return False
    given = _read_completion(said, phrase=_is_phrase(gold))
    return bool(given) and bool(verify(gold, given, timeout_seconds=None, raise_on_error=True))


def _read_completion(said: str, phrase: bool) -> list[Any] | None:
    boxed, content = last_box(said)
    if boxed:
        return None if content is None else read_expression(content)
    marked = after_mark(said)
    if marked is not None:
        import sympy

        number = first_number(marked)
        if number is not None:
            return [sympy.Rational(number.numerator, number.denominator)]
    whole = latex_powers(said if marked is None else marked)
    if phrase and (announced := _ANNOUNCED.search(whole)):
        return read_expression(announced[1])
    if number_of(whole) is not None or _PHRASE.fullmatch(whole.strip()):
        return read_expression(whole)
    return _parsed(repeating_decimals(whole.replace("\\%", "").replace("%", "").replace("\\$", "")))


def _without_delimiters(text: str) -> str:
    body = latex_powers(text).strip()
    outer = _OUTER.fullmatch(body)
    if outer:
        body = next(group for group in outer.groups() if group is not None).strip()
    return body


def _is_phrase(expressions: list[Any]) -> bool:
    return all(getattr(found, "is_Symbol", False) for found in expressions)


def _parsed_signs(body: str) -> list[Any]:
    """One expression; one with a plus-minus sign where math-verify knows none, as in a fraction, is its two values."""
    found = _parsed(f"${body}$")
    if found or not _PLUS_MINUS.search(body):
        return found
    both = [_parsed(f"${_with_signs(body, plus, minus)}$") for plus, minus in ("+-", "-+")]
    if not all(both):
        return []
    import sympy

    return [sympy.FiniteSet(*(values[0] for values in both))]


def _with_signs(body: str, plus: str, minus: str) -> str:
    return _PLUS_MINUS.sub(lambda sign: plus if sign[1] == "pm" else minus, body)


def _parsed(text: str) -> list[Any]:
    """Expressions alone: what math-verify could not read it also gives back as text."""
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once that its own time limit is off
    return [found for found in parse(text, parsing_timeout=None) if not isinstance(found, str)]
