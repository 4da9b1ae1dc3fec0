"""Losses of the preference stages: values and gradients worked out by hand, and what must hold however a step is cut."""

import math

import pytest
import torch

from apportion.algorithms.preference import Dpo, PairInput, RewardModel, Sft, share_correct
from apportion.algorithms.reductions import SequenceMean, TokenMean
from apportion.conf.preference_schema import DPO_LOSSES


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def pairs(chosen, rejected, reference=((0.0, 0.0), (0.0, 0.0)), lengths=((1, 1), (1, 1)), margins=None):
    return PairInput(
        t(*chosen).requires_grad_(),
        t(*rejected).requires_grad_(),
        t(*lengths[0]),
        t(*lengths[1]),
        t(*reference[0]),
        t(*reference[1]),
        None if margins is None else t(*margins),
    )


TWO = {
    "chosen": (-10.0, -4.0),
    "rejected": (-12.0, -9.0),
    "reference": ((-11.0, -6.0), (-11.0, -8.0)),
}  # log-ratios: chosen 1 and 2, rejected -1 and -1, so h = 2 and 3


def test_sft_is_the_negative_log_likelihood_and_its_reduction_decides_what_long_answers_weigh():
    logprobs = t(-1.0, -3.0, -2.0).requires_grad_()
    losses = Sft()(logprobs)
    assert losses.tolist() == [1.0, 3.0, 2.0]
    mask = torch.tensor([[True, True], [True, False]])
    tokens, sequences = TokenMean()(mask)[mask], SequenceMean()(mask)[mask]
    assert (losses * tokens).sum().item() == pytest.approx(2.0)
    assert (losses * sequences).sum().item() == pytest.approx((1 + 3) / 2 / 2 + 2 / 2)
    (losses * sequences).sum().backward()
    assert logprobs.grad.tolist() == [-0.25, -0.25, -0.5]


def test_dpo_is_minus_log_sigmoid_of_beta_times_the_difference_of_log_ratios():
    given = pairs(**TWO)
    out = Dpo(beta=0.5)(given)
    assert out.losses_P.tolist() == pytest.approx([-math.log(sigmoid(1.0)), -math.log(sigmoid(1.5))])
    assert out.margins_P.tolist() == [1.0, 1.5]
    out.losses_P.sum().backward()
    expected = [-0.5 * (1 - sigmoid(1.0)), -0.5 * (1 - sigmoid(1.5))]
    assert given.chosen_P.grad.tolist() == pytest.approx(expected)
    assert given.rejected_P.grad.tolist() == pytest.approx([-g for g in expected])


def test_dpo_of_the_reference_itself_is_log_two_with_a_gradient():
    given = pairs((-3.0, -5.0), (-4.0, -2.0), ((-3.0, -5.0), (-4.0, -2.0)))
    out = Dpo(beta=0.1)(given)
    assert out.losses_P.tolist() == pytest.approx([math.log(2)] * 2)
    assert out.margins_P.tolist() == [0.0, 0.0]
    out.losses_P.sum().backward()
    assert given.chosen_P.grad.tolist() == pytest.approx([-0.05, -0.05])


def test_label_smoothing_weighs_the_swapped_pair_too():
    out = Dpo(beta=0.5, label_smoothing=0.2)(pairs(**TWO))
    expected = [-0.8 * math.log(sigmoid(z)) - 0.2 * math.log(sigmoid(-z)) for z in (1.0, 1.5)]
    assert out.losses_P.tolist() == pytest.approx(expected)


def test_ipo_draws_the_difference_towards_one_over_two_beta():
    given = pairs(**TWO)
    out = Dpo(beta=0.25, kind="ipo")(given)
    assert out.losses_P.tolist() == [0.0, 1.0]  # 1 / (2 beta) = 2; h = 2 and 3
    assert out.margins_P.tolist() == [0.5, 0.75]
    out.losses_P.sum().backward()
    assert given.chosen_P.grad.tolist() == [0.0, 2.0]


def test_length_normalised_log_ratios_are_per_token():
    lengths = ((4, 2), (2, 5))
    out = Dpo(beta=2.0, length_normalized=True)(pairs(**TWO, lengths=lengths))
    z = [2 * (1 / 4 + 1 / 2), 2 * (2 / 2 + 1 / 5)]
    assert out.margins_P.tolist() == pytest.approx(z)
    assert out.losses_P.tolist() == pytest.approx([-math.log(sigmoid(v)) for v in z])


