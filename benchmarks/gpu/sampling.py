"""Sampling with the transformers engine."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from apportion.actors.engines import EngineSpec, Request, Sampling
from apportion.actors.engines.transformers_engine import TransformersEngine
from benchmarks.gpu.models import SHAPES, save_model, shape_for
from benchmarks.gpu.report import Part, Record

# One token at a time with a cache and padding against one pass over the row: the same numbers but for rounding.
FLOAT32_BOUND, BF16_BOUND = 1e-4, 0.02
COMPARED = 8  # samples


def run(record: Record) -> None:
    shape = shape_for(record.device)
    dtype, bound = ("bfloat16", BF16_BOUND) if record.on_gpu else ("float32", FLOAT32_BOUND)
    rows, tokens = (64, 128) if record.on_gpu else (8, 12)
    with tempfile.TemporaryDirectory() as folder:
        save_model(shape, Path(folder), record.device, getattr(torch, dtype))
        engine = TransformersEngine(
            EngineSpec(
                model=folder, dtype=dtype, seed=0, max_model_len=512, max_sequences=rows, tensor_parallel_size=1,
                gpu_memory_utilization=0.5, kv_cache_gib=1.0, compile=False, prefix_caching=False,
                trust_remote_code=False, threads=torch.get_num_threads(), first_thread=0,
            )
        )  # fmt: skip
        rng = np.random.default_rng(5)
        vocabulary = SHAPES[shape]["vocab_size"]
        prompts = [rng.integers(10, vocabulary, int(rng.integers(16, 64))).astype(np.int32) for _ in range(rows)]
        requests = [Request(prompt) for prompt in prompts]
        engine.generate(requests[:2], Sampling(max_tokens=4))  # warm-up
        start = time.perf_counter()
        samples = engine.generate(requests, Sampling(max_tokens=tokens))
        seconds = time.perf_counter() - start
    sampled = sum(len(sample.token_ids) for sample in samples)
    record.say(f"{shape}, {dtype}, {rows} rows: sampled tokens/s", sampled / seconds, "tokens/s")
    gaps = []
    for prompt, sample in list(zip(prompts, samples, strict=True))[:COMPARED]:
        whole = engine.score(np.concatenate([prompt, sample.token_ids]))
        gaps.append(np.abs(whole[len(prompt) - 1 :] - sample.logprobs))
    record.hold("mean gap of log-probs to one pass over each row", float(np.concatenate(gaps).mean()), bound, "nats")
    record.say("largest gap", float(np.concatenate(gaps).max()), "nats")


PART = Part("sampling", "sampling with the transformers engine", run)
