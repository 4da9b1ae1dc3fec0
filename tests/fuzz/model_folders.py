"""Model folders with damage in them."""

import json
import random
from pathlib import Path
from typing import Any

from fuzz.data_files import spoil_bytes

ODD = (None, 0, -2, 7, 10**12, 1e30, 2.5, "x", "", [], {}, True, [5], [None], {"a": 1}, ["x"])
MORE = {"config.json": {"text_config": 5, "layer_types": ["x"], "sliding_window": 1, "quantization_config": 5, "head_dim": 7},
        "tokenizer_config.json": {"tokenizer_class": "Nothing", "added_tokens_decoder": {"5": 5}, "chat_template": [{}]},
        "generation_config.json": {"eos_token_id": [1, 999]}}  # fmt: skip
BEYOND = ("model.safetensors.index.json", "special_tokens_map.json", "added_tokens.json")  # files that tiny lacks
WHOLE = ("[]", "null", "5", '"x"', "{}", "{", "", "[" * 5000, '{"weight_map": []}', '{"weight_map": {"a": 5}}')


def spoil(rng: random.Random, folder: Path) -> str:
    """Break one file of the folder; returns what was done."""
    files = sorted(file.name for file in folder.iterdir() if file.suffix == ".json")
    kind = rng.randrange(4)
    if kind == 0:
        file = folder / rng.choice([*files, *BEYOND])
        file.write_text(text := rng.choice(WHOLE))
        return f"{file.name} is {text[:30]}"
    if kind == 1:
        file = folder / rng.choice([*files, "model.safetensors", "model.safetensors"])
        file.write_bytes(spoil_bytes(rng, file.read_bytes()))
        return f"{file.name} has other bytes"
    name = rng.choice([name for name in ("config.json", "tokenizer_config.json", "tokenizer.json") if name in files])
    values: dict[str, Any] = json.loads((folder / name).read_text())
    key = rng.choice([*values, *MORE.get(name, {})])
    if kind == 2 and key in values:
        del values[key]
    else:
        values[key] = MORE.get(name, {}).get(key, rng.choice(ODD)) if rng.random() < 0.3 else rng.choice(ODD)
    (folder / name).write_text(json.dumps(values))
    return f"{name} has {key} {str(values.get(key, 'gone'))[:30]}"
