"""What one of vLLM's workers must hold of each parameter: which sent tensors, and which rows or columns of them.

Layers are recognized by the attributes that vLLM's own loaders shard by, so this module imports neither vLLM nor a
model.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Block(NamedTuple):
    """Consecutive rows of a live parameter: of which sent tensor, and their values."""

    name: str
    rows: Tensor


def live_names(model: Any, names: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name under which vLLM's modules know a checkpoint's tensor, the checkpoint's name."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return {name: name for name in names}
    renames = mapper.get_rename_mapper()
    return {renames.map_name(name): name for name in names} | {name: name for name in names}


def fused_layers(model: nn.Module) -> dict[str, list[str]]:
    """Layers that vLLM joins, and the checkpoint's layers that they are made of: `qkv_proj` of `q_proj`, ..."""
    fused: dict[str, list[str]] = {}
    for module in model.modules():
        stacked = getattr(getattr(module, "hf_to_vllm_mapper", None), "orig_to_new_stacked", {})
        found: dict[str, list[str]] = {}
        for part, (whole, _) in stacked.items():
            found.setdefault(whole.strip("."), []).append(part.strip("."))
        fused |= {whole: parts for whole, parts in found.items() if whole not in fused}
    return fused | getattr(model, "packed_modules_mapping", {})


def live_parts(model: nn.Module, names: Container[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Each live parameter, as module and attribute, with the names of the tensors it is made of. One that two modules
    share (tied embeddings) comes once for each, since each may have repacked it."""
    fused = fused_layers(model)
    made_of: dict[int, list[str]] = {}
    shared: list[tuple[str, int]] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts = [name] if name in names else _fused_names(name, fused, names)
        if parts:
            made_of[id(parameter)] = parts
            yield *_split(name), parts
        else:
            shared.append((name, id(parameter)))
    for name, key in shared:
        if key in made_of:
            yield *_split(name), made_of[key]


def _fused_names(name: str, fused: dict[str, list[str]], names: Container[str]) -> list[str]:
    for whole, parts in fused.items():
        found = [name.replace(f".{whole}.", f".{part}.") for part in parts]
        if f".{whole}." in name and all(n in names for n in found):
            return found
    return []


def _split(name: str) -> tuple[str, str]:
    module, _, attribute = name.rpartition(".")
    return module, attribute


def expected_blocks(
    module: Any, shape: tuple[int, ...], parts: list[Block], share: tuple[int, int]
) -> list[Block] | None:
    """What a parameter [shape] of this layer must hold, in the order of its rows; rows that only pad it come last and are
    left out. None: the sent tensors do not make up such a parameter.

    `share`: which of how many tensor-parallel workers this is.
    """
    place, workers = share if getattr(module, "tp_size", share[1]) == share[1] else (0, 1)  # some layers are on all
    heights = _full_heights(module)
    if heights and len(parts) == 1 and len(parts[0].rows) == sum(heights):  # fused on disk too (Phi-3)
        parts = [Block(parts[0].name, rows) for rows in parts[0].rows.split(heights)]
    if hasattr(module, "shard_indices") and len(parts) == 1:
        return _vocabulary_share(module.shard_indices, shape, parts[0])
    if hasattr(module, "num_kv_head_replicas") and len(parts) == 3:
        heads = [place, place // module.num_kv_head_replicas, place // module.num_kv_head_replicas]
        sizes = [module.num_heads * module.head_size, module.num_kv_heads * module.head_size]
        sizes.append(module.num_kv_heads * getattr(module, "v_head_size", module.head_size))
        if any((head + 1) * size > len(b.rows) for b, head, size in zip(parts, heads, sizes, strict=True)):
            return None
        cut = [
            Block(b.name, b.rows.narrow(0, head * size, size))
            for b, head, size in zip(parts, heads, sizes, strict=True)
        ]
        return cut if _fits(cut, shape) else None
    return _even_share(shape, parts, place, workers)


def _full_heights(module: Any) -> list[int] | None:
    """Rows of each component of a fused layer in the checkpoint, before it is sharded."""
    if hasattr(module, "num_kv_head_replicas"):
        keys = module.total_num_kv_heads * module.head_size
        values = module.total_num_kv_heads * getattr(module, "v_head_size", module.head_size)
        return [module.total_num_heads * module.head_size, keys, values]
    sizes = getattr(module, "output_sizes", None)
    return list(sizes) if sizes and len(sizes) > 1 else None


def _vocabulary_share(indices: Any, shape: tuple[int, ...], part: Block) -> list[Block] | None:
    """This worker's tokens. A vocabulary is padded to a multiple of the workers, at its end."""
    start, end = indices.org_vocab_start_index, indices.org_vocab_end_index
    if end > len(part.rows) or end - start > shape[0] or tuple(part.rows.shape[1:]) != tuple(shape[1:]):
        return None
    return [Block(part.name, part.rows[start:end])]


def _even_share(shape: tuple[int, ...], parts: list[Block], place: int, workers: int) -> list[Block] | None:
    """The tensors, or this worker's even share of their rows or columns."""
    if _fits(parts, shape):
        return parts
    if not shape or any(b.rows.ndim != len(shape) for b in parts):
        return None
    padded = len(parts) == 1 and len(parts[0].rows) < shape[0] and tuple(parts[0].rows.shape[1:]) == tuple(shape[1:])
    if padded and workers == 1:
        return parts
    for axis in range(parts[0].rows.ndim if workers > 1 else 0):
        sizes = [b.rows.shape[axis] // workers for b in parts]
        cut = [Block(b.name, b.rows.narrow(axis, place * s, s)) for b, s in zip(parts, sizes, strict=True)]
        if _fits(cut, shape) and all(b.rows.shape[axis] % workers == 0 for b in parts):
            return cut
    return None


def _fits(parts: list[Block], shape: tuple[int, ...]) -> bool:
    if any(b.rows.ndim == 0 for b in parts):
        return len(parts) == 1 and shape == ()
    return (sum(len(b.rows) for b in parts), *parts[0].rows.shape[1:]) == tuple(shape)


def is_experts(module: Any) -> bool:
    return hasattr(module, "w13_weight") and hasattr(module, "w2_weight") and hasattr(module, "get_expert_mapping")


def expert_names(module_name: str, module: Any, attribute: str) -> list[list[str]]:
    """The checkpoint's names of what each expert's row of `w13_weight` or `w2_weight` is made of, in this order."""
    root = module_name.rpartition(".experts")[0]
    stem, _, kind = attribute.partition("_")
    names: dict[int, dict[str, str]] = {}
    for parameter, name, expert, shard in module.get_expert_mapping():
        if parameter.rpartition(".")[2].startswith(f"{stem}_"):
            names.setdefault(expert, {})[shard] = f"{root}.{name}{kind}" if root else f"{name}{kind}"
    order = ("w1", "w3") if stem == "w13" else ("w2",)
    return [[shards[s] for s in order if s in shards] for _, shards in sorted(names.items())]


def expected_expert(attribute: str, parts: list[Block], share: tuple[int, int]) -> Tensor:
    """What a worker holds of one expert: its even share of the intermediate size."""
    place, workers = share
    axis = 0 if attribute.startswith("w13") else parts[0].rows.ndim - 1
    sizes = [b.rows.shape[axis] // workers for b in parts]
    return torch.cat([b.rows.narrow(axis, place * s, s) for b, s in zip(parts, sizes, strict=True)])
