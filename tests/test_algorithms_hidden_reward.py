import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from apportion.algorithms.credit.grpo import Grpo
from apportion.algorithms.credit.hidden_reward import HiddenReward, correct_responses, thresholds
from apportion.algorithms.influence import (
    GroupStates,
    correct_token_weights,
    group_influence,
    group_vocabulary,
    influence_matrix,
    influence_scores,
    probabilities_on,
)
from apportion.algorithms.interface import CreditInput, SurrogateInput
from apportion.algorithms.registry import build
from apportion.algorithms.statistics import at_last_token
from apportion.algorithms.surrogates import Gspo
from apportion.conf import schema

CASES = json.loads((Path(__file__).parent / "golden/thr.json").read_text())["derived"]
NEVER = float("-inf")


# The goldens divide by the population's deviation alone; here it keeps the shipped form with an eps that leaves no trace.
BASE = {"name": "grpo", "normalize": "population", "eps": 1e-12}


def flat(rows, dtype=torch.float64):
    return torch.cat([torch.tensor(row, dtype=dtype) for row in rows])


def golden_states(inputs):
    """States over the whole vocabulary, as the goldens are."""
    return GroupStates(
        flat(inputs["hidden"]), flat(inputs["logits"]).softmax(-1), flat(inputs["token_ids"], torch.int64)
    )


def golden_group(inputs):
    lengths = torch.tensor([len(row) for row in inputs["token_ids"]])
    return lengths, torch.tensor(inputs["rewards"], dtype=torch.float64)


def pad(values_N, lengths, fill=float("nan")):
    out = torch.full((len(lengths), int(lengths.max())), fill, dtype=values_N.dtype)
    out[torch.arange(out.shape[1])[None] < lengths[:, None]] = values_N
    return out


def make_batch(influences_BT, lengths, rewards, groups=None):
    mask = torch.arange(influences_BT.shape[1])[None] < lengths[:, None]
    return CreditInput(
        mask_BT=mask,
        group_ids_B=torch.zeros(len(lengths), dtype=torch.int64) if groups is None else torch.tensor(groups),
        rewards_B=rewards,
        token_rewards_BT=at_last_token(rewards, mask),
        turn_ids_BT=torch.where(mask, 0, -1),
        terminated_B=torch.ones(len(lengths), dtype=torch.bool),
        influences_BT=influences_BT,
    )


def from_scores(rows, rewards, groups=None):
    lengths = torch.tensor([len(row) for row in rows])
    values = flat(rows) if int(lengths.sum()) else torch.zeros(0, dtype=torch.float64)
    return make_batch(pad(values, lengths), lengths, torch.tensor(rewards, dtype=torch.float64), groups)


def golden_batch(case, variant):
    lengths, rewards = golden_group(case["inputs"])
    scores = group_influence(golden_states(case["inputs"]), lengths, rewards == 1, variant)
    return make_batch(pad(scores, lengths), lengths, rewards)


def assert_rows(got_BT, mask_BT, expected, rel=1e-9):
    for row, keep, values in zip(got_BT, mask_BT, expected, strict=True):
        assert row[keep].tolist() == pytest.approx(values, rel=rel, abs=1e-12)


golden = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])


@golden
def test_scores_by_the_matrix_form_are_the_golden_ones(case):
    lengths, rewards = golden_group(case["inputs"])
    states = golden_states(case["inputs"])
    signed = group_influence(states, lengths, rewards == 1) * (2 * rewards - 1).repeat_interleave(lengths)
    torch.testing.assert_close(signed, flat(case["outputs"]["thr"]), rtol=1e-9, atol=1e-12)
    unweighted = group_influence(states, lengths, rewards == 1, "nthr")
    torch.testing.assert_close(unweighted, flat(case["outputs"]["nthr_scores_s"]), rtol=1e-9, atol=1e-12)
    if "thr_M" in case["outputs"]:
        matrix = influence_matrix(states, correct_token_weights(lengths, rewards == 1))
        torch.testing.assert_close(matrix, torch.tensor(case["outputs"]["thr_M"], dtype=torch.float64))


