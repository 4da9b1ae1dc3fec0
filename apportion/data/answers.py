"""The final answer of a text, and the number that a text says.

Three readings, from strict to lenient; each gives an exact fraction, or None where there is no number:

    number_of(text)      the whole text is one number: an answer column, the content of a \\boxed{}
    first_number(text)   the number that the text begins with: what follows an answer mark
    last_number(text)    the last number of running text

All of them read a sign, currency, a percent sign and a unit (which do not change the value: 50% is 50), thousands
separators, fractions, mixed numbers, scientific notation and the words thousand to trillion. What looks like a number
and is none of these (a time, a date, a power, an unknown suffix as in 2x) is never read as a part of itself.
"""

from __future__ import annotations

import re
from fractions import Fraction

from apportion.data.notation import CURRENCY, GLUED_UNITS, NOT_A_UNIT, ONE_LETTER_UNITS, plain
from apportion.data.reasoning import CLOSING, OPENING

_OPENS = re.compile(OPENING, re.IGNORECASE)
_CLOSES = re.compile(CLOSING, re.IGNORECASE)
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>-?[\d.,/]*\d|[A-Za-z]\b))|\\.|[{}]", re.DOTALL)
MARK = re.compile(r"####(?!#)")
_CLOSING_MARK = re.compile(r"(####[^#\n]*[^#\s])[ \t*]*####[ \t*]*$", re.MULTILINE)  # of a heading: "#### 42 ####"

