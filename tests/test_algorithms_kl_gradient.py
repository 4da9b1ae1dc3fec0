"""The expected gradient of a KL in the reward, by exact enumeration: it is the gradient of E[R - beta KL], whatever the
ratio covers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product

import pytest
import torch
from torch import Tensor

from apportion.algorithms import registry
from apportion.algorithms.interface import CreditInput, SurrogateInput
from apportion.algorithms.kl import kl_rewards, with_kl_rewards
from apportion.algorithms.reductions import SequenceSum
from apportion.algorithms.statistics import at_last_token, masked
from apportion.conf.parts import kl_level

BETA = 0.3
END = 2  # what stands after it is END too, outside the mask
# Turn of each place of a response; -1 is a token of the environment.
LAYOUTS = {2: [0, 1], 3: [0, 0, -1, 1], 5: [0, -1, 1, 1, -1, 2, 2]}
VOCABULARY = {2: 3, 3: 3, 5: 2}  # the longest responses have no END, which keeps their pairs few

RLOO = {"name": "rloo"}
ON_PAIRS = {"name": "macro_actions", "n_gram": 2, "estimator": RLOO}
ACTIONS = {"name": "poad", "level": "action", "gamma": 1.0, "gae_lambda": 1.0}
SEQUENCE, TURN, MACRO, TOKEN = ({"name": "ppo_clip", "ratio": r} for r in ("sequence", "turn", "macro", "token"))
GSPO = {"name": "gspo", "form": "sequence"}


@dataclass
class World:
    """Every response that a small policy can give; END ends one. A token's log-prob depends on the token before it."""

    tokens_NA: Tensor  # [responses, action tokens]
    mask_NT: Tensor
    turn_ids_NT: Tensor
    logits: Tensor  # [places, token before, token]; requires a gradient
    reference_logits: Tensor
    rewards_N: Tensor
    values: Tensor  # [places, token before]

    @staticmethod
    @cache
    def of(length: int) -> World:
        turns = torch.tensor(LAYOUTS[length])
        every = product(range(VOCABULARY[length]), repeat=length)
        tokens = torch.tensor([t for t in every if END not in t or {*t[t.index(END) :]} == {END}])
        before = (tokens == END).long().cumsum(-1) - (tokens == END).long()
        mask = torch.zeros(len(tokens), len(turns), dtype=torch.bool)
        mask[:, turns >= 0] = before == 0
        generator = torch.Generator().manual_seed(length)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shape = (length, VOCABULARY[length] + 1, VOCABULARY[length])
        return World(
            tokens, mask, torch.where(mask, turns, -1), drawn(*shape).requires_grad_(), drawn(*shape),
            drawn(len(tokens)), drawn(*shape[:2]),
        )  # fmt: skip

    def on_places(self, table: Tensor, fill: float = float("nan")) -> Tensor:
        """[N, T] from [N, A]; `fill` where the policy did not choose."""
        turns = torch.tensor(LAYOUTS[self.tokens_NA.shape[1]])
        out = table.new_full(self.mask_NT.shape, fill)
        out[:, turns >= 0] = table
        return torch.where(self.mask_NT, out, fill)

    @property
    def tokens_before(self) -> Tensor:
        first = torch.full_like(self.tokens_NA[:, :1], self.logits.shape[-1])
        return torch.cat([first, self.tokens_NA[:, :-1]], 1)

    def logprobs(self, logits: Tensor) -> Tensor:
        places = torch.arange(self.tokens_NA.shape[1])
        return self.on_places(logits.log_softmax(-1)[places, self.tokens_before, self.tokens_NA])

    @cached_property
    def true_gradient(self) -> Tensor:
        """Of E[R - beta KL], from its definition."""
        own = masked(self.logprobs(self.logits), self.mask_NT)
        reference = masked(self.logprobs(self.reference_logits), self.mask_NT)
        objective = self.rewards_N - BETA * (own - reference).sum(-1)
        return torch.autograd.grad((own.sum(-1).exp() * objective).sum(), self.logits)[0]

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor, CreditInput]:
        """Every unordered pair of responses as a group of two: their places [2 * pairs], the pair's chance for each
        place, and the batch without a KL."""
        logprobs = self.logprobs(self.logits).detach()
        chances = masked(logprobs, self.mask_NT).sum(-1).exp()
        assert float(chances.sum()) == pytest.approx(1.0, abs=1e-12)
        pairs = torch.combinations(torch.arange(len(chances)), with_replacement=True)
        rows, orders = pairs.reshape(-1), 2 - (pairs[:, 0] == pairs[:, 1]).double()
        mask = self.mask_NT[rows]
        inputs = CreditInput(
            mask_BT=mask,
            group_ids_B=torch.arange(len(pairs)).repeat_interleave(2),
            rewards_B=self.rewards_N[rows],
            token_rewards_BT=at_last_token(self.rewards_N[rows], mask),
            turn_ids_BT=self.turn_ids_NT[rows],
            terminated_B=torch.ones(len(rows), dtype=torch.bool),
            old_logprobs_BT=logprobs[rows],
            reference_logprobs_BT=self.logprobs(self.reference_logits)[rows],
            values_BT=self.on_places(self.values[torch.arange(len(self.values)), self.tokens_before])[rows],
        )
        return rows, (orders * chances[pairs].prod(-1)).repeat_interleave(2), inputs

    def expected_gradient(self, credit: dict, surrogate: dict, level: str) -> Tensor:
        """Of what the components give for every pair of responses, weighted by the pair's probability."""
        rows, chances, inputs = self.pairs
        mask, old = inputs.mask_BT, inputs.old_logprobs_BT
        kl = kl_rewards(old, inputs.reference_logprobs_BT, mask, BETA, "k1")
        given = registry.build("credit", credit)(with_kl_rewards(inputs, kl, level))
        made = registry.build("surrogate", surrogate)(
            SurrogateInput(
                self.logprobs(self.logits)[rows],
                old,
                given.advantages_BT,
                mask,
                inputs.turn_ids_BT,
                given.segment_ids_BT,
            )
        )
        weights = chances[:, None] * (SequenceSum()(mask) * len(rows)) / 2
        return -torch.autograd.grad((weights * made.losses_BT).sum(), self.logits)[0]


