import json
from pathlib import Path

import pytest
import torch

from apportion.algorithms.credit.gae import Gae
from apportion.algorithms.credit.poad import Poad, turn_ends
from apportion.algorithms.interface import CreditInput

CASES = {
    case["name"]: case for case in json.loads((Path(__file__).parent / "golden/poad.json").read_text())["official"]
}
NAN = float("nan")


def make_batch(lengths, rewards, values, *, terminated=True, bootstrap=0.0, gap=1, repeats=1):
    """One row of turns with `gap` environment tokens (NaN in every signal) between them; rewards at turn ends."""
    mask, turns, token_rewards, token_values = [], [], [], []
    for turn, length in enumerate(lengths):
        mask += [True] * length + [False] * gap
        turns += [turn] * length + [-1] * gap
        token_rewards += [0.0] * (length - 1) + [rewards[turn]] * (length > 0) + [NAN] * gap
        token_values += [*values[turn][:length], *[NAN] * gap]
    return CreditInput(
        mask_BT=torch.tensor([mask] * repeats),
        group_ids_B=torch.zeros(repeats, dtype=torch.int64),
        rewards_B=torch.tensor([float(sum(rewards))] * repeats, dtype=torch.float64),
        token_rewards_BT=torch.tensor([token_rewards] * repeats, dtype=torch.float64),
        turn_ids_BT=torch.tensor([turns] * repeats),
        terminated_B=torch.tensor([terminated] * repeats),
        values_BT=torch.tensor([token_values] * repeats, dtype=torch.float64),
        bootstrap_values_B=torch.tensor([bootstrap] * repeats, dtype=torch.float64),
    )


def golden_rows(case):
    """The trajectories of a case: an episode that ends in the middle is a row of its own. (batch, first turn, end)."""
    inputs = case["inputs"]
    lengths = [sum(token != 0 for token in action) for action in inputs["action_tokens"]]
    start = 0
    for turn, goes_on in enumerate(inputs["next_masks"]):
        if not goes_on or turn == len(lengths) - 1:
            part = slice(start, turn + 1)
            batch = make_batch(
                lengths[part],
                inputs["env_rewards_per_action"][part],
                inputs["token_values"][part],
                terminated=not goes_on,
                bootstrap=inputs["bootstrap_value"],
            )
            yield batch, [(t, lengths[t]) for t in range(start, turn + 1)]
            start = turn + 1


TOKEN_CASES = [case for case in CASES.values() if "algo" in case["config"]]


@pytest.mark.parametrize("case", TOKEN_CASES, ids=lambda case: case["name"])
def test_released_numbers_are_reproduced(case):
    config = case["config"]
    gamma = config["gamma"]
    method = Poad(
        gamma=gamma,
        token_gamma=1.0 if config["algo"] == "POAD" else gamma,
        gae_lambda=config["gae_lambda"],
        next_value="last" if config["algo"] == "ARCHER" else "first",
    )
    seen = 0
    for batch, turns in golden_rows(case):
        credit = method(batch)
        for name, got in (("advantages", credit.advantages_BT), ("returns", credit.returns_BT)):
            expected = torch.cat([torch.tensor(case["outputs"][name][turn][:length]) for turn, length in turns])
            torch.testing.assert_close(got[batch.mask_BT].float(), expected, rtol=0, atol=1e-5)
            seen += len(expected)
    assert seen == 18


def test_action_level_reproduces_the_released_action_gae_on_every_token_of_an_action():
    case = CASES["twosome_action_gae"]
    inputs = case["inputs"]
    values = [[value, 50.0, 60.0] for value in inputs["values"]]  # an action has the value of its first token
    batch = make_batch([2, 1, 3], inputs["rewards"], values, terminated=False, bootstrap=inputs["bootstrap_value"])
    credit = Poad(level="action", gae_lambda=case["config"]["gae_lambda"], gamma=case["config"]["gamma"])(batch)
    sizes = torch.tensor([2, 1, 3])
    for name, got in (("advantages", credit.advantages_BT), ("returns", credit.returns_BT)):
        expected = torch.tensor(case["outputs"][name]).repeat_interleave(sizes)
        torch.testing.assert_close(got[batch.mask_BT].float(), expected, rtol=0, atol=1e-5)
    assert credit.segment_ids_BT[0].tolist() == [0, 0, -1, 1, -1, 2, 2, 2, -1]


def example(**more):
    return make_batch([3, 2, 4], [0.1, -0.1, 1.0], [[0.5, 0.4, 0.6], [0.3, 0.7], [0.2, 0.1, 0.8, 0.9]], **more)


