"""What an algorithm's parts are given and give back. Everything here is torch on the response axis.

`algorithm = credit x surrogate x reduction (+ KL, + selection, + shaping)`. A part is a small dataclass: its fields are
its parameters (checked in `__post_init__`, ValueError with got / expected), calling it does the work. Nothing divides
but a reduction, and a reduction divides by totals of the whole optimiser step, so a loss never depends on how a batch
was cut.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

SIGNALS = frozenset(
    {"old_logprobs", "reference_logprobs", "values", "entropies", "influences", "critiques", "token_ends"}
)


@dataclass
class CreditInput:
    """The whole batch as credit sees it: right-padded [B, T], every group complete, on CPU.

    Where `mask_BT` is False (environment tokens and padding) nothing may be read. Signals that were not asked for in
    `needs` are None. Trajectories whose reward failed are not here.
    """

    mask_BT: Tensor  # bool, tokens the policy chose
    group_ids_B: Tensor  # int64
    # Outcome, after shaping: the sum of the row's task rewards. Without a KL, unless one ratio covers many tokens: then the
    # sum of the row's KL penalties is part of it (`apportion.algorithms.kl.with_kl_rewards`).
    rewards_B: Tensor
    # What each token earned; a plain outcome stands at the last True of the mask; a KL in the reward is included.
    token_rewards_BT: Tensor
    turn_ids_BT: Tensor  # int, turn of each action token, -1 elsewhere
    terminated_B: Tensor  # bool, False: cut by a limit
    scored_rewards_B: Tensor | None = None  # outcome before shaping and KL; None where it is `rewards_B`
    # The KL's part of token_rewards_BT; None without a KL in the reward, and where `rewards_B` has it.
    kl_rewards_BT: Tensor | None = None
    token_ids_BT: Tensor | None = None  # int
    old_logprobs_BT: Tensor | None = None
    reference_logprobs_BT: Tensor | None = None
    values_BT: Tensor | None = None  # value of the state before each token
    bootstrap_values_B: Tensor | None = None  # value of the state after the last token
    entropies_BT: Tensor | None = None
    influences_BT: Tensor | None = None  # made by the credit's own `influence`, beside the hidden states
    step_ids_BT: Tensor | None = None  # int, reasoning step of each token
    wrong_steps: list[list[int]] | None = None  # per trajectory, steps a judge's vote found wrong
    texts: list[str] | None = None
    token_ends_BT: Tensor | None = None  # int, characters of the row's text up to and including each token


@dataclass
class Credit:
    """One number for each token the policy chose."""

    advantages_BT: Tensor  # 0 where the mask is False
    returns_BT: Tensor | None = None  # the critic's targets, where there is a critic
    segment_ids_BT: Tensor | None = None  # int, macro action of each token, -1 elsewhere
    metrics: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class CreditMethod(Protocol):
    """A method that learns only from how the responses to one prompt differ says so, with the parameters that make it
    such: `group_relative_with: ClassVar[dict[str, Any]]`, {} for always. A group of one is then refused beforehand.

    `one_advantage_per: ClassVar[dict[str, Any]]` says of which units all tokens have one advantage, each with the
    parameters that make it so: `response`, `turn`, `macro` (the segments that it gives); {} where advantages differ from
    token to token. A ratio over a larger unit would lose them and is refused beforehand. `response` leaves a KL in the
    reward apart: under a ratio over many tokens it comes as part of `rewards_B`."""

    needs: ClassVar[frozenset[str]]  # a subset of SIGNALS; read it from the instance: a wrapped method adds its own

    def __call__(self, batch: CreditInput) -> Credit: ...


@runtime_checkable
class JudgedMethod(Protocol):
    """A credit method that reads critiques says how many it wants, how they vote, and what tokens earn by the vote."""

    critiques: int  # of one response

    def vote(self, critiques: Sequence[Collection[int] | None]) -> list[int]:
        """Wrong steps, increasing; a critique that failed is None and has no vote."""
        ...

    def token_rewards(self, batch: CreditInput) -> Tensor:
        """[B, T], 0 where the mask is False: what selection compares in place of `token_rewards_BT`."""
        ...


def judged_method(method: CreditMethod) -> JudgedMethod:
    """`method`, or the one that it wraps, that votes on critiques; ValueError if there is none."""
    if isinstance(method, JudgedMethod):
        return method
    for inner in vars(method).values():
        if "critiques" in getattr(inner, "needs", ()):
            return judged_method(inner)
    raise ValueError(
        f"credit {type(method).__name__}: needs critiques, but has no `critiques`, `vote` and `token_rewards`; "
        "expected the three of JudgedMethod"
    )


@dataclass
class SurrogateInput:
    """One micro-batch of whole rows, [b, T]; only `policy_logprobs_BT` carries a gradient."""

    policy_logprobs_BT: Tensor
    old_logprobs_BT: Tensor
    advantages_BT: Tensor
    mask_BT: Tensor  # bool
    turn_ids_BT: Tensor | None = None
    segment_ids_BT: Tensor | None = None


@dataclass
class SurrogateOutput:
    """Per-token loss, not reduced, and per-token indicators that the caller averages over tokens (`clip_fraction`)."""

    losses_BT: Tensor
    indicators: dict[str, Tensor] = field(default_factory=dict)


class Surrogate(Protocol):
    """One whose gradient goes through one ratio for many tokens says so, with the parameters that make it such:
    `pools: ClassVar[dict[str, Any]]`, by unit: `response`, `turn` or `macro`."""

    def __call__(self, batch: SurrogateInput) -> SurrogateOutput: ...


class Reduction(Protocol):
    """Weights [B, T] such that the loss of one optimiser step is sum(weights * losses), given the mask [B, T] of all
    of its trajectories (every rank's). 0 where the mask is False."""

    def __call__(self, mask_BT: Tensor) -> Tensor: ...


class Shaping(Protocol):
    """Changes rewards before credit; sees the same input and returns (rewards_B, token_rewards_BT)."""

    def __call__(self, batch: CreditInput, response_lengths_B: Tensor) -> tuple[Tensor, Tensor]: ...


class Selection(Protocol):
    """Which trajectories take part, before credit: bool [B]."""

    def __call__(self, batch: CreditInput) -> Tensor: ...
