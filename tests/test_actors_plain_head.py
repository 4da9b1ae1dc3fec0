"""Log-probs under a plain output head: the values and gradients that autograd gives, a chunk at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apportion.actors.plain_head import PlainHeadLogprobs, plain_weight


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=random, dtype=dtype).requires_grad_()
    weight = torch.randn(11, 5, generator=random, dtype=dtype).requires_grad_()
    return hidden, weight, torch.tensor([0, 10, 3, 3, 7, 1, 9])


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("factor", [1.0, 0.4])
def test_values_and_gradients_are_those_of_a_log_softmax(chunk: int, factor: float) -> None:
    hidden, weight, targets = _inputs(torch.float32)
    grads = torch.linspace(-1, 2, 7)
    logprobs, entropies, normalizers = PlainHeadLogprobs.apply(hidden, weight, targets, factor, chunk)
    logprobs.backward(grads)
    got = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None

    logits = hidden @ weight.T * factor
    everything = logits.log_softmax(-1)
    expected = everything.gather(-1, targets[:, None]).squeeze(-1)
    expected.backward(grads)
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropies, -(everything.exp() * everything).sum(-1))
    torch.testing.assert_close(normalizers, logits.logsumexp(-1))
    torch.testing.assert_close(got[0], hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], weight.grad, rtol=1e-4, atol=1e-5)


def test_only_logprobs_carry_a_gradient() -> None:
    hidden, weight, targets = _inputs(torch.float32)
    logprobs, entropies, normalizers = PlainHeadLogprobs.apply(hidden, weight, targets, 1.0, 2)
    assert logprobs.requires_grad
    assert not entropies.requires_grad and not normalizers.requires_grad


def test_a_frozen_head_gets_no_gradient_and_hidden_states_still_do() -> None:
    hidden, weight, targets = _inputs(torch.float32)
    weight.requires_grad_(False)
    PlainHeadLogprobs.apply(hidden, weight, targets, 1.0, 2)[0].sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None and bool((hidden.grad != 0).any())


def test_no_token_gives_empty_results_and_gradients_of_0() -> None:
    hidden, weight, _ = _inputs(torch.float32)
    nothing = torch.zeros(0, dtype=torch.int64)
    logprobs, _, _ = PlainHeadLogprobs.apply(hidden[:0], weight, nothing, 1.0, 2)
    logprobs.sum().backward()
    assert logprobs.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_only_a_head_that_is_one_matrix_counts_as_plain() -> None:
    class Adapted(nn.Linear):
        pass

    plain = nn.Linear(5, 11, bias=False)
    assert plain_weight(plain) is plain.weight
    assert plain_weight(nn.Linear(5, 11)) is None
    assert plain_weight(Adapted(5, 11, bias=False)) is None
