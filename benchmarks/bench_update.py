"""Tokens/s of PolicyWorker.update beside a bare torch loop over the same micro-batches, in one process, in turns.

Also: which tensors have a vocabulary axis, and AlignDistil's update beside a plain one.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench_report import Part, Row, Table, median_ratio, spread, write_part
from bench_work import RESPONSES, composed, made_up_batch, rounds_or

ROUNDS = rounds_or(3)
PROMPT, LEAST, MOST = 48, 8, 24  # tokens, as in the quickstart


class BareLoop:
    """What a person would write for one model: bf16 passes, float32 masters, AdamW, the same loss."""

    def __init__(self, model: str, config: Any) -> None:
        import torch

        from apportion.actors.loading import load_causal_lm

        self._model = load_causal_lm(model, config.model.dtype, config.model.attention)
        self._model.train()
        self._parameters = list(self._model.parameters())
        self._masters = [p.detach().float().clone().requires_grad_() for p in self._parameters]
        policy = config.policy
        self._optimizer = torch.optim.AdamW(
            self._masters, lr=policy.learning_rate, betas=(policy.adam_beta1, policy.adam_beta2), foreach=True,
            weight_decay=policy.weight_decay,
        )  # fmt: skip
        self._tokens = policy.micro_batch_tokens

    def update(self, batch: Any) -> None:
        import numpy as np
        import torch

        from apportion.actors.microbatch import cut

        for micro in cut(batch, np.arange(len(batch)), self._tokens):
            hidden = self._model.model(input_ids=micro.input_ids, use_cache=False).last_hidden_state
            logits = self._model.lm_head(hidden[micro.rows, micro.columns]).float()
            logprobs = torch.log_softmax(logits, -1).gather(-1, micro.targets[:, None]).squeeze(-1)
            ratio = (logprobs - logprobs.detach()).exp()
            advantages = torch.from_numpy(batch.advantages[micro.packed_index])
            weights = torch.from_numpy(batch.loss_weights[micro.packed_index])
            losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
            (losses * weights).sum().backward()
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0, foreach=True)
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._masters)


def worker(config: Any, model: str, **changes: Any) -> Any:
    """A policy rank in this process."""
    from apportion.actors.engine import World
    from apportion.actors.policy import PolicyWorker
    from apportion.assembly.training import policy_requests

    spec = replace(policy_requests(config, model)[0].arguments[0], **changes)
    made = PolicyWorker(spec)
    _, port = made.free_port(True)
    made.setup(World(master_port=port, threads=os.cpu_count()))
    return made


def updating(made: Any, share_prompts: bool = False) -> Callable[[Any], None]:
    def update(batch: Any) -> None:
        made.spec = replace(made.spec, share_prompts=share_prompts)
        made.update(batch, 1, 0.0)

    return update


def widest_logits(update: Callable[[Any], None], batch: Any, vocabulary: int, hidden: int) -> int:
    """Tokens of the largest tensor with the vocabulary as an axis that one update makes."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and vocabulary in tensor.shape:
                    tokens = tensor.numel() // vocabulary
                    if tokens != hidden:  # the embedding, its gradient and its optimiser state
                        Watch.most = max(Watch.most, tokens)
            return out

    with Watch():
        update(batch)
    return Watch.most


def seconds(update: Callable[[Any], None], batch: Any) -> float:
    start = time.perf_counter()
    update(batch)
    return time.perf_counter() - start


def in_turns(sides: dict[str, Callable[[Any], None]], batch: Any, rounds: int) -> dict[str, list[float]]:
    """Tokens/s of each round and side."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds):
        order = list(sides) if round_ % 2 == 0 else list(sides)[::-1]
        for name in order:
            speeds[name].append(batch.tokens / seconds(sides[name], batch))
    return speeds


def distillation_times(model: str) -> tuple[float, list[float], list[float]]:
    """Time of AlignDistil's update over that of a plain one on the same slice, and both tokens/s."""
    from apportion.actors.distillation import DistillationSpec

    rows_alone = "policy.share_prompts=false"
    plain, batch = composed(rows_alone), made_up_batch(PROMPT, LEAST, MOST, 16)
    distilled = composed(rows_alone, "algorithm=aligndistil", f"teachers.dpo={model}", f"teachers.other={model}")
    spec = DistillationSpec(dict(distilled.algorithm.distillation), model, model, "bfloat16", "sdpa", False)
    sides = {
        "plain": updating(worker(plain, model)),
        "aligndistil": updating(worker(distilled, model, distillation=spec)),
    }
    for update in sides.values():
        update(batch)
    speeds = in_turns(sides, batch, ROUNDS)
    return median_ratio(speeds["plain"], speeds["aligndistil"]), speeds["plain"], speeds["aligndistil"]


