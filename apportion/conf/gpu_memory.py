"""Work out the bytes that a role takes on one GPU, by purpose (docs/gpu.md has the arithmetic).

Weights, masters, moments, gradients, buckets and an engine's share are exact. Activations, logits and scores are
estimates: `ESTIMATES` names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from apportion.actors.engine_settings import EngineSettings
from apportion.conf.models import VALUE_BYTES, ModelFacts
from apportion.conf.schema_models import LoraConfig

GIB = 2**30
CONTEXT = GIB // 2  # of each process: CUDA's context and kernels; to be measured by benchmarks/gpu_parts.py
# What vLLM takes beside weights and cache (vllm/v1/worker/gpu_worker.py, determine_available_memory): the peak of a forward
# pass of 8,192 tokens with its sampler, and captured CUDA graphs. To be measured by benchmarks/gpu_parts.py.
WORKING, GRAPHS = 2 * GIB, GIB // 2
ESTIMATES = ("activations", "logits", "scores")

# DeepSpeed's own numbers, in elements (deepspeed/runtime/zero/config.py, runtime/engine.py).
_BUCKET = 500_000_000  # of one reduction, where nothing else is set
_SUB_GROUP = 1_000_000_000  # of one step of ZeRO-3's optimizer
_LIVE = 1_050_000_000  # gathered at a time under ZeRO-3: max_live_parameters + prefetch_bucket_size


@dataclass(frozen=True)
class Weights:
    """The parameters of one model in a training process. `copies`: float32 tensors [chunk x vocabulary] that its loss makes
    at a time, 0 where it makes no logits."""

    model: ModelFacts
    trained: int
    frozen: int = 0
    copies: int = 0
    trains_head: bool = False


def policy_weights(model: ModelFacts, lora: LoraConfig | None, entropy: bool = False) -> Weights:
    """A causal LM. The loss keeps the logits and one tensor made of them (actors/plain_head.py); where entropy has a
    gradient, autograd keeps four."""
    copies = 4 if entropy else 2
    if lora is not None:
        return Weights(model, model.lora_parameters(lora.rank, lora.targets), model.parameters, copies)
    return Weights(model, model.parameters, 0, copies, trains_head=True)


def critic_weights(model: ModelFacts) -> Weights:
    """A value model: an untied output head stays, frozen."""
    head = 0 if model.tied else model.vocabulary * model.hidden
    return Weights(model, model.parameters - head + model.hidden, head)


def score_weights(model: ModelFacts, lora: LoraConfig | None) -> Weights:
    """A reward model: one row in place of the output head."""
    body = model.parameters - (0 if model.tied else model.vocabulary * model.hidden)
    if lora is not None:
        return Weights(model, model.lora_parameters(lora.rank, lora.targets) + model.hidden, body)
    return Weights(model, body + model.hidden)


def training(weights: Weights, settings: EngineSettings, ranks: int, dtype: str) -> dict[str, int]:
    """Of one rank, at its peak. The largest tensors of the optimizer step and of the backward pass are added up."""
    value, stage = VALUE_BYTES[dtype], settings.zero_stage
    share = ceil(weights.trained / ranks) if stage else weights.trained
    whole = (weights.trained + weights.frozen) * value
    memory = {"weights": ceil(whole / ranks) if stage == 3 else whole}
    if not settings.offload_optimizer:
        if value == 2 or stage in (1, 2):  # DeepSpeed keeps a copy there even of float32 weights
            memory["masters"] = 4 * share
        memory["moments"] = 8 * share
    memory["gradients"] = _gradients(weights.trained, share, settings, dtype)
    memory["buckets"] = _buckets(weights.trained, settings, ranks, dtype)
    if stage == 3 and ranks > 1:
        memory["gathered weights"] = min(weights.trained + weights.frozen, _LIVE) * value
    checkpointing = settings.gradient_checkpointing
    memory["activations"] = activation_bytes(settings.micro_batch_tokens, weights.model, value, checkpointing)
    if weights.copies:
        model = weights.model
        chunk = min(settings.logits_chunk_tokens, settings.micro_batch_tokens)
        memory["logits"] = chunk * model.vocabulary * 4 * weights.copies
        if weights.trains_head and stage >= 2:  # below, the gradients of all parameters exist at once
            memory["logits"] += model.vocabulary * model.hidden * value
    memory["context"] = CONTEXT
    return memory


def start_bytes(weights: Weights, settings: EngineSettings, dtype: str) -> int:
    """While the engine starts: ZeRO-3 parts the model only after DeepSpeed has moved all of it to the GPU
    (deepspeed/runtime/engine.py, _configure_distributed_model). 0 where training takes more."""
    whole = (weights.trained + weights.frozen) * VALUE_BYTES[dtype]
    return whole + CONTEXT if settings.zero_stage == 3 else 0


def offloaded(weights: Weights, settings: EngineSettings, ranks: int, dtype: str) -> dict[str, int]:
    """Bytes in main memory of one rank on a GPU whose optimizer is there."""
    if not settings.offload_optimizer:
        return {}
    share = ceil(weights.trained / ranks)
    staging = 4 if settings.zero_stage == 3 else VALUE_BYTES[dtype]  # gradients, or weights on their way to the GPU
    return {"masters": 4 * share, "adam": 8 * share, "gradients": 4 * share, "staging": staging * share}


def _gradients(trained: int, share: int, settings: EngineSettings, dtype: str) -> int:
    """At the optimizer step (deepspeed/runtime: zero/stage_1_and_2.py, zero/stage3.py, bf16_optimizer.py,
    fp16/unfused_optimizer.py). bfloat16 accumulates in float32 from stage 1 on, other types in their own."""
    value, stage, offload = VALUE_BYTES[dtype], settings.zero_stage, settings.offload_optimizer
    accumulated = 4 if dtype == "bfloat16" else value
    if stage == 0:
        return trained * (value + 4 if value == 2 else 4)
    if stage == 1 and dtype == "bfloat16":
        # With offload: accumulators of all parameters, and the rank's share flat. Else the backward pass's own gradients,
        # and a flat float32 buffer of all.
        return 4 * trained + 4 * share if offload else (value + 4) * trained
    if stage == 1:
        return value * trained + (0 if offload else 4 * share)
    if stage == 2 and dtype == "bfloat16":
        return 4 * share  # one flat buffer, which the step reads as it is; on the GPU with offload too
    if stage == 2:
        return 0 if offload else (value + 4) * share
    return 0 if offload else accumulated * share + 4 * min(share, _SUB_GROUP)


def _buckets(trained: int, settings: EngineSettings, ranks: int, dtype: str) -> int:
    """What gradients are gathered in for one reduction; where several ranks overlap it, stages 1 and 2 have two."""
    value, stage = VALUE_BYTES[dtype], settings.zero_stage
    elements = min(trained, settings.bucket_elements)
    if stage == 0:
        return min(trained, _BUCKET) * value
    if stage == 1 and dtype == "bfloat16" and not settings.offload_optimizer:
        return min(trained, _BUCKET) * 4
    if stage == 3:
        return elements * value
    kept = 4 if stage == 1 and dtype == "bfloat16" else value
    return elements * kept * (2 if settings.overlap_comm and ranks > 1 else 1)


def activation_bytes(tokens: int, model: ModelFacts, value: int, checkpointing: bool) -> int:
    """What autograd keeps of one micro-batch between the forward and the backward pass."""
    ends = (4 + 3 * value) * model.hidden + 2 * value * model.head_dim + 8  # final norm, chosen states, rotary, ids
    layer = layer_bytes(model, value)
    kept = model.layers * value * model.hidden + layer if checkpointing else model.layers * layer
    return tokens * (kept + ends)


def layer_bytes(model: ModelFacts, value: int) -> int:
    """What autograd keeps of one layer and token: transformers' eager Llama or Qwen block with sdpa, counted with
    saved_tensors_hooks and held to that by a test."""
    queries, keys = model.shapes["q_proj"][1], model.shapes["k_proj"][1]
    inner, heads = model.shapes["gate_proj"][1], queries // model.head_dim
    norms = 2 * ((4 + 2 * value) * model.hidden + 4)  # float32 input, normed, output; 1 / rms
    attention = value * 2 * (queries + keys) + 4 * heads  # q, k, v, output; logsumexp
    if model.head_norms:
        attention += (4 + value) * (queries + keys) + 4 * (heads + model.key_value_heads)
    return norms + attention + value * 4 * inner  # gate, silu(gate), up, their product


def frozen(model: ModelFacts, tokens: int, chunk: int, dtype: str) -> dict[str, int]:
    """A model that only runs forward, `tokens` at a time: one layer's tensors exist at once."""
    value = VALUE_BYTES[dtype]
    return {
        "weights": model.parameters * value,
        "activations": tokens * (layer_bytes(model, value) + 2 * value * model.hidden),
        "logits": min(chunk, tokens) * model.vocabulary * 4 * 2,
        "context": CONTEXT,
    }


