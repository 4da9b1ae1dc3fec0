"""What a model's files say of its size, read without loading it: config.json and the headers of its weights."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.data.builtin import BUILDERS, PREFIX, cache_folder
from apportion.platform.errors import ConfigError, nearest

VALUE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}  # of model.dtype


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of one causal language model. `context` is None where the files do not say."""

    parameters: int
    layers: int
    hidden: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    context: int | None
    shapes: dict[str, tuple[int, int]]  # linear layers of one block by name: (inputs, outputs)

    def kv_bytes_per_token(self, value_bytes: int) -> int:
        return 2 * self.layers * self.key_value_heads * self.head_dim * value_bytes

    def lora_parameters(self, rank: int, targets: list[str]) -> int:
        """Trainable parameters of adapters on `targets`; unknown names are for peft to refuse."""
        return self.layers * sum(rank * sum(self.shapes[name]) for name in targets if name in self.shapes)


# What the builtin models will be once they are made.
_BUILTIN_CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m-instruct": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "apprentice": {
        "vocab_size": 428,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
}


def read_model(path: str, key: str = "model.path") -> ModelFacts | None:
    """The facts of a `builtin:` name, a folder, or a hub model that is in the local cache; None where nothing is known.

    ConfigError, under the configuration's `key`, for a builtin that does not exist or a folder that is no model's.
    """
    if path.startswith(PREFIX):
        name = path.removeprefix(PREFIX)
        if name not in BUILDERS:
            known = [PREFIX + builtin for builtin in BUILDERS]
            raise ConfigError(f"{key}: got {path!r}, expected one of {', '.join(known)}{nearest(path, known)}")
        folder = cache_folder() / "models" / BUILDERS[name][0]
        if (folder / "config.json").is_file():
            return _from_folder(folder)
        return _facts(_BUILTIN_CONFIGS[name], None) if name in _BUILTIN_CONFIGS else None
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ConfigError(
                f"{key}: got {path!r}, a folder without config.json, expected a Hugging Face model's folder"
            )
        return _from_folder(local)
    if path.startswith(("/", "./", "../", "~")):
        raise ConfigError(f"{key}: got {path!r}, which does not exist, expected a folder, a hub name or builtin:NAME")
    cached = _hub_snapshot(path)
    return _from_folder(cached) if cached is not None else None


def _hub_snapshot(name: str) -> Path | None:
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    found = sorted(hub.glob(f"models--{name.replace('/', '--')}/snapshots/*/config.json"))
    return found[-1].parent if found else None


def _from_folder(folder: Path) -> ModelFacts | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}/config.json: not readable ({error}), expected a model's configuration") from error
    config = config.get("text_config", config)  # a vision model's language part
    try:
        return _facts(config, _counted(folder))
    except KeyError:  # an architecture that writes its sizes in other words
        return None


def _counted(folder: Path) -> int | None:
    """Parameters in the headers of the safetensors files; None where there are no such files."""
    files = sorted(folder.glob("*.safetensors"))
    total = 0
    for file in files:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total if files else None


def _facts(config: dict[str, Any], counted: int | None) -> ModelFacts:
    """From a Llama-like configuration. `counted` parameters replace the estimate from the sizes."""
    hidden, layers, vocabulary = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    heads = config["num_attention_heads"]
    key_value_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    inner = config["intermediate_size"]
    queries, keys = heads * head_dim, key_value_heads * head_dim
    shapes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    block = sum(inputs * outputs for inputs, outputs in shapes.values()) + 2 * hidden
    embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return ModelFacts(
        parameters=counted or layers * block + embeddings + hidden,
        layers=layers,
        hidden=hidden,
        key_value_heads=key_value_heads,
        head_dim=head_dim,
        vocabulary=vocabulary,
        context=config.get("max_position_embeddings"),
        shapes=shapes,
    )
