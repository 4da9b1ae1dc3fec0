"""Where macro actions begin: drawn lengths, perplexity and parsed constituents."""

import json
import random
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from macro_parts import make_batch, random_batch, tensor

from apportion.algorithms.credit.boundaries import RandomisedNGram, draw_sizes
from apportion.algorithms.credit.macro_actions import MacroActions
from apportion.algorithms.credit.parsing import Unparseable, parsed_starts

GOLDEN = json.loads((Path(__file__).parent / "golden/ma_rlhf.json").read_text())


def test_randomised_lengths_are_those_of_the_released_code():
    cuts = RandomisedNGram(sizes=[1, 2, 3, 5, 10], repeats=3).cuts([40], random.Random(0))
    assert [0, *cuts, 39] == GOLDEN["randomised_seed0"]["output"][0]  # there the last token is always cut off


def test_randomised_lengths_leave_the_rest_to_one_macro_action_unless_reshuffled():
    rule = RandomisedNGram(sizes=[2, 3], repeats=1)
    assert rule.cuts([50], random.Random(1))[-1] == 5
    again = RandomisedNGram(sizes=[2, 3], repeats=1, reshuffle=True).cuts([50], random.Random(1))
    assert again[1::2] == [5, 10, 15, 20, 25, 30, 35, 40, 45]
    assert sorted(draw_sizes([2, 3], 2, random.Random(0))) == [2, 2, 3, 3]


def test_randomised_boundaries_follow_the_response_and_the_seed_not_the_place_in_the_batch():
    batch = random_batch(rows=6, width=60)
    method = MacroActions(termination={"name": "randomised", "seed": 3})
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    shuffled = replace(
        batch,
        **{name: getattr(batch, name)[order] for name in vars(batch) if isinstance(getattr(batch, name), torch.Tensor)},
    )
    segments = method(batch).segment_ids_BT
    assert torch.equal(segments[order], method(shuffled).segment_ids_BT)
    assert not torch.equal(segments, MacroActions(termination={"name": "randomised", "seed": 4})(batch).segment_ids_BT)


def test_randomised_lengths_begin_anew_with_each_turn_and_take_the_list_in_order():
    rule = RandomisedNGram(sizes=[2, 3, 5, 10], repeats=1)
    assert draw_sizes(rule.sizes, 1, random.Random(1)) == [10, 2, 5, 3]
    # Turn 1 of 4 tokens ends within the 10; turn 2 of 4 has the 2 and ends within the 5; turn 3 has the 3, then no more.
    assert rule.cuts([4, 4, 20], random.Random(1)) == [6, 11]
    turns = [0] * 4 + [-1] * 2 + [1] * 4 + [-1] + [2] * 7
    mask = [[turn >= 0 for turn in turns]]
    batch = make_batch([[0.0] * 18], [[0.0] * 18], mask, turn_ids_BT=torch.tensor([turns]))
    rule = {"name": "randomised", "sizes": [2], "repeats": 3}
    segments = MacroActions(termination=rule)(batch).segment_ids_BT[0].tolist()
    assert segments == [0, 0, 1, 1, -1, -1, 2, 2, 3, 3, -1] + [4] * 7


def test_a_randomised_list_that_is_drawn_again_reaches_the_end_of_every_turn():
    rule = RandomisedNGram(sizes=[2], repeats=1, reshuffle=True)
    assert rule.cuts([5, 1, 4], random.Random(0)) == [2, 4, 8]
    assert RandomisedNGram(sizes=[2], repeats=1).cuts([5, 1, 4], random.Random(0)) == [2]


def perplexity_segments(logprobs, **settings):
    batch = make_batch([[0.0] * len(logprobs)], [[0.0] * len(logprobs)], reference_logprobs_BT=tensor([logprobs]))
    return MacroActions(termination={"name": "perplexity", **settings})(batch).segment_ids_BT[0].tolist()