MOST_CHARACTERS = 500  # of one number; a longer one is a loop of digits
_NUMBER = r"(?:(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
_POWER = r"(?:\{\s*[-+]?\d{1,4}\s*\}|\(\s*[-+]?\d{1,4}\s*\)|[-+]?\d{1,4})(?!\d)"
_TOKEN = re.compile(
    r"(?=[\d.])(?:"  # soon done with every other character
    + "|".join(
        [
            # a time or ratio, a date, a version, and separators that English does not write
            r"(?P<other>\d+(?::\d+)+|\d+(?:/\d+){2,}|\d{4}-\d{1,2}-\d{1,2}(?!\d)|\d+(?:\.\d+){2,}(?:,\d+)?"
            r"|\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:,\d{2})+,\d{3}(?!\d)|\d{4,}(?:,\d{3})+(?!\d))",
            rf"(?P<scientific>(?:(?P<factor>{_NUMBER})\s?(?:\*|[xX])\s?)?10\s?(?:\^|\*\*)\s?(?P<power>{_POWER}))",
            r"(?P<mixed>(?P<whole>\d{1,9})(?:[ \t]+|[ \t]+and[ \t]+|&)(?P<over>\d+) ?/ ?(?P<under>\d+)(?![\d./]))",
            rf"(?P<fraction>(?P<top>{_NUMBER}) ?/ ?(?P<bottom>{_NUMBER}))",
            r"(?P<spaced>(?<![\d.,])\d{1,3}(?: \d{3})+(?:\.\d+)?(?![\d/]))",
            rf"(?P<single>{_NUMBER}(?:[eE][-+]?\d{{1,4}}(?!\d))?)",
        ]
    )
    + ")"
)
_SCALE = re.compile(r"[ \t-]?(thousand|million|billion|trillion)s?\b", re.IGNORECASE)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_MONEY_SCALE = re.compile(r"(k|m|bn|b)(?![A-Za-z$])", re.IGNORECASE)  # $70k
_MONEY_SCALES = {"k": 10**3, "m": 10**6, "b": 10**9, "bn": 10**9}
# Before a number: the base of a power, what it divides, a function or command that it is the argument of, plus-minus.
_BOUND_BEFORE = re.compile(
    r"(?:[A-Za-z]\{|[A-Za-z\d]\(|\}\s*\{|√\s*\(?|(?:\^|\*\*)\s*[{(]?|/ ?\(?|±|\\pm|\\mp|\d\s+:)\s*\Z|\d:\Z"
)
_NAME_BEFORE = re.compile(r"(?:[A-Za-z_\u00c0-\u024f\u0370-\u052f]|_\{\s*)$")  # v2, x_1: a name, not a number
# After a number: a power, a command such as \sqrt or \pi, a Greek letter, a division by a variable, plus-minus.
_BOUND_AFTER = re.compile(
    r"\s?(?:\^|\*\*|\\[A-Za-z]|[\u0370-\u03ff√∛±]|pi\b|/ ?(?:\(|\\|[abcknxyz]\b)|[万萬亿億千百兆])|[({\[]\s*[-\d]"
    r"|\s+(?:squared|cubed|factorial|and\s+(?:a|one)\s+(?:half|third|quarter))\b"
)
_GLUED = re.compile(r"([A-Za-z]+)(?![A-Za-z])")
_SUBTRACTS = re.compile(r"[\w)\]}%]$")  # right before a minus: the last number of "12-7" is 7
_SPACED_SIGN = re.compile(r"[=:][^\S\n]*\Z")  # "= - 5", but not the dash of a list
_IN_WORDS = re.compile(r"(?:\bnegative|(?:^|[=:(]|\b(?:is|are|be|equals?|gives?|get))\s*\bminus)\s+$", re.IGNORECASE)
_CURRENCY_BEFORE = re.compile(rf"{CURRENCY}\s?$")
_LEAD = re.compile(
    r"\s*(?:(?:the|so|thus|hence|therefore|final|correct|answer|result|is|equals)\b[\s:,]*)*(?:[A-Za-z]\w?\s*=)?=?\s*",
    re.IGNORECASE,
)
_QUOTES = re.compile(r"[\s:,\"'(\[{#~≈]*")  # around or before a number that an answer mark announces
_WHOLE_BEFORE = re.compile(rf"[-+]?\s*(?:{CURRENCY})?\s*[-+]?|(?:minus|negative)\s+", re.IGNORECASE)
_JOINED = re.compile(r"(?:^|(?<=[^\W\d_]))\s?[-/'’]\s?(?=[^\W\d_])")  # km/h, 5-gallon, driver's
_UNIT = re.compile(rf"\s*(?:%|{CURRENCY})?((?:[^\W\d_]|[\s.])*(?:\((?:[^\W\d_]|[\s.])*\)[\s.]*)?)")
_WORD = re.compile(r"[^\W\d_]+")
_ANOTHER = re.compile(r"\s*(?:or|to|and|vs\.?|[-,;:/|+*]|±|\\pm)\s*[-+]?\s*[$€£¥]?\s*[-+]?\.?\d", re.IGNORECASE)
_SUM_BEFORE = re.compile(r"[-\d\s.,+*/()x÷$%]*=")
MOST_UNIT_WORDS = 8
TAIL_CHARACTERS = 600  # more than the longest number that is read, and what stands around it
CONTEXT = 32  # characters before and after a number that say what it is


def answer_text(text: str, opening: str = "") -> str | None:
    """What is said after the reasoning, of the last <answer> where there is one. None where the text ends before it.

    `opening` is what the generation prompt wrote of the response, as `<think>`.

    >>> answer_text("<think>2 or 3?</think> It is 3."), answer_text("<think>2 or 3?"), answer_text("2?</think>3", "<think>")
    (' It is 3.', None, '3')
    """
    text = opening + text
    closed = max((found.end() for found in _CLOSES.finditer(text)), default=0)
    if _OPENS.search(text, closed):
        return None
    text = text[closed:]
    tags = list(_ANSWER_TAG.finditer(text))
    if not tags:
        return text
    opens = [tag for tag in tags if not tag[1]]
    if not opens:
        return text[: tags[-1].start()]
    end = next((tag.start() for tag in tags if tag[1] and tag.start() > opens[-1].end() - 1), None)
    return None if end is None else text[opens[-1].end() : end]


