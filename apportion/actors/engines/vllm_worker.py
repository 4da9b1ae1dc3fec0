"""What runs inside vLLM's worker: takes weights, and holds the live model against what it was sent.

A live parameter still in checkpoint layout is compared bit by bit. vLLM on CPU repacks linear layers (nothing of the
original layout is left), so those are run on a probe vector and compared with the same product made from the sent weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.platform.weights import TensorEntry, WeightBundle, checksum

Answer = tuple[dict[str, str], int, list[str]]  # checksums of what was received, parameters checked live, wrong ones


class WeightReceiver:
    """Mixed into vLLM's worker class (`worker_extension_cls`)."""

    def apportion_load(self, bundle: WeightBundle, check: bool) -> Answer:
        self.reload_weights(weights_iterator=bundle.tensors())  # type: ignore[attr-defined]
        if not check:
            return {e.name: e.checksum for e in bundle.entries}, 0, []
        sums = {e.name: checksum(bundle.data[e.offset : e.offset + e.size]) for e in bundle.entries}
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        checked, wrong = compare_live(model, dict(bundle.tensors()))
        return sums, checked, wrong

    def apportion_load_file(self, path: str, index: list[tuple], check: bool) -> Answer:
        entries = [TensorEntry(n, d, tuple(s), o, z, c) for n, d, s, o, z, c in index]
        data = np.memmap(path, np.uint8, mode="r")
        return self.apportion_load(WeightBundle(0, entries, data), check)


def compare_live(model: torch.nn.Module, sent: dict[str, Tensor]) -> tuple[int, list[str]]:
    """How many live parameters were held against the sent ones, and the names of sent tensors that differ.

    Layers cut over tensor-parallel workers, or built from tensors this cannot name, are left to the checksums.
    """
    checked, wrong = 0, []
    for name, parts in live_parts(model, sent):
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        want = torch.cat([sent[p] for p in parts]) if len(parts) > 1 else sent[parts[0]]
        same = _holds(module, attribute, want)
        if same is None:
            continue
        checked += 1
        if not same:
            wrong.extend(parts)
    return checked, wrong


def live_parts(model: torch.nn.Module, sent: dict[str, Tensor]) -> Iterator[tuple[str, list[str]]]:
    """Each live parameter with the sent tensors that it is made of (`qkv_proj` of `q_proj`, `k_proj`, `v_proj`)."""
    fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    for name, _ in model.named_parameters():
        if name in sent:
            yield name, [name]
            continue
        for whole, parts in fused.items():
            names = [name.replace(f".{whole}.", f".{part}.") for part in parts]
            if f".{whole}." in name and all(n in sent for n in names):
                yield name, names


def _holds(module: Any, attribute: str, want: Tensor) -> bool | None:
    """None: this layer cannot be compared here."""
    live = getattr(module, attribute)
    if live.numel():
        if live.shape != want.shape:
            return None  # a shard, or padded
        return torch.equal(live.detach().cpu(), want.to(live.dtype))
    method = getattr(module, "quant_method", None)
    if method is None or want.ndim != 2 or attribute != "weight":
        return None
    probe = _probe(want)
    if getattr(module, "input_size_per_partition", want.shape[1]) != want.shape[1]:
        return None
    got = method.apply(module, probe, None).float()
    if got.shape[-1] != want.shape[0]:
        return None
    right = probe.float() @ want.float().T
    # Both sum the same products, in another order and rounded to bf16 once: 2^-8 of the terms' magnitude bounds it.
    scale = probe.float().abs() @ want.float().abs().T
    tolerance = 2.0**-7 * right.abs() + 2.0**-13 * scale + 1e-6
    return bool(((got - right).abs() <= tolerance).all())


def _probe(want: Tensor) -> Tensor:
    """A +-1 vector [1, in], from the layer's shape alone, so that every call and every machine probes alike."""
    digest = hashlib.blake2b(repr(tuple(want.shape)).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    signs = torch.randint(0, 2, (1, want.shape[1]), generator=generator) * 2 - 1
    return signs.to(want.dtype)
