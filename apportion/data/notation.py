"""One spelling for the many ways in which numbers are written: LaTeX, markdown, other scripts, other dashes and spaces."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

CURRENCY = r"(?:US\$|[$€£¥₹₩]|\b(?:USD|EUR|GBP|INR|CAD|AUD|CHF|JPY|CNY|Rs\.?)(?![A-Za-z]))"
GLUED_UNITS = frozenset(
    [
        "mm",
        "cm",
        "dm",
        "km",
        "nm",
        "µm",
        "inch",
        "inches",
        "ft",
        "yd",
        "mi",
        "mph",
        "kph",
        "kmh",
        "mg",
        "kg",
        "lb",
        "lbs",
        "oz",
        "ml",
        "mL",
        "cl",
        "dl",
        "kWh",
        "Wh",
        "kW",
        "MW",
        "GB",
        "MB",
        "KB",
        "Hz",
        "kHz",
        "MHz",
        "ms",
        "min",
        "mins",
        "sec",
        "secs",
        "hr",
        "hrs",
        "yr",
        "yrs",
        "wk",
        "wks",
        "pts",
        "pcs",
        "h",
        "s",
        "m",
        "g",
        "L",
        "l",
        "am",
        "pm",
        "st",
        "nd",
        "rd",
        "th",
        "cents",
        "dollars",
        "USD",
        "EUR",
        "GBP",
        "percent",
        "pct",
        "thousand",
        "million",
        "billion",
        "trillion",
    ]
)
ONE_LETTER_UNITS = frozenset("mghsLlCFKNJWVAa")  # after a space; "a" as in "60 miles a day"
# Words that change what a number before them is worth, or make it one of several.
NOT_A_UNIT = frozenset(
    [
        "or",
        "plus",
        "minus",
        "times",
        "over",
        "than",
        "root",
        "roots",
        "pi",
        "mod",
        "remainder",
        "factorial",
        "dozen",
        "dozens",
        "score",
        "hundred",
        "hundreds",
        "point",
        "half",
        "halves",
        "third",
        "thirds",
        "quarter",
        "quarters",
        "fourth",
        "fourths",
        "fifth",
        "fifths",
        "sixth",
        "sixths",
        "seventh",
        "sevenths",
        "eighth",
        "eighths",
        "ninth",
        "ninths",
        "tenth",
        "tenths",
        "hundredth",
        "hundredths",
        "thousandth",
        "thousandths",
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
        "twenty",
        "thirty",
        "forty",
        "fifty",
        "sixty",
        "seventy",
        "eighty",
        "ninety",
        "infinity",
        "infinite",
        "nan",
        "squared",
        "cubed",
        "bn",
        "mn",
        "tn",
        "mil",
    ]
)
_WRAPPERS = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|emph|mathrm|mathbf|mathit|mathsf|mathtt|boldsymbol|bm|mbox|hbox|"
    r"operatorname|underline|boxed|fbox)\s*\{([^{}]*)\}"
)
_WRAPPED_DEPTH = 4
_PART = r"\{\s*(-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)\s*\}"
_FRAC = re.compile(rf"(\d?)\s*\\[dtc]?frac\s*(?:{_PART}|(\d))\s*(?:{_PART}|(\d))")
_REPEATING = re.compile(r"(?<![\d.,])(\d{0,30})\.(\d{0,30})\\overline\s*\{\s*(\d{1,30})\s*\}(?!\d)")
_UNIT_POWER = re.compile(
    r"(?<![A-Za-z])((?:mm|cm|dm|km|m|in|inch|inches|ft|feet|yd|yards?|mi|miles?|meters?|metres?|units?|sec|s|hr|h)\.?)\s*"
    r"\^\s*(?:\{\s*-?[123]\s*\}|-?[123])(?!\d)"
)
_SPACES = re.compile(r"\s{2,}")  # made one first: what follows may then look for a space in constant time
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013\u2012\u2010\u2011\ufe63\uff0d", "-"),
        **dict.fromkeys("×⋅·∙", "*"),
        **dict.fromkeys("\u2044\u2215\uff0f", "/"),
        "\uff04": "$",
        "\uff05": "%",
        "\uff0c": ",",
        "\uff0e": ".",
        "\uff1d": "=",
        "\uff1a": ":",
    }
)
_OTHER_DIGIT_OR_FRACTION = re.compile(r"[^\W0-9_A-Za-z]|[¼½¾⅐-⅞]")
_STEPS: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"\\[!]"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=\d)(?:\\[,;:]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\[,;:> ]|(?<=\S)~|[\u00a0\u2009\u202f]|\\q?quad\b|\$\$"), " "),
    (re.compile(r"\\([$%#&])"), r"\1"),
    (re.compile(r"\\[()\[\]]|\\(?:left|right|displaystyle)\b"), " "),
    (re.compile(r"\s?\^\s?(?:\{\s*\\circ\s*\}|\\circ\b)|\\degree\b|°"), " degrees "),
    (re.compile(r"\\(?:times|cdot)\b"), "*"),
    (re.compile(r"(?<![\w)\]}])\*\*|\*\*(?![\w(\[{\\])|`|(?<!\w)__|__(?!\w)"), ""),
]


def plain(text: str) -> str:
    """`text` with ASCII digits, signs and separators, and without the commands and marks that only dress a number.

    >>> plain(r"\\textbf{12}\\text{ cm}^2"), plain(r"1\\frac{1}{2}"), plain("\u2212٤٢"), plain("**1{,}080\\\\%**")
    ('12 cm', '1 1/2', '-42', '1,080%')
    """
    text = _SPACES.sub(lambda found: "\n" if "\n" in found[0] else " ", text)
    text = latex_powers(text)
    text = _OTHER_DIGIT_OR_FRACTION.sub(_ascii_digit, text.translate(_CHARACTERS))
    for pattern, written in _STEPS:
        text = pattern.sub(written, text)
    for _ in range(_WRAPPED_DEPTH):
        text, count = _WRAPPERS.subn(_unwrapped, text)
        if not count:
            break
    text = _FRAC.sub(_slash, repeating_decimals(text)) if "frac" in text or "\\overline" in text else text
    return _UNIT_POWER.sub(r"\1", text) if "^" in text else text


def latex_powers(text: str) -> str:
    """`text` with powers and indices as LaTeX writes them.

    >>> latex_powers("x₁² + 10⁻³")
    'x_{1}^{2} + 10^{-3}'
    """
    text = _SUBSCRIPT.sub(lambda found: "_{" + found[0].translate(_SUBSCRIPTS) + "}", text)
    return _SUPERSCRIPT.sub(lambda found: "^{" + found[0].translate(_SUPERSCRIPTS) + "}", text)


def repeating_decimals(text: str) -> str:
    """`text` with each repeating decimal as a fraction.

    >>> repeating_decimals(r"0.\\overline{3} and 1.2\\overline{45}")
    '\\\\frac{1}{3} and \\\\frac{137}{110}'
    """
    return _REPEATING.sub(_repeated, text) if "\\overline" in text else text


def _repeated(found: re.Match[str]) -> str:
    whole, start, period = found[1] or "0", found[2], found[3]
    value = Fraction(f"{whole}.{start or 0}") + Fraction(int(period), 10 ** len(start) * (10 ** len(period) - 1))
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _ascii_digit(found: re.Match[str]) -> str:
    """A digit of another script as ours, a fraction in one character spelled out; every other letter stays."""
    character = found[0]
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    if unicodedata.decomposition(character).startswith("<fraction>"):
        spelled = unicodedata.normalize("NFKC", character).replace("\u2044", "/")
        return f" {spelled}" if found.start() and found.string[found.start() - 1].isdigit() else spelled
    return character


def _unwrapped(found: re.Match[str]) -> str:
    before = found.string[found.start() - 1] if found.start() else ""
    return f" {found[1]}" if before.isdigit() and found[1][:1].isalpha() else found[1]


def _slash(found: re.Match[str]) -> str:
    """A fraction of two numbers as a/b, its sign first, apart from a whole number before it."""
    top, bottom = found[2] or found[3], found[4] or found[5]
    sign = "-" if top.startswith("-") != bottom.startswith("-") else ""
    written = f"{sign}{top.lstrip('-')}/{bottom.lstrip('-')}"
    return f"{found[1]} {written}" if found[1] else written
