"""Where macro actions end: rules that cut the tokens of each response into contiguous segments (MA-RLHF, arXiv
2410.02743, section 3.2 and appendix B).

A rule marks the tokens that begin a macro action. Whatever the rule, a turn begins one: an action never spans what an
environment said. No macro action is empty. The number of a segment is its place in the response, -1 where the policy
did not choose.

Parsing needs a constituency parser, which is not part of this project: one is named by dotted path and returns nested
lists of words.
"""

from __future__ import annotations

import importlib
import logging
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby, pairwise
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from apportion.algorithms.credit.parsing import TreeParser, Unparseable, parsed_starts
from apportion.algorithms.interface import CreditInput

TIE = 1e-12  # a surprise that is the mean up to float64's rounding is no rise

log = logging.getLogger(__name__)


class Rule(Protocol):
    """Marks the first token of each macro action: bool [B, T] (read at True of the mask only), and metrics."""

    needs: ClassVar[frozenset[str]]

    def __call__(self, batch: CreditInput) -> tuple[Tensor, dict[str, float]]: ...


def previous_places(mask_BT: Tensor) -> Tensor:
    """[B, T] int64: the place of the last True of the mask before each token, -1 where there is none.

    >>> previous_places(torch.tensor([[True, False, True]])).tolist()
    [[-1, 0, 0]]
    """
    rows, width = mask_BT.shape
    if not width:
        return torch.zeros(rows, 0, dtype=torch.int64, device=mask_BT.device)
    places_BT = torch.arange(width, device=mask_BT.device).expand(rows, width)
    last_BT = torch.where(mask_BT, places_BT, -1).cummax(-1).values
    return torch.cat([last_BT.new_full((rows, 1), -1), last_BT[:, :-1]], 1)


def turn_starts(mask_BT: Tensor, turn_ids_BT: Tensor) -> Tensor:
    """bool [B, T]: the first action token of each turn.

    >>> turn_starts(torch.tensor([[True, True, False, True]]), torch.tensor([[0, 0, -1, 1]])).tolist()
    [[True, False, False, True]]
    """
    previous_BT = previous_places(mask_BT)
    previous_turn_BT = turn_ids_BT.gather(1, previous_BT.clamp_min(0))
    return mask_BT & ((previous_BT < 0) | (previous_turn_BT != turn_ids_BT))


