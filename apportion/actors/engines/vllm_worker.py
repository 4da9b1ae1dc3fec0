"""What runs inside vLLM's worker: takes weights, and holds the live model against what it was sent.

A live parameter still in checkpoint layout is compared bit by bit. vLLM on CPU repacks linear layers, and may drop the
original; such a layer is run on unit vectors, each of which gives one column of its matrix exactly (a product with 1 and
sums with 0 round nothing), so that too is compared bit by bit. Reading a whole model back takes longer than loading it,
so each sync reads one column in `TURNS` of every such layer, others than the sync before: a layer that kept earlier
weights, or got another's, is found at once, a single wrong number within `TURNS` syncs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.platform.channel import ChannelAddress, WeightChannel
from apportion.platform.weights import TensorEntry, WeightBundle, checksum, receive

Answer = tuple[dict[str, str], int, list[str]]  # checksums of what was received, parameters checked live, wrong ones
COLUMNS_AT_A_TIME = 256  # of a repacked matrix read back
TURNS = 8  # syncs after which every column has been read back


class WeightReceiver:
    """Mixed into vLLM's worker class (`worker_extension_cls`)."""

    def apportion_load(self, bundle: WeightBundle, check: bool) -> Answer:
        """Load, and with `check` prove it."""
        self.reload_weights(weights_iterator=bundle.tensors())  # type: ignore[attr-defined]
        repack_shared(self.model_runner.get_model())  # type: ignore[attr-defined]
        if not check:
            return {e.name: e.checksum for e in bundle.entries}, 0, []
        sums = {e.name: checksum(bundle.data[e.offset : e.offset + e.size]) for e in bundle.entries}
        checked, wrong = self.apportion_compare(bundle, bundle.version % TURNS)
        return sums, checked, wrong

    def apportion_load_file(self, path: str, index: list[tuple], version: int, check: bool) -> Answer:
        """As `apportion_load`, where the worker is a process of its own: the bytes lie in a file in shared memory."""
        entries = entries_of(index)
        data = np.memmap(path, np.uint8, mode="r")
        return self.apportion_load(WeightBundle(version, entries, data), check)

    def apportion_join(self, address: tuple, first_member: int) -> None:
        """Become a member of the channel that `apportion_receive` takes weights from."""
        from vllm.distributed import get_tensor_model_parallel_rank

        member = first_member + get_tensor_model_parallel_rank()
        self.apportion_channel = WeightChannel(ChannelAddress(*address), member, self.device)  # type: ignore[attr-defined]

    def apportion_receive(self, index: list[tuple], version: int, check: bool) -> Answer:
        """As `apportion_load`, with the bytes from the channel."""
        entries = entries_of(index)
        return self.apportion_load(WeightBundle(version, entries, receive(self.apportion_channel, entries)), check)

    def apportion_compare(self, bundle: WeightBundle, turn: int | None = None) -> tuple[int, list[str]]:
        """The live model against a bundle, without loading it. `turn`: see `compare_live`."""
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        share = (get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        return compare_live(self.model_runner.get_model(), dict(bundle.tensors()), share, turn)  # type: ignore[attr-defined]


def entries_of(index: list[tuple]) -> list[TensorEntry]:
    """What `index_of` was made from, on the other side of a process boundary."""
    return [TensorEntry(n, d, tuple(s), o, z, c) for n, d, s, o, z, c in index]


def index_of(entries: Iterable[TensorEntry]) -> list[tuple[str, str, list[int], int, int, str]]:
    return [(e.name, e.dtype, list(e.shape), e.offset, e.size, e.checksum) for e in entries]


@torch.no_grad()
def repack_shared(model: torch.nn.Module) -> None:
    """Pack anew what a module borrows from another (a tied lm_head). vLLM on CPU packs a matrix when it is loaded for the
    module itself, so a borrower would keep the packed copy of the earlier weights."""
    users: dict[int, list[Any]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(id(weight), []).append(module)
    for modules in users.values():
        for module in modules if len(modules) > 1 else []:
            if hasattr(module, "cpu_linear") and hasattr(module, "quant_method"):
                module.quant_method.process_weights_after_loading(module)


@torch.no_grad()
def compare_live(
    model: torch.nn.Module, sent: dict[str, Tensor], share: tuple[int, int] = (0, 1), turn: int | None = None
) -> tuple[int, list[str]]:
    """How many live parameters were held against the sent ones, and the names of sent tensors that differ.

    `turn` (0 to TURNS - 1): of repacked matrices read every TURNS-th column, from this one on; None reads them whole.
    `share`: which of how many tensor-parallel workers this is. Layers that are not cut evenly over them (a padded
    vocabulary, repeated key-value heads), or built from tensors this cannot name, are left to the checksums.
    """
    checked, wrong = 0, []
    for module_name, attribute, parts in live_parts(model, sent):
        module = model.get_submodule(module_name)
        views = _views(module, attribute, turn)
        if share[1] > 1 and len(parts) == 1 and len(getattr(module, "output_sizes", None) or [0]) > 1:
            continue  # fused on disk too (Phi-3): its share is not one run of rows
        answers = [_wrong_parts(view, parts, sent, share) for view in views]
        if not answers or any(answer is None for answer in answers):
            continue
        checked += 1
        wrong += [name for answer in answers for name in answer or []]
    return checked, list(dict.fromkeys(wrong))


def live_parts(model: torch.nn.Module, sent: dict[str, Tensor]) -> Iterator[tuple[str, str, list[str]]]:
    """Each live parameter, as module and attribute, with the sent tensors it is made of (`qkv_proj` of `q_proj`,
    `k_proj`, `v_proj`). One that two modules share (tied embeddings) comes once for each, since each may have repacked it.
    """
    fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    made_of: dict[int, list[str]] = {}
    shared: list[tuple[str, int]] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts = [name] if name in sent else _fused_names(name, fused, sent)
        if parts:
            made_of[id(parameter)] = parts
            yield *_split(name), parts
        else:
            shared.append((name, id(parameter)))
    for name, key in shared:
        if key in made_of:
            yield *_split(name), made_of[key]


def _fused_names(name: str, fused: dict[str, list[str]], sent: dict[str, Tensor]) -> list[str]:
    for whole, parts in fused.items():
        names = [name.replace(f".{whole}.", f".{part}.") for part in parts]
        if f".{whole}." in name and all(n in sent for n in names):
            return names
    return []


def _split(name: str) -> tuple[str, str]:
    module, _, attribute = name.rpartition(".")
    return module, attribute


class _Stored:
    """A parameter as it lies in memory."""

    def __init__(self, live: Tensor) -> None:
        self.live = live.detach()
        self.shape = tuple(live.shape)

    def rows(self, start: int, end: int) -> Iterator[tuple[slice, Tensor]]:
        """Pieces of rows `start` to `end`: which columns, and their values."""
        yield slice(None), self.live[start:end].cpu()


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
    shape = _matrix_shape(module)
    if attribute == "weight" and shape and hasattr(module, "cpu_linear") and hasattr(module, "quant_method"):
        views.append(_Repacked(module, shape, turn))
    return views


def _matrix_shape(module: Any) -> tuple[int, int] | None:
    """[out, in] of this worker's part of a layer, from what vLLM says of it where the matrix itself is gone."""
    if module.weight.ndim == 2:
        return tuple(module.weight.shape)
    width, height = (
        getattr(module, "input_size_per_partition", None),
        getattr(module, "output_size_per_partition", None),
    )
    return (height, width) if width and height else None


def _wrong_parts(
    view: _Stored | _Repacked, parts: list[str], sent: dict[str, Tensor], share: tuple[int, int]
) -> list[str] | None:
    """Names of `parts` that this view does not hold. None: they cannot be compared here."""
    wants = _wanted(view.shape, [sent[name] for name in parts], share)
    if wants is None:
        return None
    wrong, start = [], 0
    for name, want in zip(parts, wants, strict=True):
        same = all(
            torch.equal(got, want[:, columns].to(got.dtype) if want.ndim > 1 else want.to(got.dtype))
            for columns, got in view.rows(start, start + len(want))
        )
        if not same:
            wrong.append(name)
        start += len(want)
    return wrong


def _wanted(shape: tuple[int, ...], wants: list[Tensor], share: tuple[int, int]) -> list[Tensor] | None:
    """What should stand in a layer of this shape: the tensors, or this worker's even share of their rows or columns."""
    fits = lambda tensors: (sum(map(len, tensors)), *tensors[0].shape[1:]) == shape  # noqa: E731
    # A vocabulary is padded at its end.
    padded = len(wants) == 1 and len(wants[0]) < shape[0] and tuple(wants[0].shape[1:]) == shape[1:]
    if fits(wants) or (padded and share[1] == 1):
        return wants
    place, workers = share
    for axis in range(wants[0].ndim if workers > 1 else 0):
        sizes = [want.shape[axis] // workers for want in wants]
        cut = [want.narrow(axis, place * size, size) for want, size in zip(wants, sizes, strict=True)]
        if fits(cut) and all(want.shape[axis] % workers == 0 for want in wants):
            return cut
    return None