@dataclass(frozen=True)
class VllmShare:
    """A vLLM engine on one of its GPUs: it takes `utilization` of the memory, whatever it needs. `section` is rollout or
    judge."""

    section: str
    model: ModelFacts
    dtype: str
    parallel: int
    utilization: float
    graphs: bool
    longest: int  # tokens of the longest sequence
    sequences: int  # decoded side by side

    @property
    def taken(self) -> int:
        """Before there is a cache."""
        weights = ceil(self.model.parameters * VALUE_BYTES[self.dtype] / self.parallel)
        return weights + WORKING + (GRAPHS if self.graphs else 0)

    @property
    def sequence_bytes(self) -> int:
        """Cache of one longest sequence on each GPU; a GPU has at least one of the heads."""
        heads = ceil(self.model.key_value_heads / self.parallel)
        return self.longest * 2 * self.model.layers * heads * self.model.head_dim * VALUE_BYTES[self.dtype]

    def held(self, gpu_bytes: int) -> int:
        """Longest sequences that the cache holds on a GPU with so much memory; below 1 vLLM does not start."""
        return (round(self.utilization * gpu_bytes) - self.taken) // self.sequence_bytes

    def least_utilization(self, gpu_bytes: int) -> float:
        """That holds one longest sequence; above 1 where no share would."""
        return ceil((self.taken + self.sequence_bytes) / gpu_bytes * 100) / 100

    def memory(self, gpu_bytes: int | None) -> dict[str, int]:
        weights = ceil(self.model.parameters * VALUE_BYTES[self.dtype] / self.parallel)
        if gpu_bytes is None:
            cache = {"cache of one sequence": self.sequence_bytes}
        else:
            cache = {"cache": max(0, round(self.utilization * gpu_bytes) - self.taken)}
        return {"weights": weights, "working memory": self.taken - weights} | cache | {"context": CONTEXT}


def transformers_engine(model: ModelFacts, dtype: str, rows: int, prompt: int, response: int) -> dict[str, int]:
    """`generate` keeps the scores of every token that it samples, in float32."""
    value = VALUE_BYTES[dtype]
    return {
        "weights": model.parameters * value,
        "cache": rows * (prompt + response) * model.kv_bytes_per_token(value),
        "scores": rows * response * model.vocabulary * 4,
        "context": CONTEXT,
    }


def firm(memory: Mapping[str, int]) -> int:
    """Without what is estimated."""
    return sum(size for name, size in memory.items() if name not in ESTIMATES)
