import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from macro_parts import make_batch, random_batch, tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apportion.algorithms.credit.boundaries import number_segments
from apportion.algorithms.credit.capo import Capo
from apportion.algorithms.credit.gae import Gae
from apportion.algorithms.credit.grpo import Grpo
from apportion.algorithms.credit.macro_actions import MacroActions, MacroAxis, macro_batch
from apportion.algorithms.interface import SurrogateInput
from apportion.algorithms.registry import build
from apportion.algorithms.surrogates import PpoClip, value_losses

GOLDEN = json.loads((Path(__file__).parent / "golden/ma_rlhf.json").read_text())
OFFICIAL = {case["name"]: case for case in GOLDEN["official"]}


def token_rewards(inputs, kl, reward):
    old, reference = inputs["old_logprobs"], inputs["ref_logprobs"]
    rewards = [-kl * (a - b) for a, b in zip(old, reference, strict=True)]
    rewards[-1] += reward
    return rewards


def with_splits(batch, splits, method):
    """The method's credit when the macro actions have the given lengths."""
    starts = torch.zeros_like(batch.mask_BT)
    starts[0, torch.tensor([0, *splits[:-1]]).cumsum(0)] = True
    method._rule = lambda _: (starts, {})
    return method(batch)


@pytest.mark.parametrize("case", GOLDEN["derived"], ids=lambda case: case["name"])
def test_paper_form_is_reproduced(case):
    inputs, outputs = case["inputs"], case["outputs"]
    batch = make_batch([token_rewards(inputs, inputs["kl"], inputs["reward"])], [inputs["values"]])
    method = MacroActions(
        gamma=inputs["gamma"], gae_lambda=inputs["lam"], reward_aggregation=inputs["reward_aggregation"]
    )
    credit = with_splits(batch, inputs["splits"], method)
    axis = MacroAxis.of(credit.segment_ids_BT)
    macro = macro_batch(batch, axis, axis.weights("equal", "earlier", torch.float64), inputs["reward_aggregation"])
    assert axis.sizes_BN[0].tolist() == inputs["splits"]
    torch.testing.assert_close(macro.values_BT[0], tensor(outputs["macro_values"]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(macro.token_rewards_BT[0], tensor(outputs["macro_rewards"]), rtol=1e-9, atol=1e-12)
    for name, got in (("macro_advantages", credit.advantages_BT), ("macro_returns", credit.returns_BT)):
        spread = tensor(outputs[name]).repeat_interleave(torch.tensor(inputs["splits"]))
        torch.testing.assert_close(got[0], spread, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ma_fixed_n2_len6", {"n_gram": 2}),
        ("ma_fixed_n3_len6_position", {"n_gram": 3, "value_weighting": "position"}),
        ("ma_fixed_n2_len2_min", {"n_gram": 2}),
        ("ma_ppl_len6", None),  # its boundaries are given here: tests/test_algorithms_boundaries.py has the rule's own
    ],
)
def test_released_code_is_reproduced_with_mean_aggregation_and_a_last_token_of_its_own(name, settings):
    case = OFFICIAL[name]
    inputs, outputs, config = case["inputs"], case["outputs"], case["config"]
    batch = make_batch([token_rewards(inputs, config["kl_ctl"], inputs["reward_score"])], [inputs["old_values"]])
    method = MacroActions(reward_aggregation="mean", last_token_alone=True, **(settings or {}))
    credit = with_splits(batch, outputs["split_sizes"], method) if settings is None else method(batch)
    torch.testing.assert_close(credit.advantages_BT[0], tensor(outputs["token_advantages"]), rtol=1e-9, atol=1e-12)
    returns = tensor(outputs["macro_returns"]).repeat_interleave(torch.tensor(outputs["split_sizes"]))
    torch.testing.assert_close(credit.returns_BT[0], returns, rtol=1e-9, atol=1e-12)
    _check_losses_and_gradients(credit, batch.mask_BT, inputs, outputs)


def _check_losses_and_gradients(credit, mask, inputs, outputs):
    policy = tensor([inputs["new_logprobs"]]).requires_grad_()
    values = tensor([inputs["new_values"]]).requires_grad_()
    losses = PpoClip()(SurrogateInput(policy, tensor([inputs["old_logprobs"]]), credit.advantages_BT, mask))
    actor = losses.losses_BT.mean()
    critic = value_losses(values, tensor([inputs["old_values"]]), credit.returns_BT, mask).losses_BT.mean()
    (actor + critic).backward()
    assert actor.item() == pytest.approx(outputs["actor_loss"], rel=1e-9)
    assert critic.item() == pytest.approx(outputs["critic_loss"], rel=1e-9)
    torch.testing.assert_close(policy.grad[0], tensor(outputs["actor_grad_wrt_new_logprobs"]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(values.grad[0], tensor(outputs["critic_grad_wrt_new_values"]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weighting", ["equal", "unit", "position"])
@pytest.mark.parametrize("aggregation", ["sum", "mean"])
@pytest.mark.parametrize("whiten", ["none", "sample", "population"])
def test_one_gram_is_token_level_ppo_to_the_last_bit(weighting, aggregation, whiten):
    batch = random_batch()
    macro = MacroActions(
        n_gram=1, value_weighting=weighting, reward_aggregation=aggregation, whiten=whiten, gae_lambda=0.9, gamma=0.97
    )(batch)
    plain = Gae(gamma=0.97, gae_lambda=0.9, whiten=whiten)(batch)
    assert torch.equal(macro.advantages_BT, plain.advantages_BT)
    assert torch.equal(macro.returns_BT, plain.returns_BT)
    assert bool(macro.advantages_BT[0].any())


def test_one_gram_on_another_estimator_is_that_estimator_to_the_last_bit():
    batch = random_batch()
    spec = {"name": "gae", "gamma": 0.9, "gae_lambda": 0.8}
    assert torch.equal(MacroActions(n_gram=1, estimator=spec)(batch).advantages_BT, Gae(0.9, 0.8)(batch).advantages_BT)


def test_one_action_is_reinforce_with_the_critic_as_baseline():
    batch = make_batch([[0.0, 0.5, 2.0], [0.0, 1.0, 9.0]], [[1.0, 2.0, 3.0], [4.0, 0.0, 9.0]], [[1, 1, 1], [1, 1, 0]])
    credit = MacroActions(termination="one")(batch)
    assert credit.advantages_BT.tolist() == [[0.5, 0.5, 0.5], [-1.0, -1.0, 0.0]]  # return - mean value
    assert credit.returns_BT.tolist() == [[2.5, 2.5, 2.5], [1.0, 1.0, 0.0]]
    assert credit.segment_ids_BT.tolist() == [[0, 0, 0], [0, 0, -1]]


def test_a_cut_response_goes_on_at_the_bootstrap_value_one_macro_step_later():
    batch = make_batch(
        [[0.0, 1.0]],
        [[0.5, 0.5]],
        terminated_B=torch.tensor([False]),
        bootstrap_values_B=tensor([2.0]),
    )
    assert MacroActions(n_gram=2, gamma=0.5)(batch).returns_BT.tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize(
    ("weighting", "heavier", "expected"),
    [
        ("equal", "earlier", [1 / 3, 1 / 3, 1 / 3]),
        ("unit", "earlier", [0.0, 0.0, 1.0]),
        ("position", "earlier", [6 / 11, 3 / 11, 2 / 11]),
        ("position", "later", [2 / 11, 3 / 11, 6 / 11]),
    ],
)
def test_value_weights_of_a_macro_action_sum_to_one(weighting, heavier, expected):
    axis = MacroAxis.of(torch.tensor([[-1, 0, 0, 0, 1, -1]]))
    sigma = axis.weights(weighting, heavier, torch.float64)
    torch.testing.assert_close(sigma[0], tensor([0.0, *expected, 1.0, 0.0]))


def test_an_action_never_spans_two_turns_and_skips_what_the_environment_wrote():
    mask = [[1, 1, 1, 0, 0, 1, 1]]
    turns = torch.tensor([[0, 0, 0, -1, -1, 1, 1]])
    batch = make_batch([[0.0] * 7], [[0.0] * 7], mask, turn_ids_BT=turns)
    assert MacroActions(n_gram=2)(batch).segment_ids_BT.tolist() == [[0, 0, 1, -1, -1, 2, 2]]
    assert MacroActions(termination="one")(batch).segment_ids_BT.tolist() == [[0, 0, 0, -1, -1, 1, 1]]
    assert MacroActions(n_gram=2, last_token_alone=True)(batch).segment_ids_BT.tolist() == [[0, 0, 1, -1, -1, 2, 3]]


def test_outcome_estimators_run_on_macro_actions_unchanged_and_carry_segments():
    batch = random_batch()
    batch.token_rewards_BT = torch.where(batch.mask_BT, 0.0, float("nan"))
    batch.rewards_B = torch.tensor([1.0, 0.0, 1.0, 0.5, 2.0, 0.0])
    last = [int(row.nonzero()[-1]) for row in batch.mask_BT[:-1]]
    batch.token_rewards_BT[range(5), last] = batch.rewards_B[:5]
    lifted = MacroActions(n_gram=4, estimator={"name": "grpo"})
    credit = lifted(batch)
    assert torch.equal(credit.advantages_BT, Grpo()(batch).advantages_BT)
    assert int(credit.segment_ids_BT.max()) > 1
    assert credit.returns_BT is None
    assert lifted.needs == frozenset()


def test_a_kl_in_the_reward_reaches_an_outcome_estimator_as_returns_to_go_of_macro_actions():
    batch = make_batch([[0.0, 0.0, 0.0, 1.0]], [[0.0] * 4])
    batch.kl_rewards_BT = tensor([[-0.1, -0.2, -0.3, -0.4]])
    lifted = MacroActions(n_gram=2, estimator={"name": "grpo"})(batch)
    torch.testing.assert_close(lifted.advantages_BT, tensor([[-1.0, -1.0, -0.7, -0.7]]))


def judged_batch(**more):
    """Two right answers, the step in the middle of the first voted wrong."""
    steps = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 0, 0, 0]])
    given = {"rewards_B": tensor([1.0, 1.0]), "step_ids_BT": steps, "wrong_steps": [[1], []]}
    return make_batch([[0.0] * 4 + [1.0]] * 2, [[0.0] * 5] * 2, **{**given, **more})


@pytest.mark.parametrize("termination", ["fixed", "one"])
def test_a_macro_action_begins_with_each_judged_step_so_that_a_wrong_one_keeps_its_credit(termination):
    batch = judged_batch()
    credit = MacroActions(n_gram=5, termination=termination, estimator={"name": "capo"})(batch)
    assert credit.segment_ids_BT.tolist() == [[0, 0, 1, 1, 2], [0, 0, 0, 0, 0]]
    # Macro actions earn 2, 1, 2 and 2: mean 1.75, sample deviation 0.5.
    expected = tensor([[0.5, 0.5, -1.5, -1.5, 0.5], [0.5] * 5])
    torch.testing.assert_close(credit.advantages_BT, expected, rtol=1e-5, atol=0)


def test_one_gram_on_judged_credit_is_that_credit_to_the_last_bit_and_steps_cut_nothing_for_others():
    batch = judged_batch()
    assert torch.equal(
        MacroActions(n_gram=1, estimator={"name": "capo"})(batch).advantages_BT, Capo()(batch).advantages_BT
    )
    assert MacroActions(n_gram=3)(batch).segment_ids_BT.tolist() == [[0, 0, 0, 1, 1]] * 2
    judged = MacroActions(n_gram=3, estimator={"name": "capo"})(batch).segment_ids_BT.tolist()
    assert judged == [[0, 0, 1, 2, 3], [0, 0, 0, 1, 1]]  # both the rule's cuts and the steps'


def test_needs_are_those_of_the_estimator_and_of_the_rule():
    assert MacroActions().needs == {"values"}
    assert MacroActions(termination="perplexity").needs == {"values", "reference_logprobs"}
    assert build("credit", {"name": "macro_actions", "termination": "one"}).needs == {"values"}


@pytest.mark.parametrize("termination", ["fixed", "randomised", "perplexity", "one"])
def test_padding_and_order_change_nothing_and_no_nan_appears(termination):
    batch = random_batch()
    method = MacroActions(n_gram=3, termination=termination)
    credit = method(batch)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    changed = replace(batch)
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            value = value[order]
            if name.endswith("_BT"):
                fill = float("nan") if value.is_floating_point() else 0
                value = torch.nn.functional.pad(value, (0, 4), value=fill)
            setattr(changed, name, value)
    again = method(changed)
    assert torch.equal(again.advantages_BT[:, :-4], credit.advantages_BT[order])
    assert torch.equal(again.segment_ids_BT[:, :-4], credit.segment_ids_BT[order])
    for tensor_BT in (again.advantages_BT, again.returns_BT):
        assert bool(tensor_BT.isfinite().all())
        assert not bool(tensor_BT[~changed.mask_BT].any())


def test_single_tokens_empty_responses_and_an_empty_batch_have_their_credit():
    credit = MacroActions()(make_batch([[2.0], [7.0]], [[0.5], [7.0]], [[1], [0]]))
    assert credit.advantages_BT.tolist() == [[1.5], [0.0]]
    assert credit.segment_ids_BT.tolist() == [[0], [-1]]
    for termination in ("fixed", "randomised", "perplexity", "one"):
        empty = make_batch([[]], [[]], reference_logprobs_BT=tensor([[]]))
        assert MacroActions(termination=termination)(empty).advantages_BT.shape == (1, 0)


def test_segments_with_a_hole_are_refused():
    with pytest.raises(ValueError, match="macro action without tokens"):
        MacroAxis.of(torch.tensor([[0, 2, 2]]))
    assert number_segments(torch.tensor([[True, True]]), torch.tensor([[False, True]])).tolist() == [[-1, 0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_gram": 0}, "n_gram: got 0, expected at least 1"),
        ({"termination": "ngram"}, "termination: got 'ngram', expected one of fixed"),
        ({"termination": {"name": "one", "seed": 1}}, "got parameters .'seed'."),
        ({"value_weighting": "mean"}, "value_weighting: got 'mean'"),
        ({"reward_aggregation": "max"}, "reward_aggregation: got 'max'"),
        ({"termination": {"name": "randomised", "sizes": [0]}}, "sizes: got .0."),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MacroActions(**settings)


class CountElements(TorchDispatchMode):
    """Adds up the elements of every tensor that an operation makes."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.total += out.numel() if isinstance(out, torch.Tensor) else 0
        return out


@pytest.mark.parametrize("termination", ["fixed", "randomised", "perplexity", "one"])
def test_work_grows_linearly_with_the_length_of_responses(termination):
    def elements(width):
        batch = make_batch([[0.1] * width] * 8, [[0.2] * width] * 8, reference_logprobs_BT=-torch.rand(8, width))
        with CountElements() as counted:
            MacroActions(termination=termination)(batch)
        return counted.total

    assert elements(1024) < 4.5 * elements(256)


def test_64_responses_of_2048_tokens_take_a_fraction_of_a_second():
    batch = make_batch([[0.1] * 2048] * 64, [[0.2] * 2048] * 64)
    start = time.process_time()
    MacroActions(n_gram=5)(batch)
    assert time.process_time() - start < 2.0  # of both cores; 0.2 s, however busy the machine is
