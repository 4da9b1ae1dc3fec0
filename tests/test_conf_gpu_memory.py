"""Bytes on a GPU by purpose: against counts of what autograd really keeps, and against arithmetic by hand."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from apportion.actors.engine_settings import EngineSettings
from apportion.conf import gpu_memory
from apportion.conf.gpu_memory import CONTEXT, GIB, VllmShare
from apportion.conf.models import ModelFacts
from apportion.conf.schema_models import LoraConfig

V = 128
SHAPES = {  # hidden, inner, heads, key-value heads, head size
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, (96, 512, 6, 2, 16)),
    "qwen2, few wide heads": (Qwen2Config, Qwen2ForCausalLM, (256, 384, 4, 4, 64)),
    "llama": (LlamaConfig, LlamaForCausalLM, (128, 448, 8, 2, 16)),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, (128, 320, 4, 2, 64)),
}


def kept_by_autograd(config_class, model_class, sizes, layers, dtype, checkpointing, rows=2, width=32):
    """Bytes a token that the decoder's backward pass needs beside the parameters; each storage counts once."""
    hidden, inner, heads, key_value_heads, head_dim = sizes
    extra = {"head_dim": head_dim} if config_class is not Qwen2Config else {}
    config = config_class(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_value_heads, vocab_size=V, attn_implementation="sdpa", **extra,
    )  # fmt: skip
    torch.manual_seed(0)
    model = model_class(config).to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    ids = torch.randint(0, V, (rows, width))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in found.values()) / ids.numel()


