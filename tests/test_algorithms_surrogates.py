"""Surrogates: values, gradients and clip fractions of released code, and what must hold for every one of them."""

import json
import math
from pathlib import Path

import pytest
import torch

from apportion.algorithms.correction import ImportanceCorrection
from apportion.algorithms.interface import SurrogateInput
from apportion.algorithms.reductions import ConstantNorm, SequenceMean, SequenceSum, TokenMean
from apportion.algorithms.surrogates import Cispo, Gspo, PpoClip, Reinforce, value_losses

GOLDEN = json.loads((Path(__file__).parent / "golden" / "baselines.json").read_text())
ALL_SURROGATES = [
    PpoClip(),
    PpoClip(dual_clip=3.0),
    PpoClip(ratio="turn"),
    PpoClip(ratio="macro"),
    PpoClip(ratio="sequence"),
    Gspo(clip_low=0.2, clip_high=0.2),
    Gspo(clip_low=0.2, clip_high=0.2, form="sequence"),
    Cispo(),
    Reinforce(),
]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def golden_input(case):
    inputs = GOLDEN[case]["inputs"]
    mask_BT = tensor(inputs["mask"]).bool()
    advantages = tensor(inputs["advantages"])
    return SurrogateInput(
        policy_logprobs_BT=tensor(inputs["new_logprobs"]).requires_grad_(),
        old_logprobs_BT=tensor(inputs["old_logprobs"]),
        advantages_BT=advantages if advantages.ndim == 2 else advantages[:, None].expand(mask_BT.shape),
        mask_BT=mask_BT,
    )


def make_input(policy, old, advantages, mask=None, turns=None, segments=None):
    policy_BT = tensor(policy).requires_grad_()
    return SurrogateInput(
        policy_BT,
        tensor(old),
        tensor(advantages),
        torch.ones(policy_BT.shape, dtype=torch.bool) if mask is None else torch.tensor(mask),
        None if turns is None else torch.tensor(turns),
        None if segments is None else torch.tensor(segments),
    )


