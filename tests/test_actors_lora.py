"""Adapters merged into what they adapt: the same tensors as peft's own merge, under the checkpoint's names."""

from dataclasses import dataclass, field

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from apportion.actors.loading import load_causal_lm
from apportion.actors.lora import merged_forward, merged_weights
from apportion.actors.modules import CausalLMLogprobs


@dataclass
class Lora:
    rank: int = 4
    alpha: float = 12.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj", "down_proj"])


@pytest.fixture
def adapted(tiny):
    """A model whose adapters do something."""
    model = load_causal_lm(tiny, "float32", lora=Lora())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2, generator=generator)
    return model


def test_merged_weights_are_those_of_pefts_own_merge(adapted, tiny):
    module = CausalLMLogprobs(adapted, 8)
    merged = dict(merged_weights(module.named_parameters(), Lora()))
    right = dict(adapted.merge_and_unload().named_parameters())
    assert merged.keys() == right.keys()
    for name, weight in right.items():
        torch.testing.assert_close(merged[name], weight.detach(), atol=1e-6, rtol=1e-6, msg=name)
    start = dict(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).named_parameters())
    changed = {n.split(".")[-2] for n in right if not torch.equal(merged[n], start[n])}
    assert changed == {"q_proj", "v_proj", "down_proj"}


def test_a_bias_of_an_adapted_layer_is_passed_on(tmp_path):
    """As in Qwen2, whose query, key and value layers have biases."""
    config = Qwen2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(5)
    start = Qwen2ForCausalLM(config)
    for name, parameter in start.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    start.save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path), "float32", lora=Lora())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    merged = {n: t.clone() for n, t in merged_weights(CausalLMLogprobs(model, 8).named_parameters(), Lora())}
    right = dict(model.merge_and_unload().named_parameters())
    assert merged.keys() == right.keys() and "model.layers.1.self_attn.q_proj.bias" in merged
    for name, weight in right.items():
        torch.testing.assert_close(merged[name], weight.detach(), atol=1e-6, rtol=1e-6, msg=name)
        adapted = name.split(".")[-2] in Lora().targets and name.endswith("weight")
        assert torch.equal(merged[name], start.get_parameter(name)) != adapted, name


def test_without_adapters_names_lose_the_wrapper_and_weights_are_untouched(tiny):
    model = load_causal_lm(tiny, "float32")
    named = dict(merged_weights(CausalLMLogprobs(model, 8).named_parameters(), None))
    assert named.keys() == dict(model.named_parameters()).keys()
    assert named["model.norm.weight"] is model.model.norm.weight


def test_only_adapters_are_trained(adapted):
    trained = {n.rsplit(".", 3)[-3] for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}


def test_an_adapter_without_its_weight_is_refused():
    stray = [("model.base_model.model.x.lora_B.default.weight", torch.zeros(2, 2))]
    with pytest.raises(ValueError, match="an adapter without the weight it adapts"):
        list(merged_weights(iter(stray), Lora()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_merged_forward_pass_is_to_the_bit_that_of_the_merged_model(tiny, dtype):
    """In bfloat16 a pass through the adapters rounds at other places. Afterwards all is as it was."""
    targets = [*Lora().targets, "o_proj", "up_proj"]
    lora = Lora(dropout=0.5, targets=targets)
    model = load_causal_lm(tiny, dtype, lora=lora)
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=getattr(torch, dtype)).eval()
    for name, weight in merged_weights(CausalLMLogprobs(model, 8).named_parameters(), lora):
        plain.get_parameter(name).data.copy_(weight)
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids = torch.arange(5, 45)[None]
    model.eval()
    with torch.no_grad():
        before = model(ids).logits
        with merged_forward(model, lora):
            assert torch.equal(model(ids).logits, plain(ids).logits)
        assert torch.equal(model(ids).logits, before)
        assert torch.equal(before, plain(ids).logits) is False
    assert all(torch.equal(kept[name], parameter) for name, parameter in model.named_parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_failed_merged_forward_pass_leaves_the_layers_as_they_were(adapted):
    with pytest.raises(IndexError), merged_forward(adapted, Lora()):
        adapted(torch.tensor([[10**6]]))
    assert not any("forward" in vars(module) for module in adapted.modules())
