"""The frozen model that KL is measured against. Started only when something needs its log-probs."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from apportion.actors.engine import own_device
from apportion.actors.loading import load_causal_lm
from apportion.actors.microbatch import cut
from apportion.actors.modules import CausalLMLogprobs
from apportion.batch import Batch, Signals
from apportion.platform import progress
from apportion.platform.process import ActorBase


@dataclass
class ReferenceSpec:
    model: str
    dtype: str
    attention: str
    trust_remote_code: bool
    micro_batch_tokens: int
    logits_chunk_tokens: int
    temperature: float
    threads: int | None
    share_prompts: bool = False


class ReferenceWorker(ActorBase):
    def __init__(self, spec: ReferenceSpec) -> None:
        if spec.threads:
            torch.set_num_threads(spec.threads)
        self.spec = spec
        self.device = own_device()
        model = load_causal_lm(spec.model, spec.dtype, spec.attention, spec.trust_remote_code)
        self.module = CausalLMLogprobs(model, spec.logits_chunk_tokens).to(self.device).eval()

    @torch.no_grad()
    def signals(self, shard: Batch) -> tuple[float, Signals]:
        """Seconds, and `reference_logprobs` [R], at the sampling temperature, as the policy's own are."""
        start = time.perf_counter()
        progress.begin("forward passes")
        out = np.zeros(int(shard.response_lengths.sum()), np.float32)
        for micro in cut(shard, np.arange(len(shard)), self.spec.micro_batch_tokens, self.spec.share_prompts):
            m = micro.to(self.device)
            logprobs, _ = self.module(m.input_ids, m.rows, m.columns, m.targets, self.spec.temperature, tree=m.layout)
            out[micro.packed_index] = logprobs.cpu().numpy()
            progress.advance()
        return time.perf_counter() - start, Signals(reference_logprobs=out)