def last_box(text: str) -> tuple[bool, str | None]:
    """(whether a \\boxed{} starts, the content of the last one); None where it is empty or one is not finished.

    >>> last_box(r"so \\boxed{\\frac{1}{2}}."), last_box(r"\\boxed{12}, no, \\boxed{1"), last_box("12")
    ((True, '\\\\frac{1}{2}'), (True, None), (False, None))
    """
    open_at: list[int | None] = []  # start of the content for a box, None for a plain brace
    found, content = False, None
    for piece in _BOX_OR_BRACE.finditer(text):
        if piece[0] == "}":
            start = open_at.pop() if open_at else None
            if start is not None:
                content = text[start : piece.start()]
        elif piece[0] == "{":
            if found:
                open_at.append(None)
        elif piece["bare"]:
            found, content = True, piece["bare"]
        elif piece[0].endswith("{") and len(piece[0]) > 2:
            found = True
            open_at.append(piece.end())
    unfinished = any(start is not None for start in open_at)
    return found, None if unfinished or content is None or not content.strip() else content


def after_mark(text: str) -> str | None:
    """What follows the last #### that does not close a heading, None where there is none.

    >>> after_mark("#### 41\\n#### 42"), after_mark("#### 42 ####"), after_mark("42")
    (' 42', ' 42', None)
    """
    marked = MARK.split(_CLOSING_MARK.sub(r"\1", text))
    return marked[-1] if len(marked) > 1 else None


def number_of(text: str) -> Fraction | None:
    """The number that the whole of `text` says.

    >>> [str(number_of(t)) for t in ("$1,080.50", "-3/4", "18 dollars", "50%", "x = 5", "5-7", "10:30", "2 or 5")]
    ['2161/2', '-3/4', '18', '50', '5', 'None', 'None', 'None']
    """
    said = plain(text).strip()
    while len(said) > 1 and said[0] + said[-1] in ("$$", "{}"):
        said = said[1:-1].strip()
    lead = _LEAD.match(said)
    said = _joined_sign(said[lead.end() :] if lead else said)
    tokens = list(_TOKEN.finditer(said))
    if len(tokens) != 1 or tokens[0]["spaced"]:
        return None
    before = said[: tokens[0].start()]
    if not _WHOLE_BEFORE.fullmatch(before):
        return None
    value, end = _value(said, tokens[0])
    if value is None or not _is_unit(said[end:]):
        return None
    return value


def first_number(text: str) -> Fraction | None:
    """The number that `text` begins with, whatever follows, unless it is another number beside it.

    >>> [str(first_number(t)) for t in (" 42\\n in 3 ways", "Answer:\\n$18.", "5-7", "6*7 = 42", "none, page 42", "")]
    ['42', '18', 'None', '42', 'None', 'None']
    """
    boxed, content = last_box(_first_line(text.replace("*", " ")))
    if boxed:
        return None if content is None else number_of(content)
    line = _first_line(plain(text))
    while (sum_before := _SUM_BEFORE.match(line)) is not None:
        line = line[sum_before.end() :]
    lead = _LEAD.match(line)
    line = line[lead.end() :] if lead else line
    quotes = _QUOTES.match(line)
    line = _joined_sign(line[quotes.end() :] if quotes else line)
    token = _TOKEN.search(line)
    if token is None or not _WHOLE_BEFORE.fullmatch(line[: token.start()]):
        return None
    value, end = _value(line, token)
    return None if value is None or _ANOTHER.match(line, end) else value


def last_number(text: str) -> Fraction | None:
    """The last number of running text; None where what stands in its place cannot be read as one number.

    >>> [str(last_number(t)) for t in ("so 1,250 - 3 is $1,247.", "12-7", "x = -3.50", "they meet at 11:30", "none")]
    ['1247', '7', '-7/2', 'None', 'None']
    """
    characters = TAIL_CHARACTERS
    while True:  # the end of a long text is enough where a number is well inside it
        said = plain(text[-characters:])
        for token in reversed(list(_TOKEN.finditer(said))):
            if token.start() < 2 * CONTEXT and characters < len(text):
                break
            if not _is_name(_before(said, token)):
                return _value(said, token)[0]
        if characters >= len(text):
            return None
        characters *= 4


