"""Attention over packed sequences without an S x S mask: torch's variable-length kernel and flex_attention.

The trainer uses neither yet. These parts say whether they are right and how fast they are on this device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import GIB, peak_bytes, relative_error, seconds_of
from benchmarks.gpu.report import Part, Record, Skipped

HEADS, WIDTH = 12, 128  # of a 1.5 B model
ERROR_BOUND = 0.02  # bf16, forward and backward, against the masked reference in bf16
LENGTHS = (2048, 1024, 1536, 512, 768, 256, 1280, 768)  # 8192 tokens
PROMPT, RESPONSES = 1024, 7  # 1024 tokens each: 8192 with the prompt
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def tensors() -> tuple[list[Tensor], Tensor]:
    """q, k, v [1, H, S, D] that want gradients, and a gradient of the output."""
    torch.manual_seed(3)
    shape = (1, HEADS, sum(LENGTHS), WIDTH)
    made = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    return [t.requires_grad_() for t in made[:3]], made[3]


def masked(visible: Tensor) -> Attend:
    """What the trainer does today: sdpa with an S x S bool mask."""
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def document_ids() -> Tensor:
    return torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).cuda()


def segment_ids() -> Tensor:
    """0 for the prompt, 1.. for the responses, as `microbatch.Tree` has them."""
    return torch.repeat_interleave(torch.arange(RESPONSES + 1), PROMPT).cuda()


def visible_of(sees: Callable[[Tensor, Tensor], Tensor], size: int) -> Tensor:
    """bool [S, S] of a rule over query and key positions."""
    places = torch.arange(size, device="cuda")
    return sees(places[:, None], places[None, :])


def compare(record: Record, label: str, sides: dict[str, Attend]) -> None:
    """The first side against the second, which is the reference: output and gradients, time, peak memory."""
    inputs, out_gradient = tensors()

    def both_passes(attend: Attend) -> list[Tensor]:
        out = attend(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, out_gradient)]

    found, wanted = (both_passes(attend) for attend in sides.values())
    for name, value, reference in zip(("output", "dq", "dk", "dv"), found, wanted, strict=True):
        record.hold(f"{label}: relative error, {name}", relative_error(value, reference), ERROR_BOUND)
    for name, attend in sides.items():
        forward = 1000 * seconds_of(partial(attend, *inputs), "cuda")
        record.say(f"{label}, {name}: ms forward", forward, "ms")
        both = partial(both_passes, attend)
        record.say(f"{label}, {name}: ms forward and backward", 1000 * seconds_of(both, "cuda"), "ms")
        record.say(f"{label}, {name}: peak memory", peak_bytes(both) / GIB, "GiB")


def variable_length(offsets: Tensor, longest: int) -> Attend:
    """`varlen_attn`, causal. Its way to say so has changed: `is_causal` before, a window now."""
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [t[0].transpose(0, 1) for t in (q, k, v)]
        out = varlen_attn(*rows, offsets, offsets, longest, longest, **causal)
        return out.transpose(0, 1)[None]

    return attend


def run_varlen(record: Record) -> None:
    need_gpu(record)
    try:
        import torch.nn.attention.varlen
    except ImportError as error:
        raise Skipped(f"torch {torch.__version__} lacks torch.nn.attention.varlen") from error
    ids = document_ids()
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).to("cuda", torch.int32)
    reference = masked(visible_of(lambda q, k: (k <= q) & (ids[q] == ids[k]), len(ids)))
    sides = {"varlen": variable_length(offsets, max(LENGTHS)), "masked sdpa": reference}
    compare(record, "packed rows", sides)


def run_flex(record: Record) -> None:
    need_gpu(record)
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        raise Skipped(f"torch {torch.__version__} lacks torch.nn.attention.flex_attention") from error
    compiled = torch.compile(flex_attention)
    documents, segments = document_ids(), segment_ids()
    rules: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "packed rows": lambda q, k: (k <= q) & (documents[q] == documents[k]),
        "shared prompt": tree_rule(segments),
    }
    size = sum(LENGTHS)
    for label, sees in rules.items():
        blocks = create_block_mask(mask_rule(sees), None, None, size, size, device="cuda")
        attend = lambda q, k, v, blocks=blocks: compiled(q, k, v, block_mask=blocks)  # noqa: E731
        compare(record, label, {"flex": attend, "masked sdpa": masked(visible_of(sees, size))})


def tree_rule(segments: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What `microbatch.Tree.visible` says of a row without padding."""
    return lambda q, k: (k <= q) & ((segments[k] == 0) | (segments[q] == segments[k]))


def mask_rule(sees: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A rule for each batch row and head alike."""
    return lambda batch, head, query, key: sees(query, key)


def need_gpu(record: Record) -> None:
    if not record.on_gpu:
        raise Skipped("needs a GPU: torch has no such kernel with a backward pass on a CPU")


VARLEN = Part("varlen", "variable-length attention against the masked reference", run_varlen)
FLEX = Part("flex", "flex_attention with block masks against the masked reference", run_flex, 180)
