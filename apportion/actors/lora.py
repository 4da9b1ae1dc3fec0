"""Low-rank adapters, as the rollout engine must not know them: merged into the weights they adapt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

PREFIX = "model."  # CausalLMLogprobs.model
PEFT_PREFIX = "base_model.model."


def merged_weights(named: Iterator[tuple[str, Tensor]], lora: Any | None) -> Iterator[tuple[str, Tensor]]:
    """Names of training parameters to names of the Hugging Face checkpoint; `W + alpha / rank * B A` for adapted ones.

    A head that is the embedding comes once, as the embedding; one that only the configuration calls tied, as itself.
    A weight and its adapter's two factors come one after the other in a module, so only one layer is held at a time.
    """
    held: tuple[str, Tensor] | None = None
    factor: Tensor | None = None
    for full_name, tensor in named:
        name = full_name.removeprefix(PREFIX)
        if lora is None:
            yield name, tensor
            continue
        name = name.removeprefix(PEFT_PREFIX)
        if ".lora_A." in name:
            factor = tensor.float().clone()
        elif ".lora_B." in name:
            if held is None or factor is None:
                raise ValueError(f"{name}: an adapter without the weight it adapts before it")
            yield held[0], merged(held[1], factor, tensor, lora)
            held, factor = None, None
        elif ".base_layer." in name and not name.endswith(".weight"):  # a bias stands between a weight and its factors
            yield name.replace(".base_layer.", "."), tensor
        else:
            if held is not None:
                yield held
                held = None
            if ".base_layer." in name:
                held = (name.replace(".base_layer.", "."), tensor.clone())
            else:
                yield name, tensor
    if held is not None:
        yield held


def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, lora: Any) -> Tensor:
    """`W + alpha / rank * B A`, in float32 and rounded once."""
    sum_of_both = weight.float() + (lora.alpha / lora.rank) * (lora_b.float() @ lora_a.float())
    return sum_of_both.to(weight.dtype)


@contextmanager
def merged_forward(module: nn.Module, lora: Any | None) -> Iterator[None]:
    """Forward passes without a gradient compute with the merged weights, as engines do. No parameter changes.

    Each layer is called as always, so ZeRO-3 gathers its parameters; it answers with copies of them.
    """
    patched: list[nn.Module] = []
    try:
        for layer in module.modules() if lora is not None else []:
            if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
                parts = [layer.base_layer, *layer.lora_A.values(), *layer.lora_B.values()]
                for part in parts:
                    part.forward = partial(_parameters, part)
                layer.forward = partial(_merged_layer, parts, lora)
                patched += [*parts, layer]
        yield
    finally:
        for layer in patched:
            del layer.forward


def _parameters(layer: nn.Linear, _: Tensor) -> tuple[Tensor, Tensor | None]:
    return layer.weight.clone(), None if layer.bias is None else layer.bias.clone()


def _merged_layer(parts: list[nn.Module], lora: Any, x: Tensor) -> Tensor:
    (weight, bias), (lora_a, _), (lora_b, _) = (part(x) for part in parts)
    return nn.functional.linear(x, merged(weight, lora_a, lora_b, lora), bias)
