"""What a checkpoint's model folder holds beside the weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def test_a_saved_reward_model_keeps_its_chat_template_too(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    named = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    named["score.weight"] = torch.zeros(1, model.config.hidden_size)
    save_score_model(tiny, named, tmp_path, chat_template="{{ messages[0].content }}")
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_that_would_untie_embeddings_is_refused(tiny, target):
    with pytest.raises(ConfigError, match=f"policy.lora.targets: got q_proj, {target}, which adapt the embeddings"):
        load_causal_lm(tiny, "float32", lora=LoraConfig(rank=2, targets=["q_proj", target]))
