"""Reasoning steps of a response: cutting its text, finding each token's step, asking a judge, reading the verdict.

Text and numbers only. A response is never tokenised again: tokens are placed in the text by decoding the sampled ids
piece by piece. Steps count from 0 here, from 1 in what a judge reads and writes.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what a tokenizer shows for bytes that are not yet a whole character

INSTRUCTION = """You are checking a solution, step by step. For each step decide whether what the step itself says is \
correct, given the steps before it; a correct step stays correct when a later one goes wrong, and a right final answer \
does not excuse a wrong step. Explain each verdict in a sentence.

End your answer with one line that holds nothing but a JSON list of the numbers of all wrong steps, for example [2, 5] \
or [] if every step is correct."""


def token_starts(token_ids: Sequence[int], decode: Callable[[list[int]], str]) -> tuple[str, list[int]]:
    """The text that sampled ids spell, and where in it each token starts.

    `decode` turns a list of ids into text (special tokens as the caller wants them, without cleaning up spaces). Each
    id is decoded with the few before it, as its spelling can depend on them, so the cost is linear. A token that ends
    in the middle of a character spells nothing; the character belongs to the token that completes it.

    >>> token_starts([0, 1, 2], lambda ids: "".join("ab c"[2 * i : 2 * i + 2] for i in ids))
    ('ab c', [0, 2, 4])
    """
    ids = [int(token) for token in token_ids]
    text, starts = "", []
    context = read = 0  # ids[context:read] is what was last spelled
    for index in range(len(ids)):
        starts.append(len(text))
        known, both = decode(ids[context:read]), decode(ids[context : index + 1])
        if len(both) > len(known) and not both.endswith(REPLACEMENT):
            text += both[len(known) :]
            context, read = read, index + 1
    if read < len(ids):
        text += decode(ids[context:])[len(decode(ids[context:read])) :]
    return text, starts


def split_steps(text: str, delimiter: str = "\n\n") -> list[tuple[int, int]]:
    """Character spans that cover the whole text, one a step; a delimiter belongs to the step before it.

    What holds nothing but white space is no step of its own: it joins the one before (at the very start, the next).

    >>> split_steps("one\\n\\ntwo")
    [(0, 5), (5, 8)]
    """
    if not delimiter:
        raise ValueError("delimiter: got an empty text, expected what separates two steps")
    if not text:
        return []
    cuts = [match.end() for match in re.finditer(re.escape(delimiter), text)]
    spans: list[tuple[int, int]] = []
    start = 0
    for end in [*cuts, len(text)]:
        if text[start:end].strip() or (end == len(text) and not spans):
            spans.append((start, end))
            start = end
        elif spans:
            spans[-1] = (spans[-1][0], end)
            start = end
    return spans


def step_of_tokens(spans: Sequence[tuple[int, int]], starts: Sequence[int]) -> list[int]:
    """The step in which each token's first character stands; what starts at or past the end (EOS) is of the last step.

    Raises ValueError if there are tokens but no step.

    >>> step_of_tokens([(0, 5), (5, 8)], [0, 3, 5, 8])
    [0, 0, 1, 1]
    """
    if not spans:
        if any(start > 0 for start in starts):
            raise ValueError(f"spans: got none for {len(starts)} tokens of a text that is not empty")
        return [0] * len(starts)  # special tokens alone: one step without a text
    begins = [begin for begin, _ in spans]
    return [max(0, bisect_right(begins, start) - 1) for start in starts]


def fence_for(texts: Sequence[str], mark: str = "=", shortest: int = 5) -> str:
    """A run of `mark` longer than any in the texts, so that no text can forge a heading.

    >>> fence_for(["a ====== b"])
    '======='
    """
    longest = max((len(run) for text in texts for run in re.findall(re.escape(mark) + "+", text)), default=0)
    return mark * max(shortest, longest + 1)


def critique_prompt(
    question: str, steps: Sequence[str], reference_answer: str | None = None, instruction: str = INSTRUCTION
) -> str:
    """What a judge is asked about one response. The texts go in as they are, between headings they cannot contain.

    >>> print(critique_prompt("1+1?", ["It is 3."], "2", "Judge."))
    Judge.
    <BLANKLINE>
    ===== question =====
    1+1?
    ===== reference answer =====
    2
    ===== step 1 =====
    It is 3.
    ===== end of the solution: 1 step =====
    """
    given = [question, *steps] + ([] if reference_answer is None else [reference_answer])
    fence = fence_for(given)
    parts = [instruction, "", f"{fence} question {fence}", question]
    if reference_answer is not None:
        parts += [f"{fence} reference answer {fence}", reference_answer]
    for number, step in enumerate(steps, 1):
        parts += [f"{fence} step {number} {fence}", step.strip()]
    count = f"{len(steps)} step" + ("" if len(steps) == 1 else "s")
    return "\n".join([*parts, f"{fence} end of the solution: {count} {fence}"])


def parse_verdict(answer: str, steps: int) -> list[int] | None:
    """The wrong steps (from 0, increasing) that a judge's answer ends with; None if the answer has to be discarded.

    Strict, as the prompt asks: the last line that is not empty holds a JSON list of whole numbers between 1 and `steps`
    and nothing else. A list at the end of a sentence may be any text with brackets, `a[2]`, and is none.

    >>> parse_verdict("Step 2 divides by zero.\\n[2]", steps=3)
    [1]
    >>> parse_verdict("[99]", steps=4) is None, parse_verdict("It reads a[2]", steps=4) is None
    (True, True)
    """
    lines = answer.strip().splitlines()
    try:
        numbers = json.loads(lines[-1].strip()) if lines else None
    except (ValueError, RecursionError):  # a judge may write brackets without end
        return None
    if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
        return None
    if any(not 1 <= number <= steps for number in numbers):
        return None
    return sorted({number - 1 for number in numbers})