def number_segments(starts_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Segment ids [B, T] int64 from the tokens that begin one: 0, 1, ... along the mask, -1 elsewhere.

    >>> number_segments(torch.tensor([[True, False, True]]), torch.tensor([[True, True, True]])).tolist()
    [[0, 0, 1]]
    """
    return torch.where(mask_BT, (starts_BT & mask_BT).long().cumsum(-1) - 1, -1)


def fixed_starts(mask_BT: Tensor, turn_ids_BT: Tensor, n_gram: int) -> Tensor:
    """bool [B, T]: every `n_gram`-th action token, counted from the start of its turn."""
    if not mask_BT.numel():
        return mask_BT
    place_BT = mask_BT.long().cumsum(-1) - 1
    first_BT = torch.where(turn_starts(mask_BT, turn_ids_BT), place_BT, 0).cummax(-1).values
    return mask_BT & ((place_BT - first_BT) % n_gram == 0)


@dataclass
class FixedNGram:
    """A macro action ends after `n_gram` tokens."""

    n_gram: int = 5
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.n_gram < 1:
            raise ValueError(f"n_gram: got {self.n_gram}, expected at least 1")

    def __call__(self, batch: CreditInput) -> tuple[Tensor, dict[str, float]]:
        return fixed_starts(batch.mask_BT, batch.turn_ids_BT, self.n_gram), {}


def draw_sizes(sizes: Sequence[int], repeats: int, generator: random.Random) -> list[int]:
    """Each size `repeats` times, shuffled: the lengths of a response's macro actions in order.

    >>> sorted(draw_sizes([2, 3], 2, random.Random(0)))
    [2, 2, 3, 3]
    """
    drawn = [size for size in sizes for _ in range(repeats)]
    generator.shuffle(drawn)
    return drawn


@dataclass
class RandomisedNGram:
    """Macro actions of drawn lengths, counted from the start of each turn; `sizes` are the paper's (the released code's
    have 1 too); the list goes on from turn to turn. What is
    left of a turn when the list runs out is one macro action, as published; with `reshuffle` another list is drawn.

    The draw follows from `seed` and the response's own tokens (its row, where token ids are not known), so it does
    not depend on how a batch was ordered or padded, and a resumed run draws the same.
    """

    sizes: list[int] = field(default_factory=lambda: [2, 3, 5, 10])
    repeats: int = 3
    reshuffle: bool = False
    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes: got {list(self.sizes)}, expected lengths of at least 1")
        if self.repeats < 1:
            raise ValueError(f"repeats: got {self.repeats}, expected at least 1")

    def __call__(self, batch: CreditInput) -> tuple[Tensor, dict[str, float]]:
        starts_BT = turn_starts(batch.mask_BT, batch.turn_ids_BT)
        for row, mask_T in enumerate(batch.mask_BT):
            places = mask_T.nonzero()[:, 0]
            turns = starts_BT[row][mask_T].nonzero()[:, 0].tolist()
            lengths = [end - start for start, end in pairwise([*turns, len(places)])]
            token_ids = batch.token_ids_BT[row][mask_T] if batch.token_ids_BT is not None else torch.tensor([row])
            key = zlib.crc32(token_ids.long().cpu().numpy().tobytes())
            cuts = self.cuts(lengths, random.Random(self.seed * 2**32 + key))
            starts_BT[row, places[cuts]] = True
        return starts_BT, {}

    def cuts(self, turn_lengths: Sequence[int], generator: random.Random) -> list[int]:
        """Where macro actions begin within turns of so many tokens, one after the other, increasing; not the turns' own
        first tokens. Turns share the list of sizes; one that is longer than its turn ends with it.

        >>> RandomisedNGram(sizes=[2], repeats=3).cuts([3, 9], random.Random(0))
        [2, 5]
        """
        drawn = self._drawn(generator)
        cuts: list[int] = []
        turn_end = 0
        for length in turn_lengths:
            end, turn_end = turn_end, turn_end + length
            for size in drawn:
                end += size
                if end >= turn_end:
                    break
                cuts.append(end)
        return cuts

    def _drawn(self, generator: random.Random) -> Iterator[int]:
        yield from draw_sizes(self.sizes, self.repeats, generator)
        while self.reshuffle:
            yield from draw_sizes(self.sizes, self.repeats, generator)


@dataclass
class Perplexity:
    """A macro action goes on while its perplexity under the reference model does not rise; the token that would raise
    it begins the next.

    `cumulative` (the paper) compares a token with the mean negative log-likelihood of the macro action so far; without
    it, with the token before alone.
    """

    cumulative: bool = True
    needs: ClassVar[frozenset[str]] = frozenset({"reference_logprobs"})

    def __call__(self, batch: CreditInput) -> tuple[Tensor, dict[str, float]]:
        if batch.reference_logprobs_BT is None:
            raise ValueError(
                "reference_logprobs: got none, expected them for termination=perplexity; add them to `needs`"
            )
        mask_BT = batch.mask_BT
        surprise_BT = torch.where(mask_BT, -batch.reference_logprobs_BT, 0).double()
        starts_BT = turn_starts(mask_BT, batch.turn_ids_BT)
        if self.cumulative:
            return _rises_above_running_mean(surprise_BT, starts_BT, mask_BT), {}
        before_BT = surprise_BT.gather(1, previous_places(mask_BT).clamp_min(0))
        return starts_BT | (mask_BT & (surprise_BT > before_BT + TIE)), {}


def _rises_above_running_mean(surprise_BT: Tensor, starts_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """bool [B, T]: forced starts, and tokens whose surprise is above the mean of the segment that runs into them."""
    surprise_TB, forced_TB, mask_TB = (x.T.contiguous() for x in (surprise_BT, starts_BT, mask_BT))
    out_TB = forced_TB.clone()
    mean_B = torch.zeros_like(surprise_BT[:, 0]) if mask_BT.numel() else surprise_BT.sum(-1)
    count_B = torch.zeros_like(mean_B)
    for t in range(len(mask_TB)):
        out_TB[t] |= mask_TB[t] & (surprise_TB[t] > mean_B + TIE)
        count_B = torch.where(out_TB[t], 0.0, count_B) + mask_TB[t]
        step_B = torch.where(mask_TB[t], (surprise_TB[t] - mean_B) / count_B.clamp_min(1), 0.0)
        mean_B = torch.where(out_TB[t], surprise_TB[t], mean_B + step_B)
    return out_TB.T


@dataclass
class Parsing:
    """Macro actions are the constituents of each sentence, and what they are too large for is taken apart. Each sentence
    begins one.

    `parser` is the dotted path of a function that takes a sentence (and `parser_parameters`) and returns nested lists
    of words, or raises where it cannot. A constituent of fewer than `max_tokens` tokens is one macro action;
    a larger one is split into its children; a single word joins the macro action before it, never that of the sentence
    before.

    Each turn is parsed by itself; the parser never sees what an environment said. A response with a turn that cannot be
    parsed, or whose words cannot be found again in its text, is cut by the fixed rule with `n_gram`;
    `credit/parsing_fallback_share` says how many, and the first is logged with its reason. Needs `texts` and `token_ends_BT`.
    """

    parser: str = ""
    parser_parameters: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 5
    n_gram: int = 5
    needs: ClassVar[frozenset[str]] = frozenset({"token_ends"})

    def __post_init__(self) -> None:
        FixedNGram(self.n_gram)
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens: got {self.max_tokens}, expected at least 2 (a constituent has fewer)")
        self._parser = load_parser(self.parser, self.parser_parameters)
        self._logged = False

    def __call__(self, batch: CreditInput) -> tuple[Tensor, dict[str, float]]:
        if batch.texts is None or batch.token_ends_BT is None:
            raise ValueError("texts, token_ends: got none, expected both for termination=parsing")
        starts_BT = turn_starts(batch.mask_BT, batch.turn_ids_BT)
        fixed_BT = fixed_starts(batch.mask_BT, batch.turn_ids_BT, self.n_gram)
        fallbacks = 0
        for row, turn_ids_T in enumerate(torch.where(batch.mask_BT, batch.turn_ids_BT, -1)):
            try:
                starts = self._row_starts(batch.texts[row], batch.token_ends_BT[row].tolist(), turn_ids_T.tolist())
            except Unparseable as error:
                self._log_first(error)
                fallbacks += 1
                starts_BT[row] = fixed_BT[row]
            else:
                starts_BT[row, starts] = True
        return starts_BT, {"credit/parsing_fallback_share": fallbacks / max(1, len(batch.mask_BT))}

    def _row_starts(self, text: str, ends: Sequence[int], turn_ids: Sequence[int]) -> list[int]:
        """Tokens of a response that begin a macro action: of each run of tokens that the policy wrote in one turn, its
        text parsed alone. `turn_ids` are -1 for an environment's tokens and for padding."""
        starts: list[int] = []
        for turn, run in groupby(range(len(turn_ids)), key=turn_ids.__getitem__):
            if turn < 0:
                continue
            places = list(run)
            begin = ends[places[0] - 1] if places[0] else 0
            own = [ends[place] - begin for place in places]
            cuts = parsed_starts(text[begin : begin + own[-1]], own, self._parser, self.max_tokens)
            starts += [places[cut] for cut in cuts if cut < len(places)]
        return starts

    def _log_first(self, error: Unparseable) -> None:
        if not self._logged:
            reason = " ".join(str(error).split())
            log.warning("parser %s: %s; such responses are cut by n_gram=%d", self.parser, reason, self.n_gram)
        self._logged = True