def random_input(seed=0, rows=4, width=6, drift=0.3):
    generator = torch.Generator().manual_seed(seed)
    old_BT = -torch.rand(rows, width, generator=generator, dtype=torch.float64)
    policy_BT = old_BT + drift * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    mask_BT = torch.rand(rows, width, generator=generator) > 0.3
    ids_BT = torch.where(mask_BT, torch.arange(width).expand(rows, width) // 2, -1)
    advantages_BT = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return SurrogateInput(policy_BT.requires_grad_(), old_BT, advantages_BT, mask_BT, ids_BT, ids_BT)


@pytest.mark.parametrize(
    ("case", "surrogate", "reduction", "factor"),
    [
        ("verl_dapo_clip_higher_token_mean", PpoClip(0.2, 0.28, dual_clip=10.0), TokenMean(), 1),
        ("verl_grpo_seq_mean_token_mean", PpoClip(dual_clip=3.0), SequenceMean(), 1),
        # verl divides by the length alone, we by trajectories as well
        ("verl_drgrpo_seq_mean_token_sum_norm", PpoClip(dual_clip=3.0), ConstantNorm(6), 4),
        ("verl_gspo", Gspo(), SequenceMean(), 1),
        ("verl_cispo", Cispo(), TokenMean(), 1),
        ("openrlhf_ppo_token", PpoClip(), TokenMean(), 1),
        ("openrlhf_gspo", Gspo(0.2, 0.2, form="sequence"), SequenceMean(), 1),
        ("openrlhf_dual_clip", PpoClip(dual_clip=3.0), TokenMean(), 1),
        ("trl_grpo_token", PpoClip(), SequenceMean(), 1),
        ("trl_bnpo_token", PpoClip(), TokenMean(), 1),
        ("trl_dapo_token", PpoClip(), TokenMean(), 1),
        ("trl_cispo_token", Cispo(clip_low=None, clip_high=4.0), TokenMean(), 1),
        ("trl_grpo_sequence", Gspo(0.05, 0.05, form="sequence"), SequenceMean(), 1),
    ],
)
def test_loss_and_gradient_are_those_of_released_code(case, surrogate, reduction, factor):
    batch, expected = golden_input(case), GOLDEN[case]["outputs"]
    loss = factor * (reduction(batch.mask_BT) * surrogate(batch).losses_BT).sum()
    loss.backward()
    # verl adds 1e-8 to its denominators, TRL works in float32 where it clamps
    assert loss.item() == pytest.approx(expected["loss"], rel=2e-8, abs=1e-9)
    torch.testing.assert_close(batch.policy_logprobs_BT.grad, tensor(expected["grad"]), rtol=2e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("case", "surrogate"),
    [
        ("verl_dapo_clip_higher_token_mean", PpoClip(0.2, 0.28, dual_clip=10.0)),
        ("verl_grpo_seq_mean_token_mean", PpoClip(dual_clip=3.0)),
        ("verl_gspo", Gspo()),
        ("verl_cispo", Cispo()),
    ],
)
def test_clip_fractions_are_those_of_verl(case, surrogate):
    batch, metrics = golden_input(case), GOLDEN[case]["outputs"]["metrics"]
    indicators = surrogate(batch).indicators
    tokens = batch.mask_BT.sum()
    assert (indicators["clip_fraction"].sum() / tokens).item() == pytest.approx(metrics["actor/pg_clipfrac"], rel=1e-8)
    if "dual_clip_fraction" in indicators:
        lower = (indicators["dual_clip_fraction"].sum() / tokens).item()
        assert lower == pytest.approx(metrics["actor/pg_clipfrac_lower"], rel=1e-8)


@pytest.mark.parametrize(
    ("case", "correction"),
    [
        ("openrlhf_is_icepop", ImportanceCorrection(method="mask", level="token", cap=2.0, floor=0.5)),
        ("openrlhf_is_seq-mask-tis", ImportanceCorrection(method="mask", level="geometric", cap=2.0, floor=0.5)),
    ],
)
def test_corrected_loss_and_gradient_are_those_of_openrlhf(case, correction):
    batch, golden = golden_input(case), GOLDEN[case]
    weights_BT = correction(batch.old_logprobs_BT, tensor(golden["inputs"]["rollout_logprobs"]), batch.mask_BT)
    loss = (TokenMean()(batch.mask_BT) * weights_BT * PpoClip()(batch).losses_BT).sum()
    loss.backward()
    assert loss.item() == pytest.approx(golden["outputs"]["loss"], rel=1e-9)
    torch.testing.assert_close(batch.policy_logprobs_BT.grad, tensor(golden["outputs"]["grad"]), rtol=1e-9, atol=1e-12)


def test_loss_with_truncated_weights_is_that_of_verl():
    case = GOLDEN["verl_ppo_with_tis"]
    batch = golden_input("verl_ppo_with_tis")
    weights_BT = TokenMean()(batch.mask_BT) * tensor(case["inputs"]["is_weights"])
    loss = (weights_BT * PpoClip(dual_clip=3.0)(batch).losses_BT).sum()
    loss.backward()
    assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=2e-8)
    torch.testing.assert_close(batch.policy_logprobs_BT.grad, tensor(case["outputs"]["grad"]), rtol=2e-8, atol=1e-9)


def test_turn_ratio_is_the_geometric_mean_over_the_turns_action_tokens():
    case = GOLDEN["stppo_turn_ratio"]
    turns = torch.tensor([case["inputs"]["turn_id"]])
    logratio = tensor([case["inputs"]["logratio"]])
    batch = SurrogateInput(logratio, torch.zeros_like(logratio), torch.ones_like(logratio), turns >= 0, turns)
    ratio_BT = PpoClip(ratio="turn")(batch).indicators["ratio"]
    torch.testing.assert_close(ratio_BT, tensor([case["outputs"]["turn_ratio_per_token"]]), rtol=1e-6, atol=1e-6)


def test_macro_ratio_is_the_product_over_the_macro_action_and_its_loss_counts_once():
    batch = make_input([[0.1, 0.0, -0.5]], [[0.0, 0.0, 0.0]], [[2.0, 2.0, -1.0]], segments=[[0, 0, 1]])
    output = PpoClip(clip_low=0.9, clip_high=9.0, ratio="macro")(batch)
    torch.testing.assert_close(output.indicators["ratio"], tensor([[0.1, 0.1, -0.5]]).exp())
    # two tokens of the first macro action share its -2 * rho; the second has one token
    expected = -2 * math.exp(0.1) + math.exp(-0.5)
    assert output.losses_BT.sum().item() == pytest.approx(expected, rel=1e-12)