def main(out: str) -> int:
    started = time.perf_counter()
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    import torch

    from apportion.conf.defaults import policy_settings
    from apportion.data.builtin import resolve_model

    torch.set_num_threads(os.cpu_count() or 1)
    plain = ["policy.share_prompts=false"]
    config = composed("policy.zero_stage=0", *plain)
    model = resolve_model(config.model.path)
    batch, small = made_up_batch(PROMPT, LEAST, MOST), made_up_batch(PROMPT, LEAST, MOST, 8)
    first = worker(config, model)
    sides = {
        "bare torch": BareLoop(model, config).update,
        "ours, ZeRO-0": updating(first),
        "ours, ZeRO-1": updating(worker(composed("policy.zero_stage=1", *plain), model)),
        "ours, ZeRO-0, shared prompts": updating(first, share_prompts=True),
    }
    for update in sides.values():
        update(small)
    widest = widest_logits(sides["ours, ZeRO-0"], batch, *composed_model(model))
    speeds = in_turns(sides, batch, ROUNDS)
    del sides, first
    gc.collect()
    slower, *_ = distillation_times(model)
    chunk = policy_settings(config, None).logits_chunk_tokens
    bare = speeds["bare torch"]
    rows = [
        Row(
            "update tokens/s, ours / bare torch", median_ratio(speeds["ours, ZeRO-0"], bare), "", 0.8, True,
            "Logits are made anew in the backward pass where a micro-batch has more response tokens than a chunk, and "
            "entropies are computed for the log; the bare loop does neither.",
            "ZeRO-0, same micro-batches",
        ),
        Row("update tokens/s, ours with ZeRO-1 / bare torch", median_ratio(speeds["ours, ZeRO-1"], bare), ""),
        Row(
            "update tokens/s, ours with shared prompts / bare torch",
            median_ratio(speeds["ours, ZeRO-0, shared prompts"], bare), "",
            detail="the quickstart's setting; counts the tokens of the trajectories, prompts included in each",
        ),
        Row(
            "tokens of the largest tensor with a vocabulary axis", widest, "tokens", chunk, False,
            "A tensor is larger than policy.logits_chunk_tokens.", f"of {batch.tokens} in the batch; every tensor watched",
        ),
        Row(
            "AlignDistil's update time / plain update time", slower, "", 3.2, False,
            "Two more forward passes and a divergence over the whole vocabulary.", "16 responses, two teachers of the same size",
        ),
    ]  # fmt: skip
    table = Table("Tokens/s", ["side", "median (least to most)"], [[n, spread(v)] for n, v in speeds.items()])
    method = (
        f"{RESPONSES} trajectories ({PROMPT} prompt tokens, {LEAST} to {MOST} response tokens), SmolLM2-135M bf16, "
        f"micro-batches of {config.policy.micro_batch_tokens} padded tokens, one optimiser step, advantages not 0 anywhere. "
        "The bare loop: the same rows in the same micro-batches, bf16 passes, logits for response positions alone, the "
        "same clipped loss, clipping of the gradient norm, AdamW on float32 masters; no entropy, no statistics, no "
        f"chunks. All sides live in one process and take turns, {ROUNDS} rounds after a warm-up."
    )
    write_part(out, Part("update", "Update", method, rows, [table]), started)
    return 0


def composed_model(model: str) -> tuple[int, int]:
    """Vocabulary and hidden size."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    return config.vocab_size, config.hidden_size


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