@pytest.mark.parametrize("length", LAYOUTS)
@pytest.mark.parametrize(
    ("credit", "surrogate", "factor"),
    [
        (RLOO, TOKEN, 1),
        (RLOO, SEQUENCE, 1),
        (RLOO, TURN, 1),
        (RLOO, GSPO, 1),
        # A mean that a response takes part in is half of it in a group of two.
        ({"name": "grpo", "normalize": "none"}, SEQUENCE, 0.5),
        ({"name": "grpo", "normalize": "none"}, TURN, 0.5),
        ({"name": "grpo", "normalize": "none"}, GSPO, 0.5),
        ({"name": "reinforce_pp", "baseline": "group", "whiten": "none"}, SEQUENCE, 0.5),
        ({"name": "reinforce_pp", "baseline": "group", "whiten": "none"}, TURN, 0.5),
        (ON_PAIRS, TOKEN, 1),
        (ON_PAIRS, MACRO, 1),
        (ON_PAIRS, TURN, 1),
        (ON_PAIRS, SEQUENCE, 1),
        (ON_PAIRS, GSPO, 1),
        ({**ON_PAIRS, "termination": "one"}, TURN, 1),
        ({**ON_PAIRS, "termination": "one"}, MACRO, 1),
        (ACTIONS, TURN, 1),
        (ACTIONS, MACRO, 1),
        ({"name": "gae", "whiten": "none"}, TOKEN, 1),
    ],
)
def test_the_expected_gradient_is_that_of_reward_less_kl(length, credit, surrogate, factor):
    world = World.of(length)
    got = world.expected_gradient(credit, surrogate, kl_level(credit, surrogate))
    torch.testing.assert_close(got, factor * world.true_gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", LAYOUTS)
@pytest.mark.parametrize("surrogate", [SEQUENCE, GSPO, TURN])
def test_the_returns_of_each_token_are_wrong_under_one_ratio_for_many(length, surrogate):
    world = World.of(length)
    gap = (world.expected_gradient(RLOO, surrogate, "token") - world.true_gradient).abs().max()
    alone = surrogate is TURN and length == 2  # each turn has one token
    assert gap < 1e-10 if alone else gap > 0.005


@pytest.mark.parametrize(
    ("n_gram", "weighting", "unbiased"),
    [(1, "equal", True), (2, "equal", False), (2, "unit", False), (2, "position", False)],
)
def test_macro_values_that_read_states_inside_a_macro_action_are_no_unbiased_baseline(n_gram, weighting, unbiased):
    world = World.of(3)
    credit = {"name": "macro_actions", "n_gram": n_gram, "value_weighting": weighting, "gae_lambda": 1.0}
    gap = (world.expected_gradient(credit, MACRO, "token") - world.true_gradient).abs().max()
    assert gap < 1e-10 if unbiased else gap > 0.005


@pytest.mark.parametrize("surrogate", [SEQUENCE, GSPO])
def test_rows_with_the_same_kl_at_different_tokens_push_every_token_alike(surrogate):
    mask = torch.ones(3, 4, dtype=torch.bool)
    kl = torch.tensor([[-0.1, 0, 0, 0], [0, 0, 0, -0.1], [0, 0, 0, 0]], dtype=torch.float64)
    zeros = torch.zeros_like(kl)
    inputs = CreditInput(mask, torch.zeros(3).long(), zeros[:, 0], zeros, zeros.int(), torch.ones(3, dtype=torch.bool))
    credit = registry.build("credit", RLOO)(with_kl_rewards(inputs, kl, kl_level(RLOO, surrogate)))
    policy = zeros.clone().requires_grad_()
    losses = registry.build("surrogate", surrogate)(SurrogateInput(policy, zeros, credit.advantages_BT, mask))
    (SequenceSum()(mask) * losses.losses_BT).sum().backward()
    # Leave-one-out: -0.1 less the mean of -0.1 and 0; 0 less -0.1. A mean over three responses.
    expected = torch.tensor([0.05, 0.05, -0.1], dtype=torch.float64) / 3
    torch.testing.assert_close(policy.grad, expected[:, None].expand(3, 4))


def test_the_kl_of_a_response_is_part_of_its_outcome_before_the_baseline():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    kl = torch.tensor([[-0.1, -0.2, -0.3], [-0.2, 0.0, float("nan")]], dtype=torch.float64)
    inputs = CreditInput(
        mask, torch.tensor([5, 5]), torch.tensor([1.0, 0.0], dtype=torch.float64), torch.zeros(2, 3).double(),
        torch.zeros(2, 3).int(), torch.ones(2, dtype=torch.bool),
    )  # fmt: skip
    changed = with_kl_rewards(inputs, masked(kl, mask), "response")
    torch.testing.assert_close(changed.rewards_B, torch.tensor([0.4, -0.2], dtype=torch.float64))
    assert changed.kl_rewards_BT is None
    assert changed.scored_rewards_B.tolist() == [1.0, 0.0]  # right answers are still told by the task's reward
    advantages = registry.build("credit", RLOO)(changed).advantages_BT
    torch.testing.assert_close(advantages, torch.tensor([[0.6] * 3, [-0.6, -0.6, 0.0]], dtype=torch.float64))
    with pytest.raises(ValueError, match="kl level: got 'turn', expected one of token, response"):
        with_kl_rewards(inputs, kl, "turn")
