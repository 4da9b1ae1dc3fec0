"""Macro actions from the constituents of sentences (MA-RLHF, arXiv 2410.02743, appendix B: rules 1 and 2).

Works on text and on where each token ends in it; tokens stay the sampled ones. The parser is given.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

TreeParser = Callable[[str], Any]  # sentence -> nested lists of words

SENTENCE_END = re.compile(r"(?<=[.!?]) +|\n")


@dataclass
class Node:
    """A constituent: the characters it spans, its parts (none for a word) and how many words it has."""

    start: int
    end: int
    children: list[Node]
    words: int


def sentences(text: str) -> list[tuple[int, int]]:
    """Character spans of the sentences of a text, without what separates them.

    >>> sentences("Go on. Stop!\\nNow")
    [(0, 6), (7, 12), (13, 16)]
    """
    spans, start = [], 0
    for match in SENTENCE_END.finditer(text):
        spans.append((start, match.start()))
        start = match.end()
    spans.append((start, len(text)))
    return [(a, b) for a, b in spans if text[a:b].strip()]


def locate(tree: Any, text: str, start: int, end: int) -> Node:
    """A parser's nested lists with the characters they span in text[start:end]; ValueError if a word is not there."""
    if isinstance(tree, str):
        place = text.find(tree, start, end) if tree else -1
        if place < 0:
            raise ValueError(f"parser: word {tree!r} is not in the text where it was expected")
        return Node(place, place + len(tree), [], 1)
    if not isinstance(tree, (list, tuple)) or not tree:
        raise ValueError(f"parser: got {type(tree).__name__}, expected nested lists of words")
    children = []
    for part in tree:
        children.append(locate(part, text, start, end))
        start = children[-1].end
    return Node(children[0].start, children[-1].end, children, sum(child.words for child in children))


class Unparseable(Exception):
    """A text for which the parser has no tree, or one that does not fit it."""


def parsed_starts(text: str, token_ends: Sequence[int], parse: TreeParser, max_tokens: int) -> list[int]:
    """Tokens that begin a macro action, increasing, from 0; Unparseable, with the reason, where there is no parse.

    `token_ends[i]` is how many characters of `text` stand up to and including token i, not decreasing. A cut falls
    before the token that holds a constituent's first character. Each sentence begins a macro action; white space before
    the first one belongs to it.

    >>> parsed_starts("Go. No! It is.", range(1, 15), str.split, 5)
    [0, 4, 8]
    """
    starts: list[int] = []
    for start, end in sentences(text):
        tree, inside = _tree(parse, text[start:end]), list[int]()
        try:
            root = locate(tree, text, start, end)
            _collect(root, token_ends, max_tokens, inside)
        except (ValueError, RecursionError) as error:  # a tree as deep as a page without a full stop is no parse either
            raise Unparseable(f"{type(error).__name__}: {error}") from error
        first = bisect_right(token_ends, root.start)  # the sentence may begin earlier: parsers drop quotation marks
        blank = len(text[start:end]) - len(text[start:end].lstrip())
        begin = bisect_right(token_ends, start + blank) if starts else 0
        starts += [begin, *(token for token in inside if token != first)]
    return sorted({0, *starts})


def _tree(parse: TreeParser, sentence: str) -> Any:
    """Whatever a parser of somebody else's raises is about this sentence alone."""
    try:
        return parse(sentence)
    except Exception as error:
        raise Unparseable(f"{type(error).__name__}: {error}") from error


def _collect(node: Node, ends: Sequence[int], max_tokens: int, starts: list[int]) -> None:
    """Append the tokens at which the macro actions of `node` begin, depth first; not where its sentence does."""
    if node.words == 1:
        return  # a single word joins the macro action before it
    first, last = bisect_right(ends, node.start), bisect_right(ends, node.end - 1)
    if last - first + 1 < max_tokens:
        starts.append(first)
        return
    for child in node.children:
        _collect(child, ends, max_tokens, starts)
