"""Models of other families than Llama's: what is refused, and what is kept, where their sizes or parts differ."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from apportion.actors.engines.vllm_engine import _read_back
from apportion.actors.loading import load_causal_lm, save_huggingface
from apportion.actors.lora import merged_weights
from apportion.actors.modules import CausalLMLogprobs, ValueModel
from apportion.conf.models import check_rows_of_several
from apportion.conf.schema import LoraConfig
from apportion.platform.errors import ConfigError, WeightSyncError
from apportion.platform.weights import SyncReceipt

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def made(family: str, folder, **more) -> str:
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**more)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def test_a_cap_on_attention_that_sdpa_leaves_out_is_refused(tmp_path):
    path = made("Gemma2", tmp_path, **SIZES, head_dim=8)
    with pytest.raises(
        ConfigError, match=r"model\.attention: got sdpa, which leaves out the cap of 50 on the attention"
    ):
        load_causal_lm(path, "float32")
    module = CausalLMLogprobs(load_causal_lm(path, "float32", "eager"), 8)
    ids = torch.arange(5, 12)[None]
    picked = module.hidden(ids)[0, :-1]
    logprobs = module.chosen(picked, ids[0, 1:], 1.0)[0]
    right = module.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, right, atol=1e-5, rtol=1e-5)


def test_an_attention_that_an_architecture_has_not_is_refused_by_its_key(tmp_path):
    path = made("GPTNeo", tmp_path, vocab_size=64, hidden_size=16, num_layers=2, num_heads=2,
                attention_types=[[["global"], 2]])  # fmt: skip
    with pytest.raises(ConfigError, match=r"model\.attention: got sdpa, which .* has not, expected eager"):
        load_causal_lm(path, "float32")
    assert load_causal_lm(path, "float32", "eager").config.model_type == "gpt_neo"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["c_attn"], "of which some are no linear layers"),
        (["mlp.c_fc", "q_proj"], "got q_proj, which no layer of the model is called"),
    ],
)
def test_adapters_that_could_not_be_merged_or_are_nowhere_are_refused(tmp_path, targets, message):
    path = made("GPT2", tmp_path, vocab_size=64, n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(ConfigError, match=message):
        load_causal_lm(path, "float32", lora=LoraConfig(2, 4.0, 0.0, targets))


def test_a_head_that_only_the_configuration_calls_tied_is_sent_and_saved(tmp_path):
    base = tmp_path / "base"
    made("Llama", base, **SIZES, tie_word_embeddings=False)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    module = CausalLMLogprobs(load_causal_lm(str(base), "float32"), 8)
    sent = dict(merged_weights(module.named_parameters(), None))
    assert not torch.equal(sent["lm_head.weight"], sent["model.embed_tokens.weight"])
    transformers.AutoTokenizer.from_pretrained(_tiny()).save_pretrained(base)
    save_huggingface(str(base), {name: t.detach() for name, t in sent.items()}, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(again.lm_head.weight, sent["lm_head.weight"])
    assert torch.equal(load_file(tmp_path / "saved" / "model.safetensors")["lm_head.weight"], sent["lm_head.weight"])


def _tiny() -> str:
    from apportion.data.builtin import resolve_model

    return resolve_model("builtin:tiny")


def test_sizes_and_caps_of_a_vision_model_are_those_of_its_language_part():
    from types import SimpleNamespace

    text = SimpleNamespace(hidden_size=6, final_logit_softcapping=30.0)
    model = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace(get_text_config=lambda: text)
    assert CausalLMLogprobs(model, 4).softcap == 30.0
    assert ValueModel(model).value_head.in_features == 6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, "whose layers of kind linear_attention would read"),
        ({"sliding_window": 100}, "which looks back 100 tokens, and sequences of up to 128"),
        ({"sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"]}, "looks back 100 tokens"),
        ({"sliding_window": 128}, None),
        ({"sliding_window": 100, "use_sliding_window": False}, None),
        ({"sliding_window": 100, "layer_types": ["full_attention"]}, None),
        ({"sliding_window": None}, None),
        ({}, None),
    ],
)
def test_several_sequences_in_a_row_are_refused_where_a_mask_does_not_keep_them_apart(tmp_path, config, message):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    if message is None:
        check_rows_of_several(str(tmp_path), 128, "policy.share_prompts")
    else:
        with pytest.raises(ConfigError, match=rf"^policy\.share_prompts: got true with .*{message}"):
            check_rows_of_several(str(tmp_path), 128, "policy.share_prompts")


def test_weights_of_which_none_can_be_read_back_are_not_called_proved():
    nothing = SyncReceipt("rollout-0", 1, {}, 0, [], [])
    with pytest.raises(
        WeightSyncError, match=r"rollout-0: none of the live model's parameters .* train.sync_check=false"
    ):
        _read_back(nothing, check=True)
    assert _read_back(nothing, check=False) is nothing
    assert _read_back(SyncReceipt("rollout-0", 1, {}, 3, [], []), check=True).checked_live == 3


@pytest.mark.parametrize(
    ("family", "more", "expert"),
    [
        (
            "Mixtral",
            {"num_local_experts": 3, "num_experts_per_tok": 2},
            "model.layers.1.block_sparse_moe.experts.2.w2.weight",
        ),
        (
            "Qwen3Moe",
            {"num_experts": 3, "moe_intermediate_size": 8, "decoder_sparse_step": 1},
            "model.layers.1.mlp.experts.2.down_proj.weight",
        ),
    ],
)
def test_a_trained_mixture_is_saved_under_its_checkpoints_names(tmp_path, family, more, expert):
    base = made(family, tmp_path / "base", **SIZES, **more)
    transformers.AutoTokenizer.from_pretrained(_tiny()).save_pretrained(base)
    module = CausalLMLogprobs(load_causal_lm(base, "float32"), 8)
    sent = {name: tensor.detach() + 0.5 for name, tensor in merged_weights(module.named_parameters(), None)}
    save_huggingface(base, sent, tmp_path / "saved")
    files = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(files) == set(load_file(tmp_path / "base" / "model.safetensors"))
    assert torch.equal(files[expert], sent["model.layers.1.mlp.experts.down_proj"][2])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert all(torch.equal(parameter, sent[name]) for name, parameter in again.named_parameters())
