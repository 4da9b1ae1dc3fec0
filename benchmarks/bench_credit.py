"""Credit alone: tokens/s of each method beside one update of the same batch, and how time and memory grow with tokens."""

from __future__ import annotations

import ctypes
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_report import Part, Row, Table, write_part
from bench_work import GROUP, RESPONSES, composed, made_up_batch

LENGTH, VOCABULARY, HIDDEN = 2048, 2048, 576
SLICE = 2  # responses whose update is timed
STEP_TOKENS = 64  # tokens of a reasoning step
CURVE = (1024, 2048, 4096, 8192, 16384, 32768)
ROUNDS_OF_MEMORY = 5
LINEAR = 1.25  # largest exponent that counts as linear
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo"},
    "rloo": {"name": "rloo"},
    "reinforce_pp": {"name": "reinforce_pp"},
    "gae (PPO)": {"name": "gae"},
    "macro_actions, fixed (MA-RLHF)": {"name": "macro_actions"},
    "macro_actions, randomised": {"name": "macro_actions", "termination": "randomised"},
    "macro_actions, perplexity": {"name": "macro_actions", "termination": "perplexity"},
    "poad": {"name": "poad"},
    "capo": {"name": "capo"},
    "hidden_reward (THR)": {"name": "hidden_reward"},
    "hidden_reward (NTHR)": {"name": "hidden_reward", "variant": "nthr"},
}


@dataclass
class Line:
    """What was measured of one method: tokens/s, share of an update's time, exponents of growth."""

    name: str
    speed: float
    share: float
    time_growth: float
    memory_growth: float


