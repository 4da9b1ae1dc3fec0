"""Models of random weights, so that nothing is downloaded, and batches for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# The shapes of Qwen2.5 0.5 B and 1.5 B, and one that two CPU cores run in a moment.
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
    "1.5B": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
}  # fmt: skip
COMMON = {"max_position_embeddings": 32768, "tie_word_embeddings": True}


def shape_for(device: str) -> str:
    """The shape that most parts take."""
    return "0.5B" if device == "cuda" else "tiny"


def random_model(
    shape: str, device: str, dtype: torch.dtype = torch.bfloat16, attention: str = "sdpa", checkpointing: bool = False
) -> Any:
    """A Qwen2 causal language model, the same weights every time."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(**COMMON, **SHAPES[shape], use_cache=False)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def save_model(shape: str, folder: Path, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """A folder that `from_pretrained` and vLLM load, with the tokenizer of builtin:tiny."""
    from transformers import AutoTokenizer, GenerationConfig

    from apportion.data.builtin import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("builtin:tiny"))
    model = random_model(shape, device, dtype)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**ends)
    for name, value in ends.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model_flops(model: Any, tokens: int, row_tokens: float) -> float:
    """FLOPs of a forward and a backward pass by the rule of the field: 6 a parameter and token, and 12 a layer for
    attention, halved since it is causal. What checkpointing computes again is not counted."""
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    attention = 6 * config.num_hidden_layers * config.hidden_size * row_tokens
    return tokens * (6 * parameters + attention)


def free(device: str) -> None:
    """Give memory of deleted tensors back, so that the next measurement starts from what lives."""
    import gc

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
