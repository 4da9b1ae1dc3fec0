"""The live model of a vLLM worker, compared bit by bit with what it was sent.

A live parameter still in checkpoint layout is read as it lies in memory. vLLM on CPU repacks linear layers, and may drop
the original; such a layer is run on unit vectors, each of which gives one column of its matrix exactly (a product with 1
and sums with 0 round nothing). Reading a whole model back takes longer than loading it, so each sync reads one column in
`TURNS` of every such layer, others than the sync before: a layer that kept earlier weights, or got another's, is found
at once, a single wrong number within `TURNS` syncs. Experts that are repacked are compared whole, with the expected
matrix packed in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apportion.actors.engines.vllm_layout import (
    Block,
    expected_blocks,
    expected_expert,
    expert_names,
    is_experts,
    live_names,
    live_parts,
)

COLUMNS_AT_A_TIME = 256  # of a repacked matrix read back
TURNS = 8  # syncs after which every column has been read back
EXPERT_PARAMETERS = ("w13_weight", "w13_bias", "w2_weight", "w2_bias")
KEPT_LAYOUTS = ("TRITON", "BATCHED_TRITON")  # vLLM's kernels that use experts in the checkpoint's order


class Compared(NamedTuple):
    """What one worker found."""

    checked: int  # live parameters
    wrong: list[str]  # tensors that a live parameter does not hold
    proved: list[str]  # tensors that every live parameter made of them was compared with
    read_bytes: int  # of live parameters, read back


class _Tally:
    def __init__(self) -> None:
        self.checked, self.read_bytes = 0, 0
        self.wrong: list[str] = []
        self.compared: dict[str, bool] = {}  # by tensor: whether nothing made of it was left out

    def add(self, names: list[str], wrong: list[str] | None, read_bytes: int = 0) -> None:
        """One live parameter's answer. `wrong` None: it could not be compared."""
        for name in names:
            self.compared[name] = self.compared.get(name, True) and wrong is not None
        self.checked += wrong is not None
        self.wrong += wrong or []
        self.read_bytes += read_bytes

    def result(self) -> Compared:
        proved = [name for name, whole in self.compared.items() if whole]
        return Compared(self.checked, list(dict.fromkeys(self.wrong)), proved, self.read_bytes)


class _Comparison:
    """One pass over the live model."""

    def __init__(
        self, model: torch.nn.Module, sent: Mapping[str, Tensor], share: tuple[int, int], turn: int | None
    ) -> None:
        self.sent, self.share, self.turn = sent, share, turn
        self.names = live_names(model, sent)
        self.tally = _Tally()

    def blocks(self, parts: list[str]) -> list[Block]:
        return [Block(self.names[part], self.sent[self.names[part]]) for part in parts]

    def parameter(self, module: Any, attribute: str, parts: list[str]) -> None:
        blocks = self.blocks(parts)
        views = _views(module, attribute, self.turn)
        wrong: list[str] | None = [] if views else None
        read_bytes = 0
        for view in views:
            expected = expected_blocks(module, view.shape, blocks, self.share)
            if expected is None or wrong is None:
                wrong = None
            else:
                bad, size = _differing(view, expected)
                wrong, read_bytes = wrong + bad, read_bytes + size
        self.tally.add([b.name for b in blocks], wrong, read_bytes)

    def experts(self, module: Any, attribute: str, experts: list[list[str]]) -> None:
        """A fused layer of experts, one expert at a time. Both components of a pair are named if one is wrong."""
        live, form = getattr(module, attribute).detach(), _expert_form(module, attribute)
        known = [part for parts in experts for part in parts if part in self.names]
        if (
            form is None
            or len(experts) != len(live)
            or any(part not in self.names for parts in experts for part in parts)
        ):
            self.tally.add([self.names[part] for part in known], None)
            return
        wrong: list[str] = []
        for expert, parts in enumerate(experts):
            blocks = self.blocks(parts)
            expected = form(expected_expert(attribute, blocks, self.share).to(live.device, live.dtype))
            if expected.shape != live[expert].shape or not torch.equal(live[expert], expected):
                wrong += [b.name for b in blocks]
        self.tally.add([self.names[part] for part in known], wrong, live.nbytes)


@torch.no_grad()
def compare_live(
    model: torch.nn.Module, sent: Mapping[str, Tensor], share: tuple[int, int] = (0, 1), turn: int | None = None
) -> Compared:
    """Compare the live parameters with the sent tensors, which have the checkpoint's names.

    `turn` (0 to TURNS - 1): of repacked matrices read every TURNS-th column, from this one on; None reads them whole.
    `share`: which of how many tensor-parallel workers this is.
    """
    comparison = _Comparison(model, sent, share, turn)
    for module_name, attribute, parts in live_parts(model, comparison.names):
        comparison.parameter(model.get_submodule(module_name), attribute, parts)
    for module_name, module in model.named_modules():
        for attribute in EXPERT_PARAMETERS if is_experts(module) else ():
            if getattr(module, attribute, None) is not None:
                comparison.experts(module, attribute, expert_names(module_name, module, attribute))
    return comparison.tally.result()


