"""Which families of models a run may have: mixtures of experts that are not proved are refused before anything starts."""

import json

import pytest

from apportion.conf.families import PROVED_MIXTURES, check_family
from apportion.platform.errors import ConfigError


def folder(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["GptOssForCausalLM"], "num_local_experts": 4},
        {"architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 256, "num_experts_per_tok": 8},
        {"architectures": ["DbrxForCausalLM"], "ffn_config": {"moe_num_experts": 16}},
        {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "text_config": {"num_experts": 8}},
    ],
    ids=lambda config: config["architectures"][0],
)
def test_a_mixture_that_is_not_proved_is_refused_by_name(tmp_path, config):
    name = config["architectures"][0]
    with pytest.raises(
        ConfigError, match=rf"^model\.path: got .* \({name}\), a mixture of experts .* not proved; .*"
    ) as refused:
        check_family(folder(tmp_path, **config), "vllm")
    assert "\n" not in str(refused.value) and "Qwen3MoeForCausalLM" in str(refused.value)
    check_family(folder(tmp_path, **config), "transformers")  # which holds the trainer's own modules


@pytest.mark.parametrize("name", PROVED_MIXTURES)
def test_a_proved_mixture_is_allowed(tmp_path, name):
    check_family(folder(tmp_path, architectures=[name], num_experts=4), "vllm")


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["NewestForCausalLM"], "num_experts": None, "num_experts_per_tok": 2},
        {"architectures": ["NewestForCausalLM"], "num_experts": 1},
        {"model_type": "llama"},
    ],
)
def test_a_dense_model_of_any_family_is_allowed(tmp_path, config):
    check_family(folder(tmp_path, **config), "vllm")