def load_parser(path: str, parameters: dict[str, Any]) -> TreeParser:
    """The function at `package.module:name` or `package.module.name`, with its parameters bound."""
    module, _, name = path.replace(":", ".").rpartition(".")
    if not module:
        raise ValueError(f"parser: got {path!r}, expected the dotted path of a function, e.g. my_package.trees:parse")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"parser: got {path!r}, which cannot be imported ({error})") from error
    return lambda sentence: function(sentence, **parameters)


@dataclass
class OneAction:
    """The whole response (each turn of it) is one macro action.

    Close to REINFORCE with the critic as baseline; the macro value reads states inside the turn, so it has a bias.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: CreditInput) -> tuple[Tensor, dict[str, float]]:
        return turn_starts(batch.mask_BT, batch.turn_ids_BT), {}


RULES: dict[str, type] = {
    "fixed": FixedNGram,
    "randomised": RandomisedNGram,
    "perplexity": Perplexity,
    "parsing": Parsing,
    "one": OneAction,
}


def build_rule(termination: str | dict[str, Any], n_gram: int) -> Rule:
    """A rule from its name, or from a mapping with `name` and its own parameters; `n_gram` goes to those that have it.

    >>> build_rule("fixed", 3)
    FixedNGram(n_gram=3)
    """
    parameters = {"name": termination} if isinstance(termination, str) else dict(termination)
    name = parameters.pop("name", None)
    if name not in RULES:
        raise ValueError(f"termination: got {name!r}, expected one of {', '.join(RULES)}")
    known = {f.name for f in fields(RULES[name])}
    unknown = sorted(set(parameters) - (known - {"n_gram"}))
    if unknown:
        raise ValueError(f"termination {name}: got parameters {unknown}, expected some of {sorted(known - {'n_gram'})}")
    return RULES[name](**parameters, **({"n_gram": n_gram} if "n_gram" in known else {}))
