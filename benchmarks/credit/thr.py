"""Does THR's p > 0 raise greedy accuracy and p < 0 raise pass@k?

The task is that of `sums`; a response is right if its last sum and letter are. Every arm takes the groups that dynamic
sampling leaves, has the same steps and prompts, and differs in what a token's advantage is multiplied by alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.data.metrics import accuracy, mean_pass_at_k
from benchmarks.credit.learner import Learner, Settings, recipe, responses, rollout
from benchmarks.credit.model import TinyLM, generate
from benchmarks.credit.protocol import Curve, Interval, Outcome, Results, Scale
from benchmarks.credit.report import Comparison, arms_table, comparisons_table, plot
from benchmarks.credit.sums import ENDING, LAST_SUM, draw_prompts, same, sampled_answers, start_model, worked

UNSURE = (0.12, 0.95)
SUPERVISED, STEPS, EVERY, RATE = 400, 60, 20, 2.5e-4
GROUP, PROMPTS, HELD_OUT = 8, 24, 128
SAMPLES, KS = 32, (1, 4, 16)
NO_THRESHOLD = float("-inf")
ARMS: dict[str, dict[str, Any] | None] = {
    "GRPO": None,
    "p = 0": {"p": 0.0},
    "p = 0.1": {"p": 0.1},
    "p = -0.1": {"p": -0.1},
    "p = 0.5": {"p": 0.5},
    "p = -0.5": {"p": -0.5},
}


def algorithm_of(arm: str) -> dict[str, Any]:
    thr, changes = recipe("thr"), ARMS[arm]
    if changes is None:
        return {**thr, "credit": thr["credit"]["base"]}
    return {**thr, "credit": {**thr["credit"], **changes}}


@torch.no_grad()
def evaluate(model: TinyLM, prompts: Tensor, seed: int) -> dict[str, float]:
    right = worked(prompts)
    ids, _, lengths = generate(model, prompts, ENDING, torch.Generator(), greedy=True)
    greedy = same([row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)], right, LAST_SUM)
    sampled = same(sampled_answers(model, prompts, SAMPLES, seed), right.repeat_interleave(SAMPLES, 0), LAST_SUM)
    table = sampled.reshape(len(prompts), SAMPLES).tolist()
    return {"greedy": accuracy(greedy)} | {f"pass@{k}": mean_pass_at_k(table, k) for k in KS}


def run(seed: int, scale: Scale) -> Outcome:
    start = start_model(seed, UNSURE, scale.of(SUPERVISED))
    held_out = draw_prompts(scale.of(HELD_OUT), True, np.random.default_rng([seed, 2]))
    before = evaluate(start, held_out, seed) | {"masked tokens": 0.0}
    return Outcome({arm: train(start, arm, seed, held_out, scale, before) for arm in ARMS})


def train(start: TinyLM, arm: str, seed: int, held_out: Tensor, scale: Scale, before: dict[str, float]) -> Curve:
    learner = Learner(start, algorithm_of(arm), Settings(learning_rate=RATE))
    random, generator = np.random.default_rng([seed, 3]), torch.Generator().manual_seed(seed)
    curve, masked = Curve(), 0.0
    curve.add(0, before)
    for step in range(1, scale.of(STEPS) + 1):
        prompts = draw_prompts(scale.of(PROMPTS), False, random)
        batch = rollout(learner.model, prompts, GROUP, ENDING, generator)
        batch.rewards = same(responses(batch), worked(prompts).repeat_interleave(GROUP, 0), LAST_SUM)
        masked = learner.step(batch).get("credit/masked_share", 0.0)
        if step % EVERY == 0 or step == scale.of(STEPS):
            curve.add(step, evaluate(learner.model, held_out, seed) | {"masked tokens": masked})
    return curve


def report(results: Results) -> tuple[str, str]:
    """The section of the page, and its line in the summary."""
    compared = []
    for p in ("0.1", "0.5"):
        for base in ("p = 0", "GRPO"):
            arm, other = f"p = {p}", f"p = -{p}"
            gain = results.last(arm, "greedy") - results.last(base, "greedy")
            compared.append(Comparison(f"greedy: {arm} less {base}", gain))
            gain = results.last(other, "pass@16") - results.last(base, "pass@16")
            compared.append(Comparison(f"pass@16: {other} less {base}", gain))
    for p in ("0.1", "0.5"):
        for metric, sign in (("greedy", 1), ("pass@1", 1), ("pass@16", -1)):
            gap = results.last(f"p = {p}", metric) - results.last(f"p = -{p}", metric)
            compared.append(Comparison(f"{metric}: p = {p} less p = -{p}", gap, sign))
    verdicts = {c.text: c.verdict for c in compared}
    text = f"""## THR: leaning towards or away from what makes right answers likelier

*Does p > 0 raise greedy accuracy and p < 0 raise pass@k?*

The running sums of the CAPO question, with a reward for the last sum (and its letter); the teacher's share of right results
is drawn from {UNSURE[0]} to {UNSURE[1]}. {STEPS} steps of {PROMPTS} prompts x {GROUP} responses, dynamic sampling in every arm. `p = 0` has the threshold of
THR and no lean; 0.1 is the paper's size, 0.5 is there because an effect of 0.1 may be too small to see. On {HELD_OUT} held-out
prompts: greedy accuracy, and pass@k from {SAMPLES} samples each.

{plot(results, ("greedy", "pass@1", "pass@16"), "steps")}

{arms_table(results, ("greedy", "pass@1", "pass@4", "pass@16", "masked tokens"))}

Before: greedy {Interval.of(results.first("GRPO", "greedy")).shown()}, pass@16 {Interval.of(results.first("GRPO", "pass@16")).shown()}.

{comparisons_table(compared)}

What this does not show: held-out questions rest on the table that training teaches, so greedy accuracy and pass@k rise
together here. The paper trains large models that can answer most questions in some of their samples already, where
sharpening costs variety; that trade is what p is to steer, and it hardly arises here. In a trial of two seeds where the teacher
was so unsure (0.05 to 0.75) that no arm learned much, pass@16 fell in every arm but p = 0.5 with one of the seeds: no sign of p < 0
keeping it up either.
"""
    short = (
        f"**THR**: greedy accuracy of p = 0.5 beyond p = 0: {verdicts['greedy: p = 0.5 less p = 0']}; pass@16 of p = -0.5 beyond "
        f"p = 0: {verdicts['pass@16: p = -0.5 less p = 0']}; the same at the paper's 0.1: "
        f"{verdicts['greedy: p = 0.1 less p = 0']}; {verdicts['pass@16: p = -0.1 less p = 0']}."
    )
    return text, short