@golden
def test_scores_are_the_double_sum_of_the_definition(case):
    inputs = case["inputs"]
    lengths, rewards = golden_group(inputs)
    states = golden_states(inputs)
    errors = states.errors(slice(None))
    weights = correct_token_weights(lengths, rewards == 1)
    expected = ((errors @ errors.T) * (states.hidden_ND @ states.hidden_ND.T)).T @ weights
    torch.testing.assert_close(group_influence(states, lengths, rewards == 1), expected, rtol=1e-9, atol=1e-12)


@golden
@pytest.mark.parametrize("p", [0.0, 0.1, -0.1])
def test_thr_advantages_are_the_golden_ones(case, p):
    batch = golden_batch(case, "thr")
    method = HiddenReward(base=BASE, p=p)
    assert_rows(method(batch).advantages_BT, batch.mask_BT, case["outputs"]["thr_token_adv"][str(p)])
    correct_B = batch.rewards_B == 1
    tau_B = thresholds(batch.influences_BT, batch.mask_BT, correct_B, batch.group_ids_B, beta=1.0)
    assert tau_B.tolist() == pytest.approx([case["outputs"]["thr_tau_same_normalisation"]] * len(tau_B), rel=1e-9)


@golden
def test_nthr_advantages_are_the_golden_ones(case):
    batch = golden_batch(case, "nthr")
    credit = HiddenReward(base=BASE, variant="nthr")(batch)
    if case["outputs"]["nthr_eta"] == 0:  # as many right as wrong: eta is 0, and here no score is above tau
        assert max(max(row) for row in case["outputs"]["nthr_scores_s"][2:]) < case["outputs"]["nthr_tau"]
    assert_rows(credit.advantages_BT, batch.mask_BT, case["outputs"]["nthr_token_adv"])
    tau_B = thresholds(batch.influences_BT, batch.mask_BT, batch.rewards_B == 1, batch.group_ids_B, beta=1.0)
    assert tau_B.tolist() == pytest.approx([case["outputs"]["nthr_tau"]] * len(tau_B), rel=1e-9)


@golden
@pytest.mark.parametrize("recipe", ["thr", "thr_gspo", "nthr"])
def test_the_recipes_give_the_golden_advantages_up_to_their_eps(case, recipe):
    file = Path(schema.__file__).parent / "algorithm" / f"{recipe}.yaml"
    method = build("credit", yaml.safe_load(file.read_text())["credit"])
    batch = golden_batch(case, method.variant)
    expected = case["outputs"]["nthr_token_adv" if recipe == "nthr" else "thr_token_adv"]
    assert_rows(method(batch).advantages_BT, batch.mask_BT, expected if recipe == "nthr" else expected["0.1"], rel=5e-6)


