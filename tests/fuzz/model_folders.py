"""Model folders with damage in them."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from fuzz.data_files import spoil_bytes

ODD = (None, 0, -2, 7, 10**12, 1e30, 2.5, "x", "", [], {}, True, [5], [None], {"a": 1}, ["x"])
MORE = {"config.json": {"text_config": 5, "layer_types": ["x"], "sliding_window": 1, "quantization_config": 5, "head_dim": 7,
                        "num_labels": 3, "id2label": {"0": 5}, "tie_word_embeddings": False},
        "tokenizer_config.json": {"tokenizer_class": "Nothing", "added_tokens_decoder": {"5": 5}, "chat_template": [{}]},
        "generation_config.json": {"eos_token_id": [1, 999]},
        "adapter_config.json": {"peft_type": "NOTHING", "r": 0, "base_model_name_or_path": "no/such-model"}}  # fmt: skip
BEYOND = ("model.safetensors.index.json", "special_tokens_map.json", "added_tokens.json", "adapter_config.json")
WHOLE = ("[]", "null", "5", '"x"', "{}", "{", "", "[" * 5000, '{"weight_map": []}', '{"weight_map": {"a": 5}}')
TEMPLATES = (
    "", "{{ 1/0 }}", "{{ messages[9].content }}", "{% for m in messages %}", "{{ x.y.z }}", "{{ raise_exception('no') }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ ''.__class__.__mro__ }}", "{% include 'x' %}", "{{ messages }}",
    "{% for i in range(200000) %}{% endfor %}x", "\ud83d", "{{ messages[0].content | nothing }}", "{{", "\0",
    "{% for m in messages %}{{ m['content'] }}{% endfor %}", "{{ 'x' * 3000000 }}", "{% set n = namespace(x=0) %}{{ n.y }}",
)  # fmt: skip
KINDS = ("plain", "plain", "sharded", "adapter", "scores")


def make_all(plain: Path) -> dict[str, Path]:
    """Beside a whole folder of a small model: the same in two files of weights, with an adapter, and with a score's head."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    folders = {kind: plain.with_name(kind) for kind in KINDS if kind != "plain"}
    for folder in folders.values():
        shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(plain)
    model.save_pretrained(folders["sharded"], max_shard_size="200KB")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_pretrained(plain, num_labels=1).save_pretrained(folders["scores"])
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(folders["adapter"])
    (folders["adapter"] / "config.json").unlink()
    return {"plain": plain, **folders}


def spoil(rng: random.Random, folder: Path) -> str:
    """Break one file of the folder; returns what was done."""
    files = sorted(file.name for file in folder.iterdir() if file.suffix == ".json")
    kind = rng.randrange(9)
    if kind < 2:
        file = folder / rng.choice([*files, *BEYOND])
        file.write_text(text := rng.choice(WHOLE))
        return f"{file.name} is {text[:30]}"
    if kind < 4:
        weights = sorted(file.name for file in folder.glob("*.safetensors"))
        file = folder / rng.choice([*files, *weights * 2])
        file.write_bytes(spoil_bytes(rng, file.read_bytes()))
        return f"{file.name} has other bytes"
    if kind == 4:
        text = rng.choice(TEMPLATES)
        (folder / "chat_template.jinja").write_text(text, errors="surrogatepass")
        return f"chat_template.jinja is {text[:60]}"
    if kind == 5:
        file = folder / rng.choice(sorted(file.name for file in folder.iterdir()))
        file.unlink()
        return f"{file.name} is gone"
    return _change(rng, folder, rng.choice([name for name in files if name != "model.safetensors.index.json"]))


def _change(rng: random.Random, folder: Path, name: str) -> str:
    values: dict[str, Any] = json.loads((folder / name).read_text())
    more = MORE.get(name, {})
    key = rng.choice([*values, *more])
    if rng.random() < 0.3 and key in values:
        del values[key]
    else:
        values[key] = more.get(key, rng.choice(ODD)) if rng.random() < 0.4 else rng.choice(ODD)
    (folder / name).write_text(json.dumps(values))
    return f"{name} has {key} {str(values.get(key, 'gone'))[:30]}"
