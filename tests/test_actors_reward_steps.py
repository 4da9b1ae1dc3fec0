"""Rewards as lists with one number a step: where each number stands, and which reading of a list goes first."""

import numpy as np
import pytest
from scoring_parts import batch_of, score, trajectory

from apportion.batch import Batch
from apportion.conf.schema_experience import RewardConfig
from apportion.data.prompts import TokenizerPath
from apportion.platform.errors import ConfigError

END = 1  # a special token


class Letters:
    """One token a character; END spells nothing."""

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens and not clean_up_tokenization_spaces
        return "".join(chr(i) for i in ids if i != END)


def scored(text: str, rewards: list[float], turn_ids: list[int] | None = None, **options):
    """The batch of one response (an END after its text) and its report; '|' in `text` is an END too."""
    given = trajectory("rows:0:0", text, turn_ids)
    ids = [END if c == "|" else ord(c) for c in text]
    given.token_ids = np.array([7, 8, *ids], np.int32)
    _, prompts = batch_of("?")
    options = {"tokenizer": Letters(), "step_delimiter": "\n"} | options
    return score(lambda completions: [rewards], Batch.from_trajectories([given]), prompts, **options)


def test_one_number_a_step_stands_at_the_steps_last_token():
    batch, report = scored("ab\ncd\n\ne|", [1.0, -2.0, 4.0])
    #                                       a  b  \n c  d  \n  \n e  |
    assert batch.token_rewards.tolist() == [0, 0, 1, 0, 0, 0, -2, 0, 4]
    assert batch.rewards.tolist() == [3.0] and not report.failed


def test_steps_are_counted_over_turns_and_an_environments_text_has_none():
    turns = [0, 0, 0, 0, -1, -1, -1, 1, 1, 1, 1, 2]
    batch, _ = scored("a\nb|x\ny" + "c\nd|" + "|", [1.0, 2.0, 3.0, 4.0], turns)
    assert batch.token_rewards.tolist() == [0, 1, 0, 2, 0, 0, 0, 0, 3, 0, 4, 0]


def test_a_list_that_fits_tokens_is_one_number_a_token_and_one_that_fits_turns_is_one_a_turn():
    """Three tokens in three steps; two turns of which one has two steps and the other none."""
    batch, _ = scored("a\nb", [1.0, 2.0, 3.0])
    assert batch.token_rewards.tolist() == [1, 2, 3]
    batch, _ = scored("a\nbc|x|", [1.0, 2.0], [0, 0, 0, 0, 0, -1, 1])
    assert batch.token_rewards.tolist() == [0, 0, 0, 0, 1, 0, 2]


def test_the_delimiter_is_the_configured_one():
    batch, _ = scored("a;b\nc|", [1.0, 2.0], step_delimiter=";")
    assert batch.token_rewards.tolist() == [0, 1, 0, 0, 0, 2]


def test_a_list_of_another_length_fails_and_names_what_would_fit():
    batch, report = scored("ab\ncd|", [1.0, 2.0, 3.0])
    assert np.isnan(batch.rewards).all() and report.failed == {"wrong_length": 1}
    assert report.first_traceback.endswith("got a list of 3, expected 6 (response tokens), 1 (turns) or 2 (steps)")
    _, report = scored("ab\ncd|", [1.0, 2.0], tokenizer=None)
    assert report.first_traceback.endswith("got a list of 2, expected 6 (response tokens) or 1 (turns)")


def test_a_response_that_says_nothing_has_no_step():
    batch, report = scored("|", [])
    assert batch.rewards.tolist() == [0.0] and not report.failed


def test_the_policys_own_tokenizer_is_read_from_its_folder(tiny):
    from apportion.data.prompts import load_tokenizer

    ids = load_tokenizer(tiny).encode("so 1+1=2\n\nso 4", add_special_tokens=False)
    given = trajectory("rows:0:0", "?", [0] * len(ids))
    given.token_ids = np.array([7, 8, *ids], np.int32)
    _, prompts = batch_of("?")
    batch, _ = score(
        lambda completions: [[1.0, 2.0]], Batch.from_trajectories([given]), prompts, tokenizer=TokenizerPath(tiny)
    )
    assert np.flatnonzero(batch.token_rewards).tolist() == [len("so 1+1=2\n\n") - 1, len(ids) - 1]
    assert batch.rewards.tolist() == [3.0]


def test_an_empty_delimiter_is_refused():
    with pytest.raises(ConfigError, match=r"reward\.step_delimiter: got an empty text"):
        RewardConfig(functions="gsm8k", step_delimiter="")