@pytest.mark.parametrize("options", [{}, {"kind": "ipo"}, {"label_smoothing": 0.1}, {"length_normalized": True}])
def test_reverse_is_the_loss_of_swapped_answers(options):
    lengths = ((4, 2), (2, 5))
    given = pairs(**TWO, lengths=lengths)
    swapped = pairs(
        TWO["rejected"], TWO["chosen"], (TWO["reference"][1], TWO["reference"][0]), (lengths[1], lengths[0])
    )
    forward, reverse = Dpo(beta=0.3, **options)(swapped), Dpo(beta=0.3, reverse=True, **options)(given)
    assert reverse.losses_P.tolist() == pytest.approx(forward.losses_P.tolist())
    assert reverse.margins_P.tolist() == pytest.approx(forward.margins_P.tolist())
    reverse.losses_P.sum().backward()
    forward.losses_P.sum().backward()
    assert given.chosen_P.grad.tolist() == pytest.approx(swapped.rejected_P.grad.tolist())


def test_a_reward_model_learns_differences_alone():
    given = pairs((1.0, 0.0), (0.0, 2.0))
    out = RewardModel()(given)
    assert out.losses_P.tolist() == pytest.approx([-math.log(sigmoid(1.0)), -math.log(sigmoid(-2.0))])
    assert out.margins_P.tolist() == [1.0, -2.0]
    shifted = RewardModel()(pairs((101.0, 100.0), (100.0, 102.0)))
    assert shifted.losses_P.tolist() == pytest.approx(out.losses_P.tolist())
    out.losses_P.sum().backward()
    assert given.chosen_P.grad.tolist() == pytest.approx([-(1 - sigmoid(1.0)), -(1 - sigmoid(-2.0))])


def test_wanted_margins_add_up_and_do_not_move_the_reported_margin():
    out = RewardModel(margin=0.5)(pairs((1.0, 3.0), (0.0, 0.0), margins=(0.5, 1.5)))
    assert out.losses_P.tolist() == pytest.approx([-math.log(sigmoid(0.0)), -math.log(sigmoid(1.0))])
    assert out.margins_P.tolist() == [1.0, 3.0]


def test_centring_adds_the_square_of_the_sum():
    plain, centred = (RewardModel(center=c)(pairs((1.0, 3.0), (0.0, -3.0))) for c in (0.0, 0.1))
    assert (centred.losses_P - plain.losses_P).tolist() == pytest.approx([0.1, 0.0])


@pytest.mark.parametrize("loss", [Dpo(0.3), Dpo(0.3, "ipo"), Dpo(0.3, length_normalized=True), RewardModel(0.1, 0.2)])
def test_two_shards_recombine_to_the_whole_step(loss):
    whole = pairs(**TWO, lengths=((4, 2), (2, 5)))
    (loss(whole).losses_P * 0.5).sum().backward()
    grads = []
    for i in (0, 1):
        part = PairInput(*(getattr(whole, n)[i : i + 1].detach().requires_grad_() for n in list(vars(whole))[:6]))
        (loss(part).losses_P * 0.5).sum().backward()
        grads += part.chosen_P.grad.tolist()
    assert grads == pytest.approx(whole.chosen_P.grad.tolist())


def test_extreme_log_ratios_stay_finite():
    given = pairs((-1e4, 1e4), (1e4, -1e4))
    out = Dpo(beta=1.0, label_smoothing=0.1)(given)
    out.losses_P.sum().backward()
    assert torch.isfinite(out.losses_P).all() and torch.isfinite(given.chosen_P.grad).all()
    assert out.losses_P.tolist() == pytest.approx([0.9 * 2e4, 0.1 * 2e4])


def test_a_tie_is_half_right():
    assert share_correct(t(1.0, 0.0, -2.0)).tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Dpo(beta=0), "beta: got 0, expected above 0"),
        (lambda: Dpo(kind="hinge"), "kind: got 'hinge', expected one of sigmoid, ipo"),
        (lambda: Dpo(label_smoothing=0.5), "label_smoothing: got 0.5, expected 0 to below 0.5"),
        (
            lambda: Dpo(kind="ipo", label_smoothing=0.1),
            "label_smoothing: got 0.1 with kind=ipo, expected kind=sigmoid",
        ),
        (lambda: RewardModel(margin=-1), "margin: got -1, expected at least 0"),
        (
            lambda: Dpo()(PairInput(t(1.0), t(0.0), t(1.0), t(1.0))),
            "reference: got none, expected the reference's log-probs of both answers",
        ),
    ],
)
def test_what_cannot_be_says_got_and_expected(make, line):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == line


def test_the_configuration_names_every_kind():
    from apportion.algorithms.preference import KINDS

    assert DPO_LOSSES == KINDS