def test_poad_with_gamma_one_is_ntpo_and_ntpo_is_gae_on_tokens_to_the_last_bit():
    batch = example()
    poad = Poad(gamma=1.0)(batch)
    assert torch.equal(poad.advantages_BT, Gae(gamma=1.0, gae_lambda=0.95, whiten="none")(batch).advantages_BT)
    assert torch.equal(poad.advantages_BT, Poad(gamma=1.0, token_gamma=1.0, gae_lambda=0.95)(batch).advantages_BT)
    for gamma in (1.0, 0.95):
        ntpo = Poad(gamma=gamma, token_gamma=gamma)(batch)
        plain = Gae(gamma=gamma, gae_lambda=0.95, whiten="none")(batch)
        assert torch.equal(ntpo.advantages_BT, plain.advantages_BT)
        assert torch.equal(ntpo.returns_BT, plain.returns_BT)
    assert not torch.equal(Poad(gamma=0.95)(batch).advantages_BT, ntpo.advantages_BT)


def test_actions_of_one_token_make_all_levels_one_method():
    batch = make_batch([1, 1, 1], [0.0, 1.0, 2.0], [[0.1], [0.2], [0.3]])
    token, action = Poad(gamma=0.9)(batch), Poad(gamma=0.9, level="action")(batch)
    ntpo = Poad(gamma=0.9, token_gamma=0.9)(batch)
    assert torch.equal(token.advantages_BT, action.advantages_BT)
    assert torch.equal(token.advantages_BT, ntpo.advantages_BT)


def test_with_lambda_one_every_token_of_an_action_has_the_actions_own_return():
    credit = Poad(gamma=0.5, gae_lambda=1.0)(example())
    returns = credit.returns_BT[0].tolist()
    assert returns[:3] == pytest.approx([0.1 + 0.5 * (-0.1 + 0.5)] * 3)
    assert returns[4:6] == pytest.approx([-0.1 + 0.5] * 2)
    assert returns[7:11] == pytest.approx([1.0] * 4)


def test_the_length_of_an_action_moves_the_naive_backup_and_not_the_decomposed_one():
    def first_return(length, **settings):
        batch = make_batch([length, 1], [0.0, 1.0], [[0.0] * length, [0.0]])
        return Poad(gamma=0.9, gae_lambda=1.0, **settings)(batch).returns_BT[0, 0].item()

    assert first_return(1) == first_return(8) == 0.9
    assert first_return(8, token_gamma=0.9) == pytest.approx(0.9**8)


def test_a_time_limit_bootstraps_and_the_end_of_an_episode_does_not():
    ended = Poad(gamma=0.9, gae_lambda=1.0)(example(bootstrap=2.0))
    cut = Poad(gamma=0.9, gae_lambda=1.0)(example(terminated=False, bootstrap=2.0))
    assert ended.returns_BT[0, 10].item() == 1.0
    assert cut.returns_BT[0, 10].item() == pytest.approx(1.0 + 0.9 * 2.0)
    missing = example(terminated=False)
    missing.bootstrap_values_B = None
    with pytest.raises(ValueError, match="bootstrap_values: got none for 1 trajectories"):
        Poad()(missing)


@pytest.mark.parametrize("settings", [{}, {"token_gamma": 0.95}, {"level": "action"}, {"next_value": "last"}])
def test_environment_tokens_padding_and_order_change_nothing(settings):
    method = Poad(**settings)
    tight, wide = example(gap=0), example(gap=3, repeats=2)
    expected = method(tight).advantages_BT[0]
    credit = method(wide)
    for row in range(2):
        assert torch.equal(credit.advantages_BT[row][wide.mask_BT[row]], expected)
    assert bool(credit.advantages_BT.isfinite().all())
    assert not bool(credit.advantages_BT[~wide.mask_BT].any())
    assert not bool(credit.returns_BT[~wide.mask_BT].any())


def test_a_turn_without_tokens_is_no_step_and_a_response_without_tokens_has_no_credit():
    with_gap = make_batch([2, 0, 1], [0.0, 0.0, 1.0], [[0.5, 0.4], [], [0.3]])
    without = make_batch([2, 1], [0.0, 1.0], [[0.5, 0.4], [0.3]])
    got, expected = Poad()(with_gap), Poad()(without)
    assert torch.equal(got.advantages_BT[with_gap.mask_BT], expected.advantages_BT[without.mask_BT])
    for settings in ({}, {"level": "action"}, {"next_value": "last"}):
        empty = Poad(whiten="population", **settings)(make_batch([0], [0.0], [[]], gap=3))
        assert empty.advantages_BT.tolist() == [[0.0, 0.0, 0.0]]


def test_whitening_goes_by_the_mask_so_that_an_advantage_of_zero_still_counts():
    batch = make_batch([1, 1], [1.0, 2.0], [[1.0], [0.0]])
    credit = Poad(gamma=0.0, whiten="population")(batch)  # raw advantages 0 and 2
    assert credit.advantages_BT[batch.mask_BT].tolist() == [-1.0, 1.0]


def test_the_last_token_of_each_turn_is_found_across_environment_tokens():
    mask = torch.tensor([[True, True, False, True, False]])
    assert turn_ends(mask, torch.tensor([[0, 0, -1, 1, -1]])).tolist() == [[False, True, False, True, False]]


@pytest.mark.parametrize("settings", [{"gamma": 1.1}, {"level": "turn"}, {"next_value": "mean"}, {"whiten": "yes"}])
def test_what_cannot_be_is_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: got"):
        Poad(**settings)
