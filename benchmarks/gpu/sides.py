"""This project's engine and update beside bare vLLM and bare torch, for `benchmarks.gpu_check`."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bare_side import Bare, cpu_environment
from benchmarks.bench_work import GROUP, composed, made_up_batch
from benchmarks.gpu.device import GIB, peak_bytes, seconds_of, stated_flops
from benchmarks.gpu.models import SHAPES, free, model_flops
from benchmarks.gpu.report import Part, Record
from benchmarks.gpu.runs import SHAPE, model_path

ROUNDS = 2
TINY_VOCABULARY = 264


def settings_for(record: Record, *overrides: str) -> Any:
    """The quickstart's configuration with this check's model, each role alone on its GPU."""
    on_gpu = ("cluster.gpus_per_policy_rank=1", "cluster.gpus_per_rollout_engine=1") if record.on_gpu else ()
    plain = (
        "rollout.max_sequences=256",
        "policy.share_prompts=false",
        f"policy.zero_stage={2 if record.on_gpu else 0}",
    )
    return composed(f"model.path={model_path(record)}", *plain, *on_gpu, *overrides)


def vocabulary(record: Record) -> int:
    return SHAPES[SHAPE]["vocab_size"] if record.on_gpu else TINY_VOCABULARY


def prompts(record: Record, round_: int) -> list[Any]:
    """Other ones each round, so that no cache helps."""
    from apportion.batch import Prompt

    rng = np.random.default_rng((7, round_ + 1))
    count, length = (32, 64) if record.on_gpu else (2, 16)
    ids = rng.integers(10, vocabulary(record), (count, length)).astype(np.int32)
    return [Prompt(f"{round_}-{index}", row, "") for index, row in enumerate(ids)]


def our_speed(record: Record, config: Any, model: str, tokens: int) -> float:
    """Tokens/s at the driver, from the call to the packed batch in the object store."""
    from apportion.actors.engines import Sampling
    from apportion.assembly.serving import serving_requests
    from apportion.platform.cluster import Cluster, gather

    speeds = []
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(None, "gpu-check", 2, Path(folder), None)
        try:
            [actor] = cluster.start(serving_requests(config, model)["rollout"], 200)
            for round_ in range(-1, ROUNDS):
                batch, start = prompts(record, round_), time.perf_counter()
                call = actor.call("generate", batch, 0, GROUP, Sampling(1.0, max_tokens=tokens), returns=2)
                [report] = gather([call], 200, "rollout")
                speeds.append(report.sampled_tokens / (time.perf_counter() - start))
        finally:
            cluster.shutdown()
    return max(speeds[1:])


def bare_speed(record: Record, config: Any, model: str, tokens: int) -> float:
    """Tokens/s of vLLM's own `generate`, with log-probs, which a policy gradient needs."""
    settings = {
        "model": model, "dtype": config.model.dtype, "max_model_len": 256, "max_num_seqs": 256,
        "enforce_eager": not config.rollout.compile,
    }  # fmt: skip
    bare = Bare(settings, {} if record.on_gpu else cpu_environment(os.cpu_count() or 1))
    try:
        speeds = []
        for round_ in range(-1, ROUNDS):
            ids = [p.token_ids.tolist() for p in prompts(record, round_) for _ in range(GROUP)]
            done = bare.generate(ids, tokens, True)
            speeds.append(done["tokens"] / done["seconds"])
    finally:
        bare.close()
    return max(speeds[1:])


def run_rollout(record: Record) -> None:
    from apportion.data.builtin import resolve_model

    tokens = 128 if record.on_gpu else 8
    lengths = (f"rollout.max_response_tokens={tokens}", "data.max_prompt_tokens=96")
    for compiled in (True, False) if record.on_gpu else (False,):
        config = settings_for(record, f"rollout.compile={str(compiled).lower()}", *lengths)
        model = resolve_model(config.model.path)
        label = ("CUDA graphs" if compiled else "eager") if record.on_gpu else "eager, on the CPU"
        ours, bare = our_speed(record, config, model, tokens), bare_speed(record, config, model, tokens)
        record.say(f"{label}, ours", ours, "tokens/s")
        record.say(f"{label}, bare vLLM with log-probs", bare, "tokens/s")
        record.say(f"{label}, ours / bare vLLM", ours / bare)