@golden
def test_the_groups_own_vocabulary_is_a_slice_of_the_whole_without_renormalising(case):
    inputs = case["inputs"]
    lengths, rewards = golden_group(inputs)
    whole = golden_states(inputs)
    vocabulary, columns = group_vocabulary(whole.columns_N)
    assert vocabulary.tolist() == sorted({token for row in inputs["token_ids"] for token in row})
    cut = GroupStates(whole.hidden_ND, whole.probabilities[:, vocabulary], columns)
    got = group_influence(cut, lengths, rewards == 1)
    errors = whole.errors(slice(None))[:, vocabulary]
    weights = correct_token_weights(lengths, rewards == 1)
    expected = ((errors @ errors.T) * (whole.hidden_ND @ whole.hidden_ND.T)).T @ weights
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def random_group(lengths=(5, 0, 7, 3), vocabulary=50, hidden=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    states = torch.randn(tokens, hidden, generator=generator, dtype=dtype)
    head = torch.randn(vocabulary, hidden, generator=generator, dtype=dtype)
    ids = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return states, head, ids, torch.tensor(lengths), torch.tensor([True, True, False, True])


def test_probabilities_made_from_the_heads_rows_are_those_of_the_full_softmax():
    hidden, head, ids, lengths, correct = random_group()
    for temperature in (1.0, 0.7):
        logits = hidden @ head.T
        vocabulary, columns = group_vocabulary(ids)
        rows = probabilities_on(head[vocabulary], hidden, (logits / temperature).logsumexp(-1), temperature)
        full = (logits / temperature).softmax(-1)[:, vocabulary]
        torch.testing.assert_close(rows(slice(2, 9)), full[2:9])
        made = GroupStates(hidden, rows, columns, width=len(vocabulary))
        expected = group_influence(GroupStates(hidden, full, columns), lengths, correct)
        torch.testing.assert_close(group_influence(made, lengths, correct, chunk_tokens=4), expected)


def test_splitting_a_group_over_ranks_and_chunks_changes_nothing():
    hidden, head, ids, lengths, correct = random_group(dtype=torch.float64)
    vocabulary, columns = group_vocabulary(ids)
    probabilities = (hidden @ head.T).softmax(-1)[:, vocabulary]
    whole = group_influence(GroupStates(hidden, probabilities, columns), lengths, correct)
    shares = [(slice(0, 5), slice(0, 2)), (slice(5, 15), slice(2, 4))]
    parts = [GroupStates(hidden[tokens], probabilities[tokens], columns[tokens]) for tokens, _ in shares]
    matrices = [
        influence_matrix(part, correct_token_weights(lengths[rows], correct[rows]), chunk_tokens=3)
        for part, (_, rows) in zip(parts, shares, strict=True)
    ]
    total = matrices[0] + matrices[1]
    scores = torch.cat([influence_scores(part, total, chunk_tokens=3) for part in parts])
    torch.testing.assert_close(scores, whole, rtol=1e-12, atol=1e-12)
    hooked = [
        group_influence(part, lengths[rows], correct[rows], sum_over_ranks=lambda _: total)
        for part, (_, rows) in zip(parts, shares, strict=True)
    ]
    torch.testing.assert_close(torch.cat(hooked), whole, rtol=1e-12, atol=1e-12)


def test_sums_are_kept_in_float32_where_states_are_half_precision():
    hidden, head, ids, lengths, correct = random_group()
    vocabulary, columns = group_vocabulary(ids)
    probabilities = (hidden @ head.T).softmax(-1)[:, vocabulary]
    half = GroupStates(hidden.bfloat16(), probabilities, columns)
    scores = group_influence(half, lengths, correct)
    assert scores.dtype == torch.float32
    exact = GroupStates(hidden.bfloat16().double(), probabilities.double(), columns)
    torch.testing.assert_close(scores.double(), group_influence(exact, lengths, correct), rtol=1e-4, atol=1e-4)


def test_permuting_a_group_permutes_its_scores():
    hidden, head, ids, lengths, correct = random_group(lengths=(4, 4, 4, 4), dtype=torch.float64)
    probabilities = (hidden @ head.T).softmax(-1)
    order = torch.tensor([2, 0, 3, 1])
    tokens = (order[:, None] * 4 + torch.arange(4)).flatten()
    straight = group_influence(GroupStates(hidden, probabilities, ids), lengths, correct)
    moved = group_influence(GroupStates(hidden[tokens], probabilities[tokens], ids[tokens]), lengths, correct[order])
    torch.testing.assert_close(moved, straight[tokens], rtol=1e-12, atol=1e-12)


def test_a_group_without_correct_responses_or_without_tokens_has_scores_of_zero():
    hidden, head, ids, lengths, correct = random_group()
    states = GroupStates(hidden, (hidden @ head.T).softmax(-1), ids)
    assert not bool(group_influence(states, lengths, torch.zeros_like(correct)).any())
    empty = GroupStates(hidden[:0], torch.zeros(0, 3), ids[:0])
    assert group_influence(empty, torch.tensor([0, 0]), correct[:2]).shape == (0,)


@pytest.mark.parametrize("settings", [{"beta": NEVER}, {"tau": NEVER}, {"beta": NEVER, "mode": "mask", "p": 0.5}])
def test_without_lean_and_threshold_it_is_the_base_to_the_last_bit(settings):
    for case in CASES:
        batch = golden_batch(case, "thr")
        for base in ({"name": "grpo"}, {"name": "grpo", "normalize": "none"}, {"name": "rloo"}):
            credit = HiddenReward(base=base, **{"p": 0.0, **settings})(batch)
            assert torch.equal(credit.advantages_BT, build("credit", base)(batch).advantages_BT)


def test_p_above_zero_strengthens_what_supports_right_answers_and_p_below_zero_weakens_it():
    batch = from_scores([[2.0, -2.0], [3.0, -3.0]], [1, 0])
    plain = Grpo()(batch).advantages_BT
    lean = HiddenReward(base={"name": "grpo"}, p=0.5, beta=NEVER)(batch).advantages_BT / plain
    assert lean.flatten().tolist() == pytest.approx([1.5, 0.5, 0.5, 1.5])  # in wrong responses the sign turns round
    away = HiddenReward(base={"name": "grpo"}, p=-0.5, beta=NEVER)(batch).advantages_BT / plain
    assert away.flatten().tolist() == pytest.approx([0.5, 1.5, 1.5, 0.5])


def test_mask_mode_drops_minor_tokens_and_leaves_the_others_as_they_are():
    batch = from_scores([[1.0, 3.0], [1.5, -9.0]], [1, 0])  # tau is 2
    factors = HiddenReward(base=BASE, mode="mask", p=0.7).factors(batch)
    assert factors.tolist() == [[0.0, 1.0], [0.0, 1.0]]
    credit = HiddenReward(base=BASE, mode="mask")(batch)
    assert credit.metrics["credit/masked_share"] == 0.5
    assert credit.metrics["credit/groups"] == 1.0
    assert HiddenReward(base=BASE, mode="mask", beta=0.5).factors(batch).tolist() == [[0.0, 1.0], [1.0, 1.0]]
    assert HiddenReward(base=BASE, mode="mask", tau=5.0).factors(batch).tolist() == [[0.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("tau", [0.0, -1.0])
def test_a_threshold_of_zero_or_less_masks_nothing(tau):
    batch = from_scores([[0.0, 3.0], [0.0, -9.0]], [1, 0])
    assert HiddenReward(base=BASE, mode="mask", tau=tau).factors(batch).tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize(("eta", "factor"), [("imbalance", 0.5), ("success", 0.25), ("failure", 0.75)])
def test_nthr_weakens_wrong_tokens_that_look_right_by_eta(eta, factor):
    batch = from_scores([[1.0, 3.0], [2.5, 1.0], [9.0, 2.0], [-5.0, 0.0]], [1, 0, 0, 0])
    factors = HiddenReward(base=BASE, variant="nthr", eta=eta).factors(batch)
    assert factors.tolist() == [[1.0, 1.0], [factor, 1.0], [factor, 1.0], [1.0, 1.0]]


def test_a_group_whose_right_answers_have_no_token_is_left_as_it_is():
    batch = from_scores([[0.0, 0.0], []], [0.0, 1.0])
    for settings in ({"variant": "nthr", "eta": "success"}, {"variant": "thr", "p": 0.5}):
        assert HiddenReward(base=BASE, **settings).factors(batch)[0].tolist() == [1.0, 1.0]


def test_thresholds_belong_to_their_group_and_skip_correct_responses_without_tokens():
    batch = from_scores([[4.0], [1.0], [], [6.0, 2.0], [7.0]], [1, 0, 1, 1, 0], groups=[8, 8, 3, 3, 3])
    correct_B = batch.rewards_B == 1
    tau_B = thresholds(batch.influences_BT, batch.mask_BT, correct_B, batch.group_ids_B, beta=0.5)
    assert tau_B.tolist() == [2.0, 2.0, 2.0, 2.0, 2.0]
    tau_B = thresholds(batch.influences_BT, batch.mask_BT, correct_B & (batch.group_ids_B == 8), batch.group_ids_B, 0.5)
    assert tau_B.tolist() == [2.0, 2.0, NEVER, NEVER, NEVER]


def test_groups_with_one_kind_of_answer_are_left_as_they_are_and_grpo_gives_them_exactly_zero():
    batch = from_scores([[5.0, 0.1], [4.0], [3.0], [0.2]], [1, 1, 0, 0], groups=[0, 0, 1, 1])
    assert HiddenReward(base=BASE).factors(batch).tolist() == [[1.0, 1.0]] * 4
    assert not bool(HiddenReward(base={"name": "grpo"})(batch).advantages_BT.any())


def test_rewards_other_than_0_and_1_are_refused_unless_it_is_said_what_is_right():
    batch = from_scores([[2.0], [1.0], [3.0]], [0.9, 0.2, -0.5])
    with pytest.raises(ValueError, match=r"rewards: got 0\.9, expected 0 or 1; set correct_at"):
        HiddenReward(base=BASE)(batch)
    assert correct_responses(batch.rewards_B, 0.5).tolist() == [True, False, False]
    factors = HiddenReward(base=BASE, correct_at=0.5, p=0.5, beta=NEVER).factors(batch)
    assert factors.tolist() == [[1.5], [0.5], [0.5]]


def test_padding_permuting_and_other_groups_change_nothing_and_no_nan_appears():
    rows, rewards, groups = [[2.0, -1.0], [0.3], [], [1.0, 2.0, 3.0]], [1, 0, 0, 0], [1, 1, 1, 1]
    method = HiddenReward(base={"name": "grpo"})
    straight = method(from_scores(rows, rewards, groups)).advantages_BT
    order = [3, 1, 0, 2]
    moved = from_scores([*[rows[i] for i in order], [7.0] * 6], [*[rewards[i] for i in order], 1], [1, 1, 1, 1, 2])
    credit = method(moved)
    assert torch.equal(credit.advantages_BT[:4, :3], straight[order])
    assert bool(credit.advantages_BT.isfinite().all())
    assert not bool(credit.advantages_BT[~moved.mask_BT].any())


def test_single_tokens_and_responses_without_tokens_have_their_credit():
    for variant in ("thr", "nthr"):
        method = HiddenReward(base=BASE, variant=variant)
        single = method(from_scores([[2.0], [-3.0]], [1, 0])).advantages_BT
        assert single.flatten().tolist() == pytest.approx([0.0, -1.1] if variant == "thr" else [1.0, -1.0])
        assert method(from_scores([[], []], [1, 0])).advantages_BT.shape == (2, 0)


def test_any_credit_can_be_reweighted_and_its_returns_segments_and_needs_stay():
    batch = from_scores([[2.0, -1.0, 3.0], [1.0, 5.0]], [1, 0])
    batch = replace(batch, values_BT=torch.zeros(2, 3, dtype=torch.float64))
    base = {"name": "macro_actions", "n_gram": 2}
    method = HiddenReward(base=base, p=0.1)
    credit = method(batch)
    assert method.needs == {"values", "influences"}
    assert credit.segment_ids_BT.tolist() == [[0, 0, 1], [0, 0, -1]]
    assert credit.returns_BT is not None
    lifted = {"name": "macro_actions", "n_gram": 2, "estimator": {"name": "hidden_reward", "base": {"name": "grpo"}}}
    assert HiddenReward(base=lifted).needs == {"influences"}


def test_token_advantages_survive_in_the_token_form_of_gspo():
    batch = from_scores([[2.0, -2.0], [3.0, -3.0]], [1, 0])
    advantages = HiddenReward(base={"name": "grpo"}, p=0.5, beta=NEVER)(batch).advantages_BT
    logprobs = torch.full((2, 2), -1.0, dtype=torch.float64, requires_grad=True)
    loss = Gspo()(SurrogateInput(logprobs, logprobs.detach(), advantages, batch.mask_BT)).losses_BT
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)


def test_the_platforms_hook_scores_a_group_from_its_rewards():
    case = CASES[0]
    lengths, rewards = golden_group(case["inputs"])
    scores = HiddenReward(base=BASE).influence(golden_states(case["inputs"]), lengths, rewards)
    signed = scores * (2 * rewards - 1).repeat_interleave(lengths)
    torch.testing.assert_close(signed, flat(case["outputs"]["thr"]), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="expected 0 or 1"):
        HiddenReward(base=BASE).influence(golden_states(case["inputs"]), lengths, rewards / 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "hidden"}, "variant: got 'hidden'"),
        ({"mode": "drop"}, "mode: got 'drop'"),
        ({"eta": "p"}, "eta: got 'p'"),
        ({"p": 2.0}, "p: got 2.0"),
        ({"base": {"name": "grp"}}, "did you mean 'grpo'"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HiddenReward(**{"base": BASE, **settings})


def test_missing_influences_and_states_that_do_not_fit_are_refused():
    batch = replace(from_scores([[1.0], [2.0]], [1, 0]), influences_BT=None)
    with pytest.raises(ValueError, match="declare 'influences'"):
        HiddenReward(base=BASE)(batch)
    with pytest.raises(ValueError, match="columns: got 1 tokens for 2 hidden states"):
        GroupStates(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="width: got none"):
        GroupStates(torch.zeros(2, 3), lambda tokens: torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
    states = GroupStates(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got 2 states, expected 3"):
        group_influence(states, torch.tensor([3]), torch.tensor([True]))
