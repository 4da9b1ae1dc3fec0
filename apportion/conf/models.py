"""What a model's files say of its size, read without loading it: config.json and the headers of its weights."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.conf.model_files import (
    INDEX,
    check_fit,
    check_sizes,
    check_tokenizer,
    check_weights,
    missing_shards,
    read_json,
    tensors_of,
)
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
    tied: bool = False  # the output head is the embedding
    head_norms: bool = False  # queries and keys have a norm in each head

    def kv_bytes_per_token(self, value_bytes: int) -> int:
        return 2 * self.layers * self.key_value_heads * self.head_dim * value_bytes

    def lora_parameters(self, rank: int, targets: list[str]) -> int:
        """Trainable parameters of adapters on `targets`; unknown names are for peft to refuse."""
        return self.layers * sum(rank * sum(self.shapes[name]) for name in targets if name in self.shapes)


@dataclass(frozen=True)
class ModelLimits:
    """What a model can read, which more architectures write in the same words than their sizes. None: not known."""

    vocabulary: int | None = None
    context: int | None = None


_NEEDED = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "intermediate_size")
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
    config, folder = _described(path, key)
    if not all(isinstance(config.get(name), int) for name in _NEEDED) or any(
        isinstance(config.get(name), list) for name in ("num_key_value_heads", "head_dim")
    ):
        return None  # nothing is known, or an architecture that writes its sizes in other words or for each layer
    return _facts(config, _counted(folder))


def read_limits(path: str, key: str = "model.path") -> ModelLimits:
    """As `read_model`, of what can be read of any architecture."""
    config, _ = _described(path, key)
    return ModelLimits(config.get("vocab_size"), config.get("max_position_embeddings", config.get("n_positions")))


def read_description(path: str, key: str = "model.path") -> dict[str, Any]:
    """The model's configuration as its files say it (a vision model's language part); empty where nothing is known."""
    return _described(path, key)[0]


def check_targets(targets: list[str], path: str) -> None:
    """ConfigError for a LoRA target that is no layer of the model, as far as its files name its layers."""
    config, folder = _described(path, "model.path")
    if "quantization_config" in config or _lacks_weights(folder):  # names of other tensors, or not all
        return
    names = {name.removesuffix(".weight") for name, shape in tensors_of(folder).items() if len(shape) == 2}
    if folder is None and config:
        names = set(_facts(config, None).shapes)
    if not names or any(".experts." in name for name in names):  # those are joined when they are loaded
        return
    for target in targets:
        if target != "lm_head" and not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names if "embed" not in name})
            raise ConfigError(
                f"policy.lora.targets: got {target!r}, expected names of layers of {path}: {', '.join(known)}"
                f"{nearest(target, known)}"
            )


def check_rows_of_several(path: str, longest: int, key: str) -> None:
    """ConfigError for a model that would not keep several sequences in one row apart, or would let them look back further
    than it does: only a mask does that, and it reaches neither recurrent layers nor a sliding window."""
    config, _ = _described(path, "model.path")
    kinds = set(config.get("layer_types") or ())
    others = sorted(kinds - {"full_attention", "sliding_attention"})
    if others:
        raise ConfigError(
            f"{key}: got true with {path}, whose layers of kind {', '.join(others)} would read across responses, expected false"
        )
    # Only Qwen's files have the switch; in others' a window that is named is used.
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and window < longest and (not kinds or "sliding_attention" in kinds):
        raise ConfigError(
            f"{key}: got true with {path}, which looks back {window} tokens, and sequences of up to {longest}, expected false, "
            "or shorter sequences"
        )


def check_own_tokenizer(path: str, key: str = "model.path", chat_template: str | None = None) -> None:
    """ConfigError where a model has no embedding for a token that its tokenizer writes; `chat_template` is a jinja file in
    place of the tokenizer's own."""
    config, folder = _described(path, key)
    if folder is not None:
        file = None if chat_template is None else Path(chat_template).expanduser()
        text = file.read_text(encoding="utf-8") if file is not None and file.is_file() else None
        check_tokenizer(folder, path, key, text, config.get("vocab_size"))


def _lacks_weights(folder: Path | None) -> bool:
    """Whether some weights are not here (yet): a download to the hub's cache that was interrupted, say."""
    shards = list(folder.glob("*-of-*.safetensors")) if folder is not None else []
    if folder is None or not (shards or (folder / INDEX).is_file()):
        return False
    return not (folder / INDEX).is_file() or bool(missing_shards(folder))


def _described(path: str, key: str) -> tuple[dict[str, Any], Path | None]:
    """A model's configuration, empty where nothing is known, and its folder."""
    if path.startswith(PREFIX):
        name = path.removeprefix(PREFIX)
        if name not in BUILDERS:
            known = [PREFIX + builtin for builtin in BUILDERS]
            raise ConfigError(f"{key}: got {path!r}, expected one of {', '.join(known)}{nearest(path, known)}")
        folder = cache_folder() / "models" / BUILDERS[name][0]
        if (folder / "config.json").is_file():
            return _whole(folder, path, key), folder
        return _BUILTIN_CONFIGS.get(name, {}), None
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ConfigError(
                f"{key}: got {path!r}, a folder without config.json, expected a Hugging Face model's folder"
            )
        return _whole(local, path, key), local
    if path.startswith(("/", "./", "../", "~")):
        raise ConfigError(f"{key}: got {path!r}, which does not exist, expected a folder, a hub name or builtin:NAME")
    cached = _hub_snapshot(path)
    return (_configuration(cached), cached) if cached is not None else ({}, None)


def _hub_snapshot(name: str) -> Path | None:
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = Path(os.environ.get("HF_HOME") or f"{caches}/huggingface").expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    found = sorted(hub.glob(f"models--{name.replace('/', '--')}/snapshots/*/config.json"))
    return found[-1].parent if found else None


def _whole(folder: Path, path: str, key: str) -> dict[str, Any]:
    """The configuration of a folder that is whole."""
    check_weights(folder, path, key)
    config = _configuration(folder)
    check_fit(config, folder, path, key)
    return config


def _configuration(folder: Path) -> dict[str, Any]:
    whole = read_json(folder / "config.json", "a model's configuration")
    inner = whole.get("text_config", whole)  # a vision model's language part
    config = inner if isinstance(inner, dict) else whole
    check_sizes(config, folder / "config.json")
    return config | {"architectures": whole.get("architectures")}  # those of the whole model


def _counted(folder: Path | None) -> int | None:
    """Parameters in the safetensors files; None where there are no such files."""
    tensors = tensors_of(folder)
    return sum(math.prod(shape) for shape in tensors.values()) if tensors else None


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
        tied=bool(config.get("tie_word_embeddings")),
        head_norms=str(config.get("model_type", "")).startswith("qwen3"),
    )