def policy_rank(config: Any, model: str) -> Any:
    """A policy rank in this process."""
    from apportion.actors.engine import World
    from apportion.actors.policy import PolicyWorker
    from apportion.assembly.training import policy_requests

    made = PolicyWorker(policy_requests(config, model)[0].arguments[0])
    _, port = made.free_port(True)
    made.setup(World(master_port=port, threads=os.cpu_count()))
    return made


def say_update(record: Record, label: str, update: Any, tokens: int, work: float | None) -> float:
    """tokens/s, and on a GPU the utilization and the peak beyond what was there before."""
    seconds = seconds_of(update, record.device, repeats=ROUNDS)
    record.say(f"{label}: tokens/s", tokens / seconds, "tokens/s")
    if record.on_gpu:
        import torch

        stated = stated_flops(torch.cuda.get_device_name(0))
        if stated is not None and work is not None:
            record.say(f"{label}: model FLOP utilization", work / seconds / stated)
        record.say(f"{label}: peak memory beyond the states", peak_bytes(update) / GIB, "GiB")
    return tokens / seconds


def run_update(record: Record) -> None:
    from apportion.actors.microbatch import cut
    from apportion.data.builtin import resolve_model

    tokens = 8192 if record.on_gpu else 256
    config = settings_for(record, f"policy.micro_batch_tokens={tokens}", "policy.gradient_checkpointing=true")
    model = resolve_model(config.model.path)
    sizes = (256, 256, 768, 32) if record.on_gpu else (16, 8, 24, 8)
    batch = made_up_batch(*sizes, vocabulary=vocabulary(record))
    micros = cut(batch, np.arange(len(batch)), tokens)
    real = sum(micro.real_tokens for micro in micros)
    # Plain torch first: what DeepSpeed holds on the device lives as long as its process.
    bare, work = bare_update(record, config, model, batch, micros)
    free(record.device)
    rank = policy_rank(config, model)
    ours = say_update(record, "ours, DeepSpeed", lambda: rank.update(batch, 1, 0.0), real, work)
    record.say("ours / bare torch", ours / bare)


def bare_update(record: Record, config: Any, model: str, batch: Any, micros: list[Any]) -> tuple[float, float]:
    """tokens/s of a bare torch loop, and the FLOPs of one update."""
    from apportion.actors.loading import load_causal_lm
    from benchmarks.gpu.update import Learner

    module = load_causal_lm(model, config.model.dtype, gradient_checkpointing=True).to(record.device).train()
    learner = Learner(module, batch, record.device, 4096)
    learner.drift(micros)
    tokens = sum(micro.real_tokens for micro in micros)
    work = model_flops(module, tokens, tokens / len(batch))
    speed = say_update(record, "bare torch", lambda: learner.update(micros, learner.bare), tokens, work)
    return speed, work


def run_long_row(record: Record) -> None:
    from apportion.data.builtin import resolve_model

    prompt, response = (1024, 7168) if record.on_gpu else (64, 192)
    longest = prompt + response
    config = settings_for(
        record, f"policy.micro_batch_tokens={longest}", "policy.gradient_checkpointing=true",
        f"data.max_prompt_tokens={prompt}", f"rollout.max_response_tokens={response}",
    )  # fmt: skip
    batch = made_up_batch(prompt, response, response, 1, vocabulary=vocabulary(record))
    rank = policy_rank(config, resolve_model(config.model.path))
    say_update(record, f"one row of {longest} tokens", lambda: rank.update(batch, 1, 0.0), longest, None)
    report = rank.update(batch, 1, 0.0)
    norm = report.steps[0].grad_norm
    record.hold("steps without a finite gradient", float(norm is None or not np.isfinite(norm)), 0)


ROLLOUT = Part("rollout", "rollout beside bare vLLM", run_rollout, 420)
UPDATE = Part("update", "policy update on DeepSpeed beside a bare torch loop", run_update, 240)
LONG_ROW = Part("long_row", "one row of 8k tokens", run_long_row)