def test_perplexity_ends_a_macro_action_before_the_token_that_would_raise_it():
    assert perplexity_segments([-1.0, -0.5, -0.7, -0.8, -0.1]) == [0, 0, 0, 1, 1]
    assert perplexity_segments([-0.1] * 7) == [0] * 7  # equal surprise is no rise


def test_surprises_that_are_equal_up_to_rounding_are_no_rise():
    # The running mean of 0.6 and 0.3 is 0.44999999999999996 in float64.
    assert perplexity_segments([-0.6, -0.3, -0.45]) == [0, 0, 0]
    assert perplexity_segments([-0.7, -0.1, -0.4]) == [0, 0, 0]
    assert perplexity_segments([-0.6, -0.3, -0.4501]) == [0, 0, 1]
    assert perplexity_segments([-0.3, -0.1 - 0.2], cumulative=False) == [0, 0]  # 0.30000000000000004
    assert perplexity_segments([-0.3, -0.3001], cumulative=False) == [0, 1]


def test_perplexity_begins_anew_with_each_turn_and_skips_what_the_environment_wrote():
    nan = float("nan")
    logprobs = tensor([[-0.5, -0.5, nan, nan, -0.1, -0.1, nan, -0.3, -0.2, -0.25]])
    mask = [[1, 1, 0, 0, 1, 1, 0, 1, 1, 1]]
    # The sixth place's environment token stands within a turn; the last turn's first token would be no rise of 0.5.
    turns = torch.tensor([[0, 0, -1, -1, 1, 1, -1, 1, 1, 1]])
    batch = make_batch([[0.0] * 10], [[0.0] * 10], mask, turn_ids_BT=turns, reference_logprobs_BT=logprobs)

    def segments(**settings):
        method = MacroActions(termination={"name": "perplexity", **settings})
        return method(batch).segment_ids_BT[0].tolist()

    # Turn 1: 0.1, 0.1 | 0.3 rises; 0.2 and 0.25 (mean 0.25) do not, but 0.25 is above the 0.2 before it.
    assert segments() == [0, 0, -1, -1, 1, 1, -1, 2, 2, 2]
    assert segments(cumulative=False) == [0, 0, -1, -1, 1, 1, -1, 2, 2, 3]


def test_the_released_code_cuts_one_token_before_each_rise_of_single_tokens():
    case = next(case for case in GOLDEN["official"] if case["name"] == "ma_ppl_len6")
    logprobs = case["inputs"]["ref_logprobs"]  # surprises 1.1 0.9 1.5 0.7 1.0 0.8
    assert perplexity_segments(logprobs, cumulative=False) == [0, 0, 1, 1, 2, 2]
    assert perplexity_segments(logprobs) == [0, 0, 1, 1, 1, 1]  # means 1.0, then 1.1 and 1.0667
    # The tokens at 2 and 4 rise; it cuts at 1 and 3.
    assert {1, 3} <= set(case["outputs"]["boundaries_relative_to_start"])
    assert 2 not in case["outputs"]["boundaries_relative_to_start"]


def test_perplexity_of_single_tokens_cuts_at_every_rise():
    assert perplexity_segments([-1.0, -0.5, -0.7, -0.8, -0.1], cumulative=False) == [0, 0, 1, 2, 2]


def parse_sentence(sentence, deep=True):
    """Binary right-branching trees; refuses what contains '?'."""
    if "?" in sentence:
        raise ValueError("no parse")
    words = sentence.split()
    tree = words[-2:]
    for word in reversed(words[:-2]):
        tree = [word, tree] if deep else [word, *tree]
    return tree


def test_parsing_takes_small_constituents_whole_and_joins_single_words_to_what_stands_before():
    text = "a b c d e f. g h"
    ends = [2, 4, 6, 8, 10, 11, 12, 14, 16]  # "a ", "b ", ..., "f", ".", " g", " h"
    # [a [b [c [d [e f.]]]]]: 7 tokens, so taken apart down to "d e f ." of fewer than 5.
    assert parsed_starts(text, ends, parse_sentence, 5) == [0, 3, 7]