def test_macro_ratio_of_one_token_segments_is_the_token_ratio_to_the_last_bit():
    batch = random_input()
    singles_BT = torch.where(batch.mask_BT, torch.arange(6).expand(4, 6), -1)
    macro = SurrogateInput(
        batch.policy_logprobs_BT, batch.old_logprobs_BT, batch.advantages_BT, batch.mask_BT, None, singles_BT
    )
    assert torch.equal(PpoClip(ratio="macro")(macro).losses_BT, PpoClip()(batch).losses_BT)


def test_sequence_ratio_with_a_sequence_sum_is_the_mean_over_responses_of_the_clipped_objective():
    batch = make_input(
        [[0.1, 0.2], [-0.4, 7.0]], [[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [-2.0, -2.0]], [[True, True], [True, False]]
    )
    loss = (SequenceSum()(batch.mask_BT) * PpoClip(ratio="sequence")(batch).losses_BT).sum()
    # row 1: rho = e^0.3 is clipped to 1.2; row 2: rho = e^-0.4 = 0.67 is clipped to 0.8, which costs more
    assert loss.item() == pytest.approx((-1.2 + 2 * 0.8) / 2, rel=1e-12)


@pytest.mark.parametrize("surrogate", ALL_SURROGATES)
def test_on_policy_every_surrogate_has_the_policy_gradient(surrogate):
    old = [[-0.5, -1.0, -2.0, -0.1], [-0.3, -0.2, -0.9, -0.4]]
    mask = [[True, True, False, True], [True, True, True, True]]
    units = [[0, 0, -1, 1], [0, 1, 1, 1]]
    advantages = [[2.0] * 4, [-1.0] * 4]
    batch = make_input(old, old, advantages, mask, units, units)
    surrogate(batch).losses_BT.sum().backward()
    expected = torch.where(torch.tensor(mask), -tensor(advantages), 0)
    torch.testing.assert_close(batch.policy_logprobs_BT.grad, expected, rtol=1e-12, atol=1e-12)


def test_gspo_forms_agree_where_a_response_has_one_advantage():
    first, second = random_input(), random_input()
    for batch in (first, second):
        batch.advantages_BT = batch.advantages_BT[:, :1].expand(4, 6)
    token = Gspo(0.1, 0.1, form="token")(first).losses_BT
    sequence = Gspo(0.1, 0.1, form="sequence")(second).losses_BT
    weights_BT = SequenceMean()(first.mask_BT)
    (weights_BT * token).sum().backward()
    (weights_BT * sequence).sum().backward()
    torch.testing.assert_close(token, sequence)
    torch.testing.assert_close(first.policy_logprobs_BT.grad, second.policy_logprobs_BT.grad)


def test_cispo_keeps_a_gradient_where_ppo_clips_it_away():
    ppo, cispo = (make_input([[1.0]], [[0.0]], [[1.0]]) for _ in range(2))
    PpoClip()(ppo).losses_BT.sum().backward()
    Cispo()(cispo).losses_BT.sum().backward()
    assert ppo.policy_logprobs_BT.grad.item() == 0.0
    assert cispo.policy_logprobs_BT.grad.item() == pytest.approx(-1.2)


def test_dual_clip_bounds_what_a_negative_advantage_costs():
    batch = make_input([[3.0]], [[0.0]], [[-1.0]])
    output = PpoClip(dual_clip=3.0)(batch)
    assert output.losses_BT.tolist() == [[3.0]]
    assert output.indicators["dual_clip_fraction"].tolist() == [[1.0]]


def test_approx_kl_is_zero_on_policy_and_k3_elsewhere():
    batch = make_input([[0.5, -1.0]], [[0.0, -1.0]], [[1.0, 1.0]])
    approx_kl = PpoClip()(batch).indicators["approx_kl"]
    torch.testing.assert_close(approx_kl, tensor([[0.1487212707001282, 0.0]]))


@pytest.mark.parametrize("surrogate", ALL_SURROGATES)
def test_a_huge_log_ratio_stays_finite(surrogate):
    units = [[0, 0]]
    batch = make_input([[0.0, -900.0]], [[-900.0, 0.0]], [[-1.0, -1.0]], turns=units, segments=units)
    losses_BT = surrogate(batch).losses_BT
    losses_BT.sum().backward()
    assert losses_BT.isfinite().all()
    assert batch.policy_logprobs_BT.grad.isfinite().all()


@pytest.mark.parametrize("surrogate", ALL_SURROGATES)
def test_what_stands_outside_the_mask_is_never_read(surrogate):
    clean, dirty = random_input(), random_input()
    outside_BT = ~dirty.mask_BT
    with torch.no_grad():
        for field in (dirty.policy_logprobs_BT, dirty.old_logprobs_BT, dirty.advantages_BT):
            field[outside_BT] = float("nan")
    expected, got = surrogate(clean), surrogate(dirty)
    expected.losses_BT.sum().backward()
    got.losses_BT.sum().backward()
    assert torch.equal(got.losses_BT, expected.losses_BT)
    assert torch.equal(dirty.policy_logprobs_BT.grad, clean.policy_logprobs_BT.grad)
    assert (got.losses_BT[outside_BT] == 0).all()
    for name, value in got.indicators.items():
        assert torch.equal(value, expected.indicators[name]), name


@pytest.mark.parametrize("surrogate", ALL_SURROGATES)
def test_padding_and_splitting_rows_changes_no_token(surrogate):
    batch = random_input()
    whole = surrogate(batch).losses_BT

    def part(rows, extra):
        def widen(x, fill):
            return torch.nn.functional.pad(x[rows], (0, extra), value=fill)

        ids = widen(batch.turn_ids_BT, -1)
        return SurrogateInput(
            widen(batch.policy_logprobs_BT, 0.0),
            widen(batch.old_logprobs_BT, 0.0),
            widen(batch.advantages_BT, 5.0),
            widen(batch.mask_BT, False),
            ids,
            ids,
        )

    parts = [surrogate(part(slice(0, 1), 3)).losses_BT[:, :6], surrogate(part(slice(1, 4), 1)).losses_BT[:, :6]]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("surrogate", ALL_SURROGATES)
def test_a_row_without_action_tokens_has_loss_zero_and_no_gradient(surrogate):
    batch = make_input([[-1.0, -2.0]], [[-3.0, -1.0]], [[1.0, 1.0]], [[False, False]], [[-1, -1]], [[-1, -1]])
    losses_BT = surrogate(batch).losses_BT
    losses_BT.sum().backward()
    assert losses_BT.tolist() == [[0.0, 0.0]]
    assert batch.policy_logprobs_BT.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(("ratio", "field"), [("turn", "turn_ids"), ("macro", "segment_ids")])
def test_a_pooled_ratio_without_ids_is_an_error_that_names_them(ratio, field):
    with pytest.raises(ValueError, match=f"{field}: got none, expected one id a token"):
        PpoClip(ratio=ratio)(make_input([[0.0]], [[0.0]], [[1.0]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PpoClip(clip_low=1.5), "clip_low: got 1.5, expected 0 to 1"),
        (lambda: PpoClip(clip_high=-0.1), "clip_high: got -0.1, expected at least 0"),
        (lambda: PpoClip(dual_clip=1.0), "dual_clip: got 1.0, expected above 1"),
        (lambda: PpoClip(ratio="word"), "ratio: got 'word', expected one of token, turn, macro, sequence"),
        (lambda: Gspo(form="both"), "form: got 'both', expected token or sequence"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_value_loss_takes_the_worse_of_the_clipped_and_the_plain_error():
    mask_BT = torch.tensor([[True, True, True, False]])
    values_BT = tensor([[1.0, 0.3, 2.0, float("nan")]])
    output = value_losses(values_BT, tensor([[0.0, 0.2, 0.0, 0.0]]), tensor([[1.0, 1.0, 1.0, 0.0]]), mask_BT, clip=0.2)
    # 0.5 * max(0, 0.8^2), 0.5 * 0.7^2, 0.5 * max(1, 0.8^2)
    torch.testing.assert_close(output.losses_BT, tensor([[0.32, 0.245, 0.5, 0.0]]))
    assert output.indicators["clip_fraction"].tolist() == [[1.0, 0.0, 0.0, 0.0]]
    unclipped = value_losses(values_BT, values_BT, tensor([[1.0, 1.0, 1.0, 0.0]]), mask_BT, clip=None)
    torch.testing.assert_close(unclipped.losses_BT, tensor([[0.0, 0.245, 0.5, 0.0]]))