def credit_input(responses: int, length: int) -> Any:
    """Full-length responses with every signal a method may ask for."""
    import torch

    from apportion.algorithms.interface import CreditInput

    random = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(responses, length, generator=random)  # noqa: E731
    rewards = (torch.arange(responses) % 2).float()
    token_rewards = torch.zeros(responses, length)
    token_rewards[:, -1] = rewards
    steps = (torch.arange(length) // STEP_TOKENS).expand(responses, length)
    return CreditInput(
        mask_BT=torch.ones(responses, length, dtype=torch.bool),
        group_ids_B=torch.arange(responses) // GROUP,
        rewards_B=rewards,
        token_rewards_BT=token_rewards,
        turn_ids_BT=torch.zeros(responses, length, dtype=torch.int64),
        terminated_B=torch.ones(responses, dtype=torch.bool),
        token_ids_BT=torch.randint(0, VOCABULARY, (responses, length), generator=random),
        old_logprobs_BT=-noise().abs(),
        reference_logprobs_BT=-noise().abs(),
        values_BT=noise(),
        bootstrap_values_B=torch.zeros(responses),
        entropies_BT=noise().abs(),
        influences_BT=noise(),
        step_ids_BT=steps,
        wrong_steps=[[1, 3] for _ in range(responses)],
    )


def group_work(method: Any, responses: int, length: int) -> Callable[[], Any]:
    """What a method with `influences` computes on a policy rank for one group, from its hidden states on."""
    import torch

    from apportion.algorithms.influence import GroupStates, probabilities_on

    random = torch.Generator().manual_seed(0)
    tokens = responses * length
    hidden = torch.randn(tokens, HIDDEN, generator=random, dtype=torch.bfloat16)
    head = torch.randn(VOCABULARY, HIDDEN, generator=random, dtype=torch.bfloat16) / math.sqrt(HIDDEN)
    rows = probabilities_on(head, hidden, torch.full((tokens,), 12.0))
    columns = torch.randint(0, VOCABULARY, (tokens,), generator=random)
    lengths = torch.full((responses,), length)
    rewards = (torch.arange(responses) % 2).float()
    return lambda: method.influence(GroupStates(hidden, rows, columns, VOCABULARY), lengths, rewards)


def timed(work: Callable[[], Any], rounds: int) -> float:
    """Median seconds."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def peak_mib(work: Callable[[], Any]) -> float:
    """How far resident memory rises above where it stands while `work` runs: the most of some rounds, since in one that
    finds room that an earlier left in the allocator it rises less."""
    return max(_rise(work) for _ in range(ROUNDS_OF_MEMORY))


def _rise(work: Callable[[], Any]) -> float:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory("VmRSS")
    kept = work()
    peak = _memory("VmHWM")
    del kept
    return max(0.0, peak - before)


def _memory(name: str) -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return float(line.split()[1]) / 1024


def seconds_of(spec: dict[str, Any], inputs: Any, threads: int) -> float:
    """Of the whole batch: on the credit actor with one thread, and a hook on the policy rank with all of them."""
    import torch

    from apportion.algorithms import registry

    method = registry.build("credit", spec)
    torch.set_num_threads(1)
    method(inputs)
    seconds = timed(lambda: method(inputs), 3)
    if "influences" in method.needs:
        torch.set_num_threads(threads)
        work = group_work(method, GROUP, inputs.mask_BT.shape[1])
        seconds += timed(work, 2) * (len(inputs.mask_BT) // GROUP)
    return seconds


def curve(spec: dict[str, Any], threads: int) -> tuple[list[float], list[float]]:
    """Seconds and peak MiB over the response length, one group."""
    import torch

    from apportion.algorithms import registry

    torch.set_num_threads(threads)

    def at(length: int) -> Callable[[], Any]:
        method = registry.build("credit", spec)
        # Two responses where a token costs matrix products; eight where it costs next to nothing, to see it at all.
        responses = 2 if "influences" in method.needs else GROUP
        inputs = credit_input(responses, length)
        if "influences" not in method.needs:
            return lambda: method(inputs)
        hook = group_work(method, responses, length)
        return lambda: (hook(), method(inputs))

    return over_lengths(at)


def over_lengths(at: Callable[[int], Callable[[], Any]]) -> tuple[list[float], list[float]]:
    """Seconds and peak MiB of what `at` makes for each length."""
    times, peaks = [], []
    for length in CURVE:
        work = at(length)
        work()
        times.append(timed(work, 3))
        peaks.append(peak_mib(work))
    return times, peaks


def distillation_work(length: int) -> Callable[[], Any]:
    """AlignDistil's divergence and its gradient for one response, from the hidden states of student and teachers on."""
    import torch

    from apportion.algorithms.distillation import AlignDistil

    random = torch.Generator().manual_seed(0)
    hidden = [torch.randn(length, HIDDEN, generator=random, dtype=torch.bfloat16) for _ in range(3)]
    head = torch.randn(VOCABULARY, HIDDEN, generator=random, dtype=torch.bfloat16) / math.sqrt(HIDDEN)
    heads = (lambda states: states @ head.T,) * 3

    def work() -> Any:
        student = hidden[0].detach().requires_grad_()
        AlignDistil().losses_in_chunks(student, hidden[1], hidden[2], heads).losses.sum().backward()
        return student.grad

    return work


def exponent(values: list[float]) -> float:
    """Growth of a curve as a power of its length: the slope of a straight line through its last four points in logarithms.

    >>> round(exponent([1.0, 1.0, 4.0, 8.0, 16.0, 32.0]), 6)
    1.0
    """
    lengths, found = CURVE[-4:], [max(v, 1e-9) for v in values[-4:]]
    return statistics.linear_regression([math.log(x) for x in lengths], [math.log(v) for v in found]).slope


def update_seconds() -> float:
    """Seconds of one update of the whole batch, from a slice of it."""
    from bench_update import updating, worker

    from apportion.data.builtin import resolve_model

    config = composed("policy.zero_stage=0", "policy.share_prompts=false")
    made = updating(worker(config, resolve_model(config.model.path)))
    made(made_up_batch(48, 8, 24, GROUP))
    batch = made_up_batch(48, LENGTH, LENGTH, SLICE)
    start = time.perf_counter()
    made(batch)
    return (time.perf_counter() - start) * RESPONSES / SLICE


def main(out: str) -> int:
    started = time.perf_counter()
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    threads, tokens = os.cpu_count() or 1, RESPONSES * LENGTH
    update, inputs = update_seconds(), credit_input(RESPONSES, LENGTH)
    lines, curves = [], []
    for name, spec in METHODS.items():
        seconds = seconds_of(spec, inputs, threads)
        times, peaks = curve(spec, threads)
        lines.append(Line(name, tokens / seconds, seconds / update, exponent(times), exponent(peaks)))
        curves.append([name, *(f"{1e3 * t:,.1f} / {m:,.1f}" for t, m in zip(times, peaks, strict=True))])
    times, peaks = over_lengths(distillation_work)
    distillation = Line("AlignDistil's divergence", 0.0, 0.0, exponent(times), exponent(peaks))
    curves.append([distillation.name, *(f"{1e3 * t:,.1f} / {m:,.1f}" for t, m in zip(times, peaks, strict=True))])
    growth = f"over {CURVE[-4]:,} to {CURVE[-1]:,} tokens a response; 1 is linear, 2 quadratic; the largest: "
    most = lambda field: max([*lines, distillation], key=lambda line: getattr(line, field))  # noqa: E731
    share, time_growth, memory_growth = most("share"), most("time_growth"), most("memory_growth")
    rows = [
        Row("credit time / update time, the costliest method", share.share, "", 0.05, False,
            f"{share.name} takes that much of an update.", share.name),
        Row("credit time, growth as a power of the length", time_growth.time_growth, "", LINEAR, False,
            f"{time_growth.name} grows faster than its tokens.", growth + time_growth.name),
        Row("credit memory, growth as a power of the length", memory_growth.memory_growth, "", LINEAR, False,
            f"{memory_growth.name} grows faster than its tokens.", growth + memory_growth.name),
        Row("one update of the same batch", update, "s", detail=f"{SLICE} responses timed, scaled"),
    ]  # fmt: skip
    tables = [
        Table(
            "Each method",
            ["method", "tokens/s", "credit / update time", "growth of time", "growth of memory"],
            [
                [x.name, f"{x.speed:,.0f}", f"{x.share:.5f}", f"{x.time_growth:.2f}", f"{x.memory_growth:.2f}"]
                for x in lines
            ]
            + [[distillation.name, "", "", f"{distillation.time_growth:.2f}", f"{distillation.memory_growth:.2f}"]],
        ),
        Table(
            f"Time in ms / peak memory in MiB over the response length ({GROUP} responses; THR, NTHR 2; AlignDistil 1)",
            ["method", *(f"{length // 1024}k" for length in CURVE)],
            curves,
        ),
    ]
    method = (
        f"{RESPONSES} responses of {LENGTH} tokens in groups of {GROUP}, every token the policy's own. Credit runs as it "
        "does in a run: one thread in the credit actor; the influences behind THR and NTHR on the policy rank with all "
        f"cores, from hidden states of width {HIDDEN} and a group vocabulary of {VOCABULARY} (the forward pass that "
        "makes the hidden states is the one that makes old log-probs, and is not counted). "
        f"The update is `PolicyWorker.update` with SmolLM2-135M bf16 on {SLICE} of the responses, times {RESPONSES // SLICE}. "
        "AlignDistil has no credit actor; its divergence and gradient are timed from the hidden states of the three models "
        f"on, with {VOCABULARY} tokens of vocabulary (beside the update: see there). "
        "A critique's own generation is a rollout of the judge and is not credit computation."
    )
    write_part(out, Part("credit", "Credit", method, rows, tables), started)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
