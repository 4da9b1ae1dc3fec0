"""What a training engine is set to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineSettings:
    """Every value is definite: `conf.defaults` has chosen what the configuration leaves to the device."""

    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0
    schedule: str = "constant"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    zero_stage: int = 0
    offload_optimizer: bool = False
    gradient_checkpointing: bool = False
    micro_batch_tokens: int = 2048
    logits_chunk_tokens: int = 512
    fused_adam: bool = False  # one kernel and no float32 copy of the weights, where parameters are on a GPU
    overlap_comm: bool = False  # reduce gradients beside the backward pass, where there are several ranks
    bucket_elements: int = 500_000_000  # of one reduction of gradients, at most; the default is DeepSpeed's