def _expert_form(module: Any, attribute: str) -> Callable[[Tensor], Tensor] | None:
    """How the layer's kernel stores one expert's matrix; None where that is not known."""
    method = getattr(module, "quant_method", None)
    backend = getattr(getattr(method, "unquantized_backend", None), "name", None)
    if not attribute.endswith("_weight") or backend in KEPT_LAYOUTS:
        return lambda matrix: matrix
    if backend == "CPU":
        return cpu_packing(module)
    if backend == "FLASHINFER_CUTLASS":  # up projection first
        return lambda matrix: torch.cat(matrix.chunk(2)[::-1]) if attribute.startswith("w13") else matrix
    return None


def cpu_packing(module: Any) -> Callable[[Tensor], Tensor] | None:
    """How vLLM on CPU packs an expert's matrix; None where it does not."""
    kernel = getattr(getattr(getattr(module, "quant_method", None), "moe_kernel", None), "fused_experts", None)
    instructions = getattr(kernel, "isa", None)
    if instructions is None:
        return None
    if getattr(kernel, "_use_zentorch", False):
        return lambda matrix: matrix
    from vllm._custom_ops import cpu_prepack_moe_weight

    return lambda matrix: cpu_prepack_moe_weight(matrix[None].contiguous(), instructions)[0]


class _Stored:
    """A parameter as it lies in memory."""

    def __init__(self, live: Tensor) -> None:
        self.live = live.detach()
        self.shape = tuple(live.shape)

    def rows(self, start: int, end: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows `start` to `end`, some columns at a time: which columns, and their values."""
        yield slice(None), self.live[start:end].cpu() if self.shape else self.live.cpu()


class _Repacked:
    """The matrix of a linear layer, read back through the layer itself."""

    def __init__(self, module: Any, shape: tuple[int, int], turn: int | None = None) -> None:
        self.module, self.shape = module, shape
        self._first, self._step = (0, 1) if turn is None else (turn, TURNS)
        self._columns: list[tuple[slice, Tensor]] = []

    def rows(self, start: int, end: int) -> Iterator[tuple[slice, Tensor]]:
        if not self._columns:
            self._columns = list(self._read())
        for columns, values in self._columns:
            yield columns, values[:, start:end].T

    def _read(self) -> Iterator[tuple[slice, Tensor]]:
        width, step = self.shape[1], self._step
        for first in range(self._first, width, COLUMNS_AT_A_TIME * step):
            columns = slice(first, min(width, first + COLUMNS_AT_A_TIME * step), step)
            chosen = torch.arange(width)[columns]
            unit = torch.zeros(len(chosen), width, dtype=self.module.weight.dtype)
            unit[torch.arange(len(chosen)), chosen] = 1
            yield columns, self.module.quant_method.apply(self.module, unit, None)


def _views(module: Any, attribute: str, turn: int | None) -> list[_Stored | _Repacked]:
    """Every form in which the layer holds this parameter."""
    live = getattr(module, attribute)
    views: list[_Stored | _Repacked] = [_Stored(live)] if live.numel() else []
    if attribute == "weight" and hasattr(module, "cpu_linear") and hasattr(module, "quant_method"):
        shape = _matrix_shape(module, live)
        if shape is not None:
            views.append(_Repacked(module, shape, turn))
    return views


def _matrix_shape(module: Any, weight: Tensor) -> tuple[int, int] | None:
    """[out, in] of this worker's share of a layer, from what vLLM says of it where the matrix itself is gone."""
    if weight.ndim == 2:
        return weight.shape[0], weight.shape[1]
    width = getattr(module, "input_size_per_partition", None) or getattr(module, "input_size", None)
    height = getattr(module, "output_size_per_partition", None) or getattr(module, "output_size", None)
    return (height, width) if width and height else None


def _differing(view: _Stored | _Repacked, expected: list[Block]) -> tuple[list[str], int]:
    """Names of the tensors that this view does not hold, and how many bytes of it were read."""
    wrong, size, start = [], 0, 0
    for name, want in expected:
        height = len(want) if want.ndim else 0
        same = True
        for columns, got in view.rows(start, start + height):
            value = want[:, columns] if want.ndim > 1 else want
            same = same and torch.equal(got, value.to(got.dtype))
            size += got.nbytes
        if not same:
            wrong.append(name)
        start += height
    return wrong, size