def _first_line(text: str) -> str:
    """The first line that says more than "Final answer:"."""
    lead = _LEAD.match(text)
    return (text[lead.end() :] if lead else text).strip().partition("\n")[0]


def _is_name(before: str) -> bool:
    """Whether a number with this before it is a part of a name, as in v2 and x_1; USD5 is none."""
    return bool(_NAME_BEFORE.search(before)) and not _CURRENCY_BEFORE.search(before)


def _joined_sign(text: str) -> str:
    """`text` whose first minus belongs to the number behind it: "- 5" as "-5"."""
    return re.sub(r"^-\s+", "-", text)


def _before(text: str, token: re.Match[str]) -> str:
    return text[max(0, token.start() - CONTEXT) : token.start()]


def _value(text: str, token: re.Match[str]) -> tuple[Fraction | None, int]:
    """What the token says, None where its surroundings make something else of it; and where it ends, a scale included."""
    value, end = _magnitude(token), token.end()
    before = _before(text, token)
    if value is None or _is_name(before):
        return None, end
    negative, rest = _sign(before)
    after = text[end : end + CONTEXT]
    while (scale := _SCALE.match(after)) is not None:
        value *= _SCALES[scale[1].lower()]
        end += scale.end()
        after = text[end : end + CONTEXT]
    if _CURRENCY_BEFORE.search(before) and (scale := _MONEY_SCALE.match(after)) is not None:
        value *= _MONEY_SCALES[scale[1].lower()]
        end += scale.end()
        after = text[end : end + CONTEXT]
    glued = _GLUED.match(after)
    if glued and glued[1] not in GLUED_UNITS and (len(glued[1]) == 1 or glued[1].lower() not in GLUED_UNITS):
        return None, end
    if _BOUND_BEFORE.search(rest) or _BOUND_AFTER.match(after):
        return None, end
    return -value if negative else value, end


def _magnitude(token: re.Match[str]) -> Fraction | None:
    if token["other"] or len(token[0]) > MOST_CHARACTERS:
        return None
    if token["scientific"]:
        factor = _fraction(token["factor"]) if token["factor"] else Fraction(1)
        return factor * Fraction(10) ** int(token["power"].strip("{}() "))
    if token["mixed"]:
        over, under = int(token["over"]), int(token["under"])
        return int(token["whole"]) + Fraction(over, under) if over < under else None
    if token["fraction"]:
        bottom = _fraction(token["bottom"])
        return _fraction(token["top"]) / bottom if bottom else None
    return _fraction(token[0])


def _fraction(written: str) -> Fraction:
    return Fraction(written.replace(",", "").replace(" ", ""))


def _sign(before: str) -> tuple[bool, str]:
    """(whether what stands before a number makes it negative, what stands before the sign and the currency)"""
    rest = _CURRENCY_BEFORE.sub("", before)
    found = re.search(r"([-+])([^\S\n]*)$", rest)
    if not found:
        words = _IN_WORDS.search(rest)
        return bool(words), rest
    start = rest[: found.start()]
    if found[1] == "+":
        return False, rest if _SUBTRACTS.search(start) else start
    if found[2]:
        negative = bool(_SPACED_SIGN.search(start))
    else:
        negative = not _SUBTRACTS.search(_CURRENCY_BEFORE.sub("", start) if start.endswith("$") else start)
    return negative, start if negative else rest


def _is_unit(text: str) -> bool:
    """Whether what follows a number leaves its value as it is.

    >>> [_is_unit(t) for t in (" dollars.", "%", " km/h", " x", " and a half", " dozen", "!")]
    [True, True, True, False, False, False, False]
    """
    found = _UNIT.fullmatch(_JOINED.sub(" ", text))
    if not found or len(found[1].split()) > MOST_UNIT_WORDS:
        return False
    for word in _WORD.findall(found[1]):
        if word.lower() in NOT_A_UNIT or (len(word) == 1 and word.isascii() and word not in ONE_LETTER_UNITS):
            return False
    return True