def letters(text):
    return range(1, len(text) + 1)  # a token a character


def texts_of(text, starts, ends):
    places = [0, *(ends[start - 1] for start in starts if start), len(text)]
    return [text[a:b] for a, b in pairwise(places)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes. The cat sat on the mat. No. It left.", ["Yes. ", "The cat sat on the mat. ", "No. ", "It left."]),
        ("Yes. No. Go!", ["Yes. ", "No. ", "Go!"]),
        ("Wait? One\ntwo\n\nthree four five six", ["Wait? ", "One\n", "two\n\n", "three four five six"]),
        (" \n  Yes. No.", [" \n  Yes. ", "No."]),  # white space before the first sentence is no macro action
        ("Yes.\n  No.", ["Yes.\n  ", "No."]),  # nor is indentation
        ("Yes.", ["Yes."]),
        ("", [""]),
    ],
)
def test_every_sentence_begins_a_macro_action_whatever_the_parser_makes_of_it(text, expected):
    starts = parsed_starts(text, letters(text), str.split, 5)  # flat: every word is its own constituent
    assert texts_of(text, starts, letters(text)) == expected


def test_a_flat_parser_with_one_token_a_word_has_as_many_macro_actions_as_sentences():
    text = "Yes. The cat sat on the mat. No. It left."
    ends = [match.end() for match in re.finditer(r"\s*\S+", text)]
    starts = parsed_starts(text, ends, str.split, 5)
    assert starts == [0, 1, 7, 8]
    batch = make_batch([[0.0] * 10], [[0.0] * 10], texts=[text], token_ends_BT=torch.tensor([ends]))
    rule = {"name": "parsing", "parser": f"{__name__}.words_of", "max_tokens": 5}
    credit = MacroActions(termination=rule)(batch)
    assert credit.segment_ids_BT.tolist() == [[0] + [1] * 6 + [2] + [3] * 2]


def words_of(sentence):
    return sentence.split()


def test_a_single_word_that_leads_its_sentence_stands_alone_and_a_later_one_joins_what_is_before_it():
    text = "So. then [we go] on"
    tree = {"So.": ["So."], "then [we go] on": ["then", ["[we", "go]"], "on"]}
    starts = parsed_starts(text, [3, 8, 12, 16, 19], tree.__getitem__, 4)
    assert starts == [0, 1, 2]  # "So.", " then", " [we go] on"


def test_a_sentence_begins_with_its_own_first_character_where_the_parser_drops_it():
    text = 'Go on. "Stop now" he said.'
    tree = {"Go on.": ["Go", "on."], '"Stop now" he said.': [["Stop", "now"], ["he", "said."]]}
    starts = parsed_starts(text, letters(text), tree.__getitem__, 10)
    assert texts_of(text, starts, letters(text)) == ["Go on. ", '"Stop now" ', "he said."]


def test_parsing_falls_back_to_the_fixed_rule_for_one_response_and_counts_it():
    batch = make_batch(
        [[0.0] * 6] * 2,
        [[0.0] * 6] * 2,
        [[1] * 6, [1] * 5 + [0]],
        texts=["a b c d e f", "what? is it"],
        token_ends_BT=torch.tensor([[1, 3, 5, 7, 9, 11], [4, 5, 6, 8, 11, 0]]),
    )
    parser = f"{__name__}.parse_sentence"
    credit = MacroActions(termination={"name": "parsing", "parser": parser}, n_gram=2)(batch)
    assert credit.segment_ids_BT.tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, -1]]
    assert credit.metrics["credit/parsing_fallback_share"] == 0.5


PARSED = []


def parser_of_words(sentence):
    """Keeps what it is asked, and refuses what is no words."""
    PARSED.append(sentence)
    if "#" in sentence:
        raise ValueError("no words")
    return sentence.split()


