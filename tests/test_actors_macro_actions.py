"""Macro actions through the credit worker, on a packed batch as the actors have it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from apportion.actors.credit import CreditSpec, CreditWorker
from apportion.actors.microbatch import make
from apportion.algorithms.interface import SurrogateInput
from apportion.algorithms.registry import build
from apportion.batch import Batch, Trajectory
from apportion.data.builtin import resolve_model

TEXTS = ["The cat sat. It is 42.", "Non!", "naïve café"]


def parse(sentence):
    """Halves of a sentence's words."""
    words = sentence.split()
    half = len(words) // 2
    return [words[:half], words[half:]] if half else words


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model("builtin:tiny"))


@pytest.fixture
def batch(tokenizer):
    """Responses of several lengths, with values, old and reference log-probs."""
    rng, rows = np.random.default_rng(0), []
    for index, text in enumerate(TEXTS):
        ids = np.array([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id], np.int32)
        n = len(ids)
        rows.append(
            Trajectory(
                f"p{index}", index, 0, np.concatenate([[1, 2], ids]).astype(np.int32), 2, np.ones(n, bool),
                np.zeros(n, np.int32), np.zeros(n, np.float32), 0, "stop", text,
            )
        )  # fmt: skip
    packed = Batch.from_trajectories(rows)
    values, old, reference = (rng.normal(size=packed.action_tokens).astype(np.float32) for _ in range(3))
    return replace(
        packed, rewards=np.array([1.0, 0.0, 1.0]), sample_mask=np.ones(3, bool), values=values, old_logprobs=-abs(old),
        reference_logprobs=-abs(reference), bootstrap_values=np.zeros(3, np.float32), minibatch_ids=np.zeros(3, np.int32),
    )  # fmt: skip


def assigned(batch, credit, kl=0.0):
    spec = CreditSpec(credit, {"name": "token_mean"}, [], [], kl > 0, "k1", resolve_model("builtin:tiny"))
    return CreditWorker(spec).assign(batch, kl)


@pytest.mark.parametrize("kl", [0.0, 0.05])
def test_one_token_a_macro_action_is_ppo_to_the_last_bit(batch, kl):
    macro, metrics = assigned(batch, {"name": "macro_actions", "n_gram": 1, "whiten": "sample"}, kl)
    ppo, _ = assigned(batch, {"name": "gae", "gamma": 1.0, "gae_lambda": 0.95, "whiten": "sample"}, kl)
    np.testing.assert_array_equal(macro.advantages, ppo.advantages)
    np.testing.assert_array_equal(macro.returns, ppo.returns)
    assert metrics["credit/macro_action_length"] == 1.0


def test_segments_travel_in_the_shard_to_the_macro_ratio(batch):
    credited, _ = assigned(batch, {"name": "macro_actions", "n_gram": 5})
    for row in range(len(batch)):
        span = batch.response_slice(row)
        np.testing.assert_array_equal(credited.segment_ids[span], np.arange(span.stop - span.start) // 5)
        per_segment = [np.unique(credited.advantages[span][credited.segment_ids[span] == s]).size for s in range(2)]
        assert max(per_segment) == 1
    micro = make(credited, np.arange(3))
    old, advantages, segments = (
        micro.gather(x, "cpu") for x in (batch.old_logprobs, credited.advantages, credited.segment_ids)
    )
    policy = torch.where(micro.mask, old + 0.01, 0.0)
    out = build("surrogate", {"name": "ppo_clip", "ratio": "macro"})(
        SurrogateInput(policy, old, advantages, micro.mask, segment_ids_BT=segments)
    )
    first = (micro.rows == 0) & (micro.steps < 5)
    rows, steps = micro.rows[first], micro.steps[first]
    torch.testing.assert_close(out.indicators["ratio"][rows, steps], torch.full((5,), float(np.exp(0.05))))


def test_one_action_has_one_advantage_a_response_and_its_whole_return(batch):
    credited, metrics = assigned(batch, {"name": "macro_actions", "termination": "one"})
    for row, reward in enumerate(batch.rewards):
        span = batch.response_slice(row)
        np.testing.assert_allclose(credited.advantages[span], reward - batch.values[span].mean(), rtol=1e-5)
        np.testing.assert_allclose(credited.returns[span], reward, atol=1e-6)
    assert metrics["credit/macro_action_length"] == pytest.approx(batch.action_tokens / 3)


def test_what_a_rule_reads_is_asked_for_by_the_method():
    def needs(**parameters):
        return build("credit", {"name": "macro_actions", **parameters}).needs

    assert needs() == {"values"}
    assert needs(termination="perplexity") == {"values", "reference_logprobs"}
    parsing = {"name": "parsing", "parser": f"{__name__}:parse"}
    assert needs(termination=parsing, estimator={"name": "grpo"}) == {"token_ends"}


def test_parsing_cuts_the_sampled_tokens_at_constituents_of_the_text_they_spell(batch, tokenizer):
    rule = {"name": "parsing", "parser": f"{__name__}:parse", "max_tokens": 20}
    credited, metrics = assigned(batch, {"name": "macro_actions", "termination": rule})
    assert metrics["credit/parsing_fallback_share"] == 0
    pieces = []
    for row in range(len(batch)):
        span = batch.response_slice(row)
        ids, segments = batch.sequence(row)[2:], credited.segment_ids[span]
        pieces.append(
            [tokenizer.decode(ids[segments == s], skip_special_tokens=True) for s in range(segments.max() + 1)]
        )
    # "It is 42." takes fewer than 20 tokens, "The cat sat." too; a single word joins what stands before it.
    assert pieces == [["The cat sat. ", "It is 42."], ["Non!"], ["naïve café"]]
    assert ["".join(row) for row in pieces] == TEXTS


ASKED = []


def parse_and_keep(sentence):
    ASKED.append(sentence)
    return sentence.split()


def test_parsing_reads_the_turns_of_an_episode_without_what_its_environment_said(tokenizer):
    ASKED.clear()
    spoken = [("go up", 0), ("<|end|>", 0), ("<|user|>##.#<|end|><|assistant|>", -1), ("go on", 1), ("<|end|>", 1)]
    pieces = [(tokenizer(text, add_special_tokens=False)["input_ids"], turn) for text, turn in spoken]
    ids = np.array([1, 2] + [token for part, _ in pieces for token in part], np.int32)
    turns = np.array([turn for part, turn in pieces for _ in part], np.int32)
    row = Trajectory(
        "p", 0, 0, ids, 2, turns >= 0, turns, np.zeros(len(turns), np.float32), 0, "stop", "go up##.#go on"
    )
    zeros = np.zeros(len(turns), np.float32)
    packed = replace(
        Batch.from_trajectories([row]), rewards=np.ones(1), sample_mask=np.ones(1, bool), values=zeros,
        bootstrap_values=np.zeros(1, np.float32), minibatch_ids=np.zeros(1, np.int32),
    )  # fmt: skip
    rule = {"name": "parsing", "parser": f"{__name__}:parse_and_keep", "max_tokens": 20}
    credited, metrics = assigned(packed, {"name": "macro_actions", "termination": rule})
    assert ASKED == ["go up", "go on"]
    assert metrics["credit/parsing_fallback_share"] == 0
    np.testing.assert_array_equal(credited.segment_ids, turns)  # a turn is a constituent small enough
