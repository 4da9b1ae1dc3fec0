"""Low-rank adapters, as the rollout engine must not know them: merged into the weights they adapt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

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
            weight = held[1].float() + (lora.alpha / lora.rank) * (tensor.float() @ factor)
            yield held[0], weight.to(held[1].dtype)
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
