"""What a checkpoint's model folder holds beside the weights."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from apportion.actors.engines import EngineSpec
from apportion.actors.engines.checkpoint_names import converter_of
from apportion.actors.engines.given_responses import GivenResponses
from apportion.actors.engines.transformers_engine import TransformersEngine
from apportion.actors.loading import load_causal_lm, save_huggingface
from apportion.actors.score_model import save_score_model
from apportion.conf.schema import LoraConfig
from apportion.data.builtin import resolve_model
from apportion.platform.errors import ConfigError


@pytest.fixture(scope="module")
def tiny():
    return resolve_model("builtin:tiny")


@pytest.mark.parametrize("template", [None, "{% for m in messages %}<{{ m.content }}>{% endfor %}"])
def test_a_saved_model_has_the_weights_and_the_chat_template_that_it_was_trained_with(tiny, tmp_path, template):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    named = {name: weight + 1 for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_huggingface(tiny, named, tmp_path, chat_template=template)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in named.items())
    own = AutoTokenizer.from_pretrained(tiny).chat_template
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == (own if template is None else template)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 0.9, "top_p": 0.6, "eos_token_id": [2, 7]}, {"do_sample": True, "temperature": 0.9}),
        ({"do_sample": True, "temperature": 0.7, "eos_token_id": [2, 7]}, {"do_sample": True, "temperature": 0.7}),
    ],
)
def test_a_saved_model_has_its_generation_settings_also_those_that_are_not_written_as_they_were_read(
    tiny, tmp_path, settings, kept
):
    """Vicuna's, for one, have a temperature and do not sample; Qwen's have a second end token."""
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / "generation_config.json").write_text(json.dumps(settings))
    named = dict(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).state_dict())
    save_huggingface(str(base), {n: w for n, w in named.items() if n != "lm_head.weight"}, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [2, 7] and kept.items() <= saved.items()


def test_a_saved_reward_model_keeps_its_chat_template_too(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    named = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    named["score.weight"] = torch.zeros(1, model.config.hidden_size)
    save_score_model(tiny, named, tmp_path, chat_template="{{ messages[0].content }}")
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "{{ messages[0].content }}"


def engine(model, trust):
    return TransformersEngine(EngineSpec(model, "float32", 0, 64, 2, 1, 0.5, 0.1, False, False, trust, 1, 0))


READERS = {
    "engine": engine,
    "responses": lambda model, trust: GivenResponses(model, trust).tokenizer,
    "names": converter_of,
    "saved": lambda model, trust: save_huggingface(model, {}, None, trust),
    "saved rewards": lambda model, trust: save_score_model(model, {}, None, trust),
}
CONFIG, TOKENIZER = ("config.json", '{"model_type": "llama", "hidden_size": "x"}'), ("tokenizer.json", "[]")


@pytest.mark.parametrize(
    ("reader", "file", "text"),
    [
        ("engine", *CONFIG), ("engine", *TOKENIZER), ("engine", "model.safetensors", "x"), ("responses", *TOKENIZER),
        ("names", *CONFIG), ("names", "config.json", "[]"), ("saved", *CONFIG), ("saved", *TOKENIZER),
        ("saved", "generation_config.json", "[]"), ("saved rewards", *CONFIG), ("saved rewards", *TOKENIZER),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_model_is_one_line_wherever_the_model_is_read(tiny, tmp_path, reader, file, text):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / file).write_text(text)
    with pytest.raises(ConfigError) as caught:
        READERS[reader](str(folder), False)
    line = str(caught.value)
    assert line.startswith(f"{folder}: the model cannot be loaded (") and "\n" not in line
    assert line.endswith("), expected the whole folder of a causal language model: fetch it again")
    with pytest.raises(Exception) as traced:
        READERS[reader](str(folder), True)
    assert not isinstance(traced.value, ConfigError)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_that_would_untie_embeddings_is_refused(tiny, target):
    with pytest.raises(ConfigError, match=f"policy.lora.targets: got q_proj, {target}, which adapt the embeddings"):
        load_causal_lm(tiny, "float32", lora=LoraConfig(rank=2, targets=["q_proj", target]))