def test_each_turn_is_parsed_by_itself_and_the_parser_never_sees_an_observation():
    PARSED.clear()
    # "go" " up" "" | "##" ".#" | "go" " on" " to", and a row whose second turn cannot be parsed.
    turns = [0, 0, 0, -1, -1, 1, 1, 1]
    ends = [2, 5, 5, 7, 9, 11, 14, 17]
    batch = make_batch(
        [[0.0] * 8] * 2,
        [[0.0] * 8] * 2,
        [[turn >= 0 for turn in turns]] * 2,
        turn_ids_BT=torch.tensor([turns] * 2),
        texts=["go up##.#go on to", "go up##.##n on to"],
        token_ends_BT=torch.tensor([ends] * 2),
    )
    parser = f"{__name__}.parser_of_words"
    credit = MacroActions(termination={"name": "parsing", "parser": parser}, n_gram=2)(batch)
    assert PARSED == ["go up", "go on to", "go up", "#n on to"]
    assert credit.segment_ids_BT.tolist() == [[0, 0, 0, -1, -1, 1, 1, 1], [0, 0, 1, -1, -1, 2, 2, 3]]
    assert credit.metrics["credit/parsing_fallback_share"] == 0.5


def test_a_later_turn_s_constituents_are_cut_at_its_own_tokens():
    # One letter a token: "a b c" | "# " | "d e f g", each word and each space a token, of at most 2 a macro action.
    text, turns = "a b c# d e f g", [0] * 5 + [-1] * 2 + [1] * 7
    batch = make_batch(
        [[0.0] * 14],
        [[0.0] * 14],
        [[turn >= 0 for turn in turns]],
        turn_ids_BT=torch.tensor([turns]),
        texts=[text],
        token_ends_BT=torch.arange(1, 15)[None],
    )
    parser = f"{__name__}.parse_sentence"
    credit = MacroActions(termination={"name": "parsing", "parser": parser, "max_tokens": 4}, n_gram=9)(batch)
    # [a [b c]] and [d [e [f g]]]: "b c" and "f g" are small enough; a single word joins what stands before it.
    assert credit.segment_ids_BT.tolist() == [[0, 0, 1, 1, 1, -1, -1, 2, 2, 2, 2, 3, 3, 3]]
    assert credit.metrics["credit/parsing_fallback_share"] == 0


def test_a_parser_that_changes_words_is_a_fallback_and_one_that_is_not_there_an_error():
    with pytest.raises(Unparseable, match="word '-LRB-' is not in the text"):
        parsed_starts("a b", [1, 3], lambda _: ["a", "-LRB-"], 5)
    with pytest.raises(Unparseable, match="RecursionError"):
        parsed_starts("a " * 3000, range(2, 6001, 2), parse_sentence, 5)  # deeper than Python recurses
    with pytest.raises(ValueError, match=r"no_such_module.*cannot be imported"):
        MacroActions(termination={"name": "parsing", "parser": "no_such_module.parse"})
    with pytest.raises(ValueError, match="expected the dotted path"):
        MacroActions(termination="parsing")


class ParserError(Exception):
    """What a parser of somebody else's may raise."""


RAISED = [ParserError("no\nmodel"), KeyError("a"), AttributeError("b")]


def parser_that_raises(sentence):
    raise RAISED[len(sentence) % 3]


def test_whatever_a_parser_raises_is_a_fallback_of_that_response_and_the_first_is_logged(caplog):
    batch = make_batch(
        [[0.0] * 3] * 3,
        [[0.0] * 3] * 3,
        texts=["abc", "abcd", "abcde"],
        token_ends_BT=torch.tensor([[1, 2, 3], [1, 2, 4], [1, 2, 5]]),
    )
    parser = f"{__name__}.parser_that_raises"
    method = MacroActions(termination={"name": "parsing", "parser": parser}, n_gram=2)
    for _ in range(2):
        credit = method(batch)
        assert credit.segment_ids_BT.tolist() == [[0, 0, 1]] * 3
        assert credit.metrics["credit/parsing_fallback_share"] == 1.0
    expected = f"parser {parser}: ParserError: no model; such responses are cut by n_gram=2"
    assert [record.getMessage() for record in caplog.records] == [expected]
