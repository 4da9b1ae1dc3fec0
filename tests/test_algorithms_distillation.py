import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apportion.algorithms.distillation import AlignDistil, reverse_kl, total_variation

GOLDEN = json.loads((Path(__file__).parent / "golden/aligndistil.json").read_text())
SHARED = GOLDEN["shared_inputs"]
OFFICIAL = {case["name"]: case for case in GOLDEN["official"]}


def logits(name, dtype=torch.float64):
    return torch.tensor(SHARED[f"{name}_logits"], dtype=dtype)


def sequence_mean(losses, mask):
    return ((losses * mask).sum(-1) / mask.sum(-1)).mean()


def close(got, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", GOLDEN["derived"], ids=lambda case: case["name"])
def test_paper_form_is_reproduced_with_its_gradient(case):
    config, outputs = case["config"], case["outputs"]
    method = AlignDistil(scale=config["r"], beta0=config["beta0"], offset=config["eps"])
    student = logits("student").requires_grad_()
    first = SHARED["prompt_len"] - 1  # the position that predicts the response's first token
    positions = slice(first, -1)
    out = method.losses(student[:, positions], logits("dpo")[:, positions], logits("reverse_dpo")[:, positions])
    mask = torch.tensor(SHARED["action_mask"])
    for name, got in (("tvd", out.total_variation), ("alpha", out.alpha), ("beta_t", out.weight), ("kl", out.kl)):
        close(got, outputs[name])
    loss = sequence_mean(out.losses, mask)
    loss.backward()
    assert loss.item() == pytest.approx(outputs["loss"], rel=1e-9)
    close(student.grad, outputs["grad_wrt_student_logits"])


# The released code leaves out the 1/2 of the total variation (its beta2 is half our scale) and looks at the positions
# of the response's tokens instead of those that predict them; given the same positions, the numbers are the same.
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("on_aligndistil_b0.1_r15", {"scale": 30.0}),
        ("on_aligndistil_b0.1_r15_T2.0", {"scale": 30.0, "temperature": 2.0}),
        ("on_theorem1_contrast_b0.1_r0.08", {"variant": "theorem1_contrast", "beta": 0.08}),
        ("on_theorem1_adaptive_b0.1_r15", {"variant": "theorem1_adaptive", "scale": 30.0}),
        ("off_aligndistil_b0.1_r10", {"scale": 20.0}),
    ],
)
def test_released_numbers_are_reproduced_at_the_positions_the_released_code_takes(name, settings):
    outputs = OFFICIAL[name]["outputs"]
    first = SHARED["prompt_len"] if name.startswith("on_") else 0
    student = logits("student", torch.float32).requires_grad_()
    dpo, other = logits("dpo", torch.float32)[:, first:], logits("reverse_dpo", torch.float32)[:, first:]
    out = AlignDistil(**settings).losses(student[:, first:], dpo, other)
    loss = sequence_mean(out.losses, torch.tensor(outputs["mask"]))
    loss.backward()
    assert loss.item() == pytest.approx(outputs["loss"], rel=1e-5)
    close(student.grad, outputs["grad_wrt_student_logits"], rtol=1e-4, atol=1e-7)
    close(out.alpha, torch.tensor(outputs["alpha_per_position"]).expand_as(out.alpha).tolist(), rtol=1e-5)


def test_theorem_1_the_gradient_of_the_objective_is_that_of_the_divergence_with_opposite_sign():
    case = GOLDEN["theorem1_gradient_identity"]
    beta0, beta = case["beta0"], case["beta"]
    policy = torch.tensor(case["policy_logits"], dtype=torch.float64).requires_grad_()
    dpo, reference = (torch.tensor(case[name], dtype=torch.float64) for name in ("dpo_logits", "ref_logits"))
    probabilities, logprobs = policy.softmax(-1), policy.log_softmax(-1)
    reward = beta0 * (dpo.log_softmax(-1) - reference.log_softmax(-1))
    objective = (probabilities * (reward - beta * (logprobs - reference.log_softmax(-1)))).sum()
    (ascent,) = torch.autograd.grad(objective, policy)
    out = AlignDistil(variant="theorem1", beta0=beta0, beta=beta).losses(policy, dpo, reference)
    (descent,) = torch.autograd.grad(out.losses, policy)
    close(ascent, case["grad_rlhf_objective"])
    close(descent, case["grad_beta_kl"])
    torch.testing.assert_close(ascent, -descent, rtol=1e-9, atol=1e-12)


def test_the_four_variants_differ_in_where_they_start_and_in_whether_alpha_follows_the_models():
    student, dpo, other = (torch.randn(3, 7, generator=torch.Generator().manual_seed(i)) for i in range(3))
    alpha = 0.1 / 0.08
    fixed = AlignDistil(variant="theorem1_contrast").losses(student, dpo, other)
    torch.testing.assert_close(fixed.losses, 0.08 * reverse_kl(student, dpo + alpha * (dpo - other)))
    between = AlignDistil(variant="theorem1").losses(student, dpo, other)
    torch.testing.assert_close(between.losses, 0.08 * reverse_kl(student, alpha * dpo + (1 - alpha) * other))
    adaptive = AlignDistil(variant="theorem1_adaptive", scale=2.0).losses(student, dpo, other)
    moved = 2.0 * total_variation(dpo, other) + 1e-3
    torch.testing.assert_close(adaptive.alpha, moved)
    expected = 0.1 / moved * reverse_kl(student, other + moved[:, None] * (dpo - other))
    torch.testing.assert_close(adaptive.losses, expected)
    assert AlignDistil().other_model == "reverse_dpo"
    assert AlignDistil(variant="theorem1").other_model == "reference"


