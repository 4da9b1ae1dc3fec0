"""How far a step up one token moves the log-likelihood of the group's correct responses: the score behind THR and NTHR
(arXiv 2510.03669, 2505.18830).

For a token k' of response j, with h the final hidden state that predicts a token (the output head's input), g =
onehot(token) - probabilities, and P the correct responses of the group:

    s_jk' = sum_{i in P} w_i sum_k <g_ik, g_jk'> <h_ik, h_jk'>          w_i = 1 / |y_i| (THR) or 1 (NTHR)
    M = sum_{i in P} w_i G_i^T H_i;   s = rowsum((G M) * H)             the same, linear in tokens

Vectors over the vocabulary are cut to V*, the tokens that occur in the group, without renormalising. Everything is of
the old policy and carries no gradient. M is a sum over tokens: where a group is split over ranks, they agree on V*
(`group_vocabulary`) and add their M (`sum_over_ranks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

VARIANTS = ("thr", "nthr")
CHUNK_TOKENS = 2048  # tokens whose probabilities on V* exist at a time

Rows = Callable[[slice], Tensor]  # rows [n, V*] of probabilities for some tokens, made when they are asked for


@dataclass
class GroupStates:
    """Tokens of one group (those of one rank, responses one after the other) and what the old policy said of them."""

    hidden_ND: Tensor
    probabilities: Tensor | Rows  # [N, V*], or a function that gives rows of it
    columns_N: Tensor  # int, place of each token in V*
    width: int | None = None  # |V*|, to be given where probabilities are a function

    def __post_init__(self) -> None:
        if isinstance(self.probabilities, Tensor):
            self.width = self.probabilities.shape[1]
        elif self.width is None:
            raise ValueError("width: got none, expected the number of tokens in V* where probabilities are a function")
        if len(self.columns_N) != len(self.hidden_ND):
            raise ValueError(f"columns: got {len(self.columns_N)} tokens for {len(self.hidden_ND)} hidden states")

    @property
    def dtype(self) -> torch.dtype:
        """What sums are kept in: float32, or float64 if the hidden states are."""
        return torch.promote_types(self.hidden_ND.dtype, torch.float32)

    def errors(self, tokens: slice) -> Tensor:
        """Prediction errors onehot - probabilities [n, V*]."""
        rows = self.probabilities[tokens] if isinstance(self.probabilities, Tensor) else self.probabilities(tokens)
        columns_n1 = self.columns_N[tokens].long()[:, None]
        return (-rows.to(self.dtype)).scatter_add_(1, columns_n1, torch.ones_like(columns_n1, dtype=self.dtype))


def group_vocabulary(token_ids_N: Tensor, elsewhere: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """The group's own tokens V* (increasing) and the place of each of these tokens in them. `elsewhere` are the tokens
    that other ranks hold of the group: with them, every rank has the same V*.

    >>> vocabulary, columns = group_vocabulary(torch.tensor([7, 3, 7]))
    >>> vocabulary.tolist(), columns.tolist()
    ([3, 7], [1, 0, 1])
    """
    vocabulary_V = torch.unique(torch.cat([token_ids_N, *elsewhere]))
    return vocabulary_V, torch.searchsorted(vocabulary_V, token_ids_N)


def probabilities_on(
    head_rows_VD: Tensor, hidden_ND: Tensor, log_normalisers_N: Tensor, temperature: float = 1.0
) -> Rows:
    """Probabilities on V* from the output head's rows of V* and each token's logsumexp over the whole vocabulary (of
    the logits divided by `temperature`): a small part of the full softmax's work, a chunk at a time."""

    def rows(tokens: slice) -> Tensor:
        logits = (hidden_ND[tokens].to(head_rows_VD.dtype) @ head_rows_VD.T).to(log_normalisers_N.dtype)
        return (logits / temperature - log_normalisers_N[tokens, None]).exp()

    return rows


def correct_token_weights(lengths_G: Tensor, correct_G: Tensor, variant: str = "thr") -> Tensor:
    """w [N] of each token of the responses, one after the other: 1/|y| (THR) or 1 (NTHR) in correct ones, else 0.

    >>> correct_token_weights(torch.tensor([2, 1]), torch.tensor([True, False])).tolist()
    [0.5, 0.5, 0.0]
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant: got {variant!r}, expected one of {', '.join(VARIANTS)}")
    weights_G = correct_G.double()
    if variant == "thr":
        weights_G = weights_G / lengths_G.clamp_min(1)
    return weights_G.repeat_interleave(lengths_G)


@torch.no_grad()
def influence_matrix(states: GroupStates, weights_N: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """M [V*, D]: the sum over these tokens of weight * prediction error x hidden state."""
    hidden_ND, dtype = states.hidden_ND, states.dtype
    matrix_VD = torch.zeros(states.width or 0, hidden_ND.shape[1], dtype=dtype, device=hidden_ND.device)
    for start in range(0, len(hidden_ND), chunk_tokens):
        tokens = slice(start, start + chunk_tokens)
        if bool((weights_N[tokens] != 0).any()):
            weighted_nD = hidden_ND[tokens].to(dtype) * weights_N[tokens, None].to(dtype)
            matrix_VD.addmm_(states.errors(tokens).T, weighted_nD)
    return matrix_VD


@torch.no_grad()
def influence_scores(states: GroupStates, matrix_VD: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """s [N] of each of these tokens, from the M of the whole group."""
    scores_N = torch.zeros(len(states.hidden_ND), dtype=states.dtype, device=states.hidden_ND.device)
    for start in range(0, len(scores_N), chunk_tokens):
        tokens = slice(start, start + chunk_tokens)
        scores_N[tokens] = ((states.errors(tokens) @ matrix_VD) * states.hidden_ND[tokens].to(states.dtype)).sum(-1)
    return scores_N


def group_influence(
    states: GroupStates,
    lengths_G: Tensor,
    correct_G: Tensor,
    variant: str = "thr",
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """s [N] for the tokens of a group's responses (those of this rank: `lengths_G` adds up to N).

    `sum_over_ranks` adds M over the ranks that hold the rest of the group; all must use the same V*.
    """
    if int(lengths_G.sum()) != len(states.hidden_ND):
        raise ValueError(f"hidden: got {len(states.hidden_ND)} states, expected {int(lengths_G.sum())} (lengths' sum)")
    weights_N = correct_token_weights(lengths_G, correct_G, variant).to(states.hidden_ND.device)
    matrix_VD = influence_matrix(states, weights_N, chunk_tokens)
    if sum_over_ranks is not None:
        matrix_VD = sum_over_ranks(matrix_VD)
    return influence_scores(states, matrix_VD, chunk_tokens)