def facts(sizes, layers, head_norms=False):
    hidden, inner, heads, key_value_heads, head_dim = sizes
    shapes = {
        "q_proj": (hidden, heads * head_dim),
        "k_proj": (hidden, key_value_heads * head_dim),
        "gate_proj": (hidden, inner),
    }
    return ModelFacts(1, layers, hidden, key_value_heads, head_dim, V, None, shapes, True, head_norms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_activations_are_what_autograd_keeps(name, dtype):
    config_class, model_class, sizes = SHAPES[name]
    model = facts(sizes, 3, head_norms=name == "qwen3")
    estimate = gpu_memory.activation_bytes(64, model, dtype.itemsize, checkpointing=False) / 64
    one, three = (kept_by_autograd(config_class, model_class, sizes, n, dtype, False) for n in (1, 3))
    assert gpu_memory.layer_bytes(model, dtype.itemsize) == pytest.approx((three - one) / 2, rel=0.01)
    assert estimate == pytest.approx(three, rel=0.10)


def test_checkpointing_keeps_one_hidden_state_a_layer_and_one_layer():
    config_class, model_class, sizes = SHAPES["qwen2"]
    model = facts(sizes, 3)
    one, three = (kept_by_autograd(config_class, model_class, sizes, n, torch.bfloat16, True) for n in (1, 3))
    assert (three - one) / 2 == 2 * 96
    difference = gpu_memory.activation_bytes(1, model, 2, False) - gpu_memory.activation_bytes(1, model, 2, True)
    assert difference == 2 * gpu_memory.layer_bytes(model, 2) - 3 * 2 * 96


B = 10**9
MODEL = ModelFacts(2 * B, 10, 1000, 4, 100, 50_000, None, {"q_proj": (1000, 1000), "k_proj": (1000, 400),
                   "v_proj": (1000, 400), "o_proj": (1000, 1000), "gate_proj": (1000, 4000)})  # fmt: skip
ON_GPU = EngineSettings(
    micro_batch_tokens=8192, logits_chunk_tokens=4096, fused_adam=True, overlap_comm=True, bucket_elements=200_000_000
)


def trained(stage, ranks, dtype="bfloat16", offload=False, weights=None):
    settings = replace(ON_GPU, zero_stage=stage, offload_optimizer=offload)
    memory = gpu_memory.training(weights or gpu_memory.policy_weights(MODEL, None), settings, ranks, dtype)
    return {name: size / B for name, size in memory.items() if name not in (*gpu_memory.ESTIMATES, "context")}


@pytest.mark.parametrize(
    ("stage", "ranks", "dtype", "offload", "expected"),
    [  # 2 billion parameters: bytes in billions
        (0, 4, "bfloat16", False, {"weights": 4, "masters": 8, "moments": 16, "gradients": 12, "buckets": 1}),
        (1, 4, "bfloat16", False, {"weights": 4, "masters": 2, "moments": 4, "gradients": 12, "buckets": 2}),
        (2, 1, "bfloat16", False, {"weights": 4, "masters": 8, "moments": 16, "gradients": 8, "buckets": 0.4}),
        (2, 4, "bfloat16", False, {"weights": 4, "masters": 2, "moments": 4, "gradients": 2, "buckets": 0.8}),
        (2, 4, "bfloat16", True, {"weights": 4, "gradients": 2, "buckets": 0.8}),
        (2, 4, "float32", False, {"weights": 8, "masters": 2, "moments": 4, "gradients": 4, "buckets": 1.6}),
        (3, 1, "bfloat16", True, {"weights": 4, "gradients": 0, "buckets": 0.4}),
        (3, 4, "bfloat16", False,
         {"weights": 1, "masters": 2, "moments": 4, "gradients": 4, "buckets": 0.4, "gathered weights": 2.1}),
    ],
)  # fmt: skip
def test_each_zero_stage_has_what_deepspeed_allocates(stage, ranks, dtype, offload, expected):
    assert trained(stage, ranks, dtype, offload) == pytest.approx(expected)


def test_lora_a_critic_and_a_reward_model_train_less():
    lora = gpu_memory.policy_weights(MODEL, LoraConfig(rank=16, targets=["q_proj", "v_proj"]))
    assert (lora.trained, lora.frozen) == (10 * 16 * (2000 + 1400), 2 * B)
    assert trained(2, 1, weights=lora)["weights"] == pytest.approx(4 + 2 * lora.trained / B)
    assert gpu_memory.critic_weights(MODEL) == gpu_memory.Weights(MODEL, 2 * B - 50_000_000 + 1000, 50_000_000)
    assert gpu_memory.score_weights(MODEL, None) == gpu_memory.Weights(MODEL, 2 * B - 50_000_000 + 1000)
    tied = replace(MODEL, tied=True)
    assert gpu_memory.critic_weights(tied) == gpu_memory.Weights(tied, 2 * B + 1000, 0)


def test_logits_are_a_chunk_twice_and_the_heads_gradient():
    memory = gpu_memory.training(gpu_memory.policy_weights(MODEL, None), replace(ON_GPU, zero_stage=2), 1, "bfloat16")
    assert memory["logits"] == 4096 * 50_000 * 4 * 2 + 50_000 * 1000 * 2
    short = replace(ON_GPU, zero_stage=2, micro_batch_tokens=1000)  # a micro-batch with fewer tokens than a chunk
    few = gpu_memory.training(gpu_memory.policy_weights(MODEL, None), short, 1, "bfloat16")
    assert few["logits"] == 1000 * 50_000 * 4 * 2 + 50_000 * 1000 * 2
    assert gpu_memory.frozen(MODEL, 8192, 4096, "bfloat16")["logits"] == 4096 * 50_000 * 4 * 2
    with_entropy = gpu_memory.policy_weights(MODEL, None, entropy=True)
    assert with_entropy.copies == 4
    assert "logits" not in gpu_memory.training(gpu_memory.critic_weights(MODEL), ON_GPU, 1, "bfloat16")


def test_zero_3_starts_with_the_whole_model_on_each_gpu():
    weights = gpu_memory.policy_weights(MODEL, None)
    assert gpu_memory.start_bytes(weights, replace(ON_GPU, zero_stage=3), "bfloat16") == 4 * B + CONTEXT
    assert gpu_memory.start_bytes(weights, replace(ON_GPU, zero_stage=2), "bfloat16") == 0


def test_offloaded_masters_moments_and_gradients_are_in_main_memory():
    settings = replace(ON_GPU, zero_stage=2, offload_optimizer=True)
    host = gpu_memory.offloaded(gpu_memory.policy_weights(MODEL, None), settings, 4, "bfloat16")
    assert host == {"masters": 2 * B, "adam": 4 * B, "gradients": 2 * B, "staging": B}
    assert gpu_memory.offloaded(gpu_memory.policy_weights(MODEL, None), ON_GPU, 4, "bfloat16") == {}


def test_an_engine_takes_its_share_and_the_cache_is_the_rest():
    share = VllmShare("rollout", MODEL, "bfloat16", 1, 0.5, True, 1000, 256)
    taken = 4 * B + 2 * GIB + GIB // 2
    assert share.taken == taken
    assert share.sequence_bytes == 1000 * 2 * 10 * 4 * 100 * 2
    assert share.memory(40 * GIB)["cache"] == 20 * GIB - taken
    assert share.held(40 * GIB) == (20 * GIB - taken) // 16_000_000
    assert replace(share, parallel=2).sequence_bytes == 8_000_000
    assert replace(share, parallel=8).sequence_bytes == 4_000_000  # four heads on eight GPUs: one on each
    assert replace(share, graphs=False).taken == taken - GIB // 2
    least = share.least_utilization(40 * GIB)
    assert replace(share, utilization=least).held(40 * GIB) >= 1
    assert replace(share, utilization=least - 0.01).held(40 * GIB) < 1


def test_generate_keeps_the_scores_of_all_it_samples():
    memory = gpu_memory.transformers_engine(MODEL, "bfloat16", 8, 100, 20)
    assert memory["scores"] == 8 * 20 * 50_000 * 4
    assert memory["cache"] == 8 * 120 * (2 * 10 * 4 * 100 * 2)


def test_deepspeeds_own_sizes_are_those_counted_with():
    from deepspeed.runtime.engine import MEMORY_OPT_ALLREDUCE_SIZE
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = DeepSpeedZeroConfig()
    assert zero.max_live_parameters + zero.prefetch_bucket_size == gpu_memory._LIVE
    assert (zero.sub_group_size, zero.reduce_bucket_size) == (gpu_memory._SUB_GROUP, gpu_memory._BUCKET)
    assert MEMORY_OPT_ALLREDUCE_SIZE == gpu_memory._BUCKET == EngineSettings().bucket_elements


def test_a_bucket_is_no_larger_than_what_there_is_to_send():
    settings = EngineSettings(zero_stage=3, bucket_elements=200_000_000)
    assert gpu_memory._buckets(30_000, settings, 1, "bfloat16") == 60_000
    assert gpu_memory._buckets(10**9, settings, 1, "bfloat16") == 400_000_000