def test_models_that_agree_leave_the_dpo_model_as_the_target_and_the_weight_can_be_capped():
    student, dpo = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    out = AlignDistil().losses(student, dpo, dpo)
    assert out.total_variation.tolist() == [0.0]
    assert out.weight.tolist() == pytest.approx([100.0])  # beta0 / offset
    torch.testing.assert_close(out.kl, reverse_kl(student, dpo))
    capped = AlignDistil(weight_cap=2.0).losses(student, dpo, dpo)
    torch.testing.assert_close(capped.losses, 2.0 * out.kl)


def test_a_capped_extrapolation_moves_the_target_and_its_weight_together():
    student, dpo, other = torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    out = AlignDistil(extrapolation_cap=0.5).losses(student, dpo, other)
    assert out.alpha.tolist() == [0.5]
    assert out.weight.tolist() == pytest.approx([0.2])
    torch.testing.assert_close(out.kl, reverse_kl(student, dpo + 0.5 * (dpo - other)))


def test_a_student_that_is_the_target_has_no_loss_and_no_gradient():
    dpo, other = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.5, 0.0, 0.0]])
    alpha = AlignDistil(scale=1.0).losses(dpo, dpo, other).alpha
    student = (dpo + alpha[:, None] * (dpo - other) + 4.0).requires_grad_()  # a constant shift changes nothing
    out = AlignDistil(scale=1.0).losses(student, dpo, other)
    out.losses.sum().backward()
    assert out.losses.tolist() == pytest.approx([0.0], abs=1e-6)
    assert student.grad.abs().max().item() < 1e-6


def test_total_variation_is_a_half_of_the_difference_so_at_most_one():
    assert total_variation(torch.tensor([9e9, 0.0]), torch.tensor([0.0, 9e9])).item() == 1.0


def heads_and_hidden(positions, hidden=6, vocabulary=40, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(vocabulary, hidden, generator=generator, dtype=dtype) for _ in range(3)]
    states = [torch.randn(positions, hidden, generator=generator, dtype=dtype) for _ in range(3)]
    return heads, states


@pytest.mark.parametrize("positions", [1, 8, 13])
def test_chunks_give_the_loss_and_the_gradients_of_the_whole(positions):
    heads, states = heads_and_hidden(positions)
    weights = torch.linspace(0.1, 1.0, positions, dtype=torch.float64)
    grads = []
    for chunked in (False, True):
        head, hidden = heads[0].clone().requires_grad_(), states[0].clone().requires_grad_()
        method = AlignDistil(chunk_tokens=4)
        if chunked:
            calls = tuple((lambda h, w=w: h @ w.T) for w in (head, heads[1], heads[2]))
            out = method.losses_in_chunks(hidden, states[1], states[2], calls)
        else:
            out = method.losses(hidden @ head.T, states[1] @ heads[1].T, states[2] @ heads[2].T)
        (out.losses * weights).sum().backward()
        grads.append((out.losses.detach(), head.grad, hidden.grad, out.alpha))
    for whole, cut in zip(*grads, strict=True):
        torch.testing.assert_close(whole, cut, rtol=1e-9, atol=1e-12)
    assert grads[0][1].abs().max() > 0


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's result had."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def measured(positions, chunk_tokens=16, vocabulary=512, hidden=4):
    """Elements of the largest tensor made, forward and backward, and of all tensors kept from forward to backward."""
    heads, states = heads_and_hidden(positions, hidden, vocabulary, torch.float32)
    student, head = states[0].requires_grad_(), heads[0].requires_grad_()
    kept = 0

    def keep(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    calls = tuple((lambda h, w=w: h @ w.T) for w in (head, heads[1], heads[2]))
    with LargestTensor() as watch:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = AlignDistil(chunk_tokens=chunk_tokens).losses_in_chunks(student, states[1], states[2], calls)
            loss = out.losses.sum()
        loss.backward()
    assert student.grad.abs().max() > 0
    return watch.largest, kept


def test_no_tensor_of_tokens_times_vocabulary_ever_exists():
    few, kept_few = measured(64)
    many, kept_many = measured(1024)
    assert few == many == 16 * 512  # one chunk's logits
    per_position = (kept_many - kept_few) / (1024 - 64)
    assert per_position < 512 / 4  # what waits for the backward pass does not have the vocabulary's width


def test_empty_batches_half_precision_and_unlike_vocabularies():
    heads, states = heads_and_hidden(0)
    calls = tuple((lambda h, w=w: h @ w.T) for w in heads)
    assert AlignDistil().losses_in_chunks(*states, calls).losses.shape == (0,)
    half = torch.randn(2, 5, dtype=torch.bfloat16)
    assert AlignDistil().losses(half, half + 1, half * 2).losses.dtype == torch.float32
    with pytest.raises(ValueError, match=r"vocabularies of 5 \(student\), 6 \(dpo\) and 5 \(reverse_dpo\)"):
        AlignDistil().losses(torch.zeros(2, 5), torch.zeros(2, 6), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"got \[2, 1, 2\] positions"):
        AlignDistil().losses_in_chunks(torch.zeros(2, 5), torch.zeros(1, 5), torch.zeros(2, 5), calls)


def test_teachers_receive_no_gradient():
    student, dpo, other = (torch.randn(2, 4, requires_grad=True) for _ in range(3))
    AlignDistil().losses(student, dpo, other).losses.sum().backward()
    assert dpo.grad is None
    assert other.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("settings", [{"variant": "gkd"}, {"scale": 0.0}, {"weight_cap": -1.0}, {"chunk_tokens": 0}])
def test_what_cannot_be_is_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: got"):
        AlignDistil(**settings)
