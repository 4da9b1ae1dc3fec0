"""Does MA-PPO reach PPO's final reward in fewer steps (the paper: 1.7 to 2 times faster)?

The task is that of `words`. Both learn from one reward at the end, with the same critic, KL, clip and rates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.credit.learner import Learner, Settings, recipe, responses, rollout
from benchmarks.credit.model import TinyLM
from benchmarks.credit.protocol import Curve, Interval, Outcome, Results, Scale
from benchmarks.credit.report import Comparison, arms_table, comparisons_table, plot, table
from benchmarks.credit.words import ENDING, LEXICON, LIMIT, TOPICS, WORDS, Language, start_model

SUPERVISED, STEPS, EVERY = 250, 64, 4
PROMPTS, TIMES = 48, 12
UPDATES = 2  # optimiser steps a batch is cut into
SMOOTHED = 3  # places whose mean is compared
POLICY, CRITIC = Settings(learning_rate=1e-4), Settings(learning_rate=5e-4)
KL = {"place": "reward", "coefficient": 0.01, "estimator": "k1"}
LONGER = round(0.95 ** (1 / 5), 4)  # a lambda that decays over five tokens as 0.95 does over one
ARMS: dict[str, dict[str, Any]] = {
    "PPO": {"n_gram": 1},
    "MA-PPO, 5 tokens": {"n_gram": 5},
    f"PPO, lambda {LONGER}": {"n_gram": 1, "gae_lambda": LONGER},
}


def algorithm_of(arm: str) -> dict[str, Any]:
    return recipe("ma_rlhf", credit=ARMS[arm], kl=KL, updates_per_batch=UPDATES)


def evaluate(model: TinyLM, language: Language, prompts: Tensor, seed: int) -> dict[str, float]:
    batch = rollout(model, prompts, 1, ENDING, torch.Generator().manual_seed(seed))
    return {"reward": float(language.rewards(prompts, responses(batch)).mean())}


def run(seed: int, scale: Scale) -> Outcome:
    language = Language(np.random.default_rng([seed, 0]))
    start = start_model(seed, language, scale.of(SUPERVISED))
    before = evaluate(start, language, language.all_prompts(TIMES), seed)
    return Outcome({arm: train(start, arm, language, seed, scale, before) for arm in ARMS})


def train(start: TinyLM, arm: str, language: Language, seed: int, scale: Scale, before: dict[str, float]) -> Curve:
    learner = Learner(start, algorithm_of(arm), POLICY, CRITIC)
    random, generator = np.random.default_rng([seed, 3]), torch.Generator().manual_seed(seed)
    everything, curve, explained = language.all_prompts(TIMES), Curve(), 0.0
    curve.add(0, before | {"explained variance": explained})
    for step in range(1, scale.of(STEPS) + 1):
        prompts = language.draw_prompts(scale.of(PROMPTS), random)
        batch = rollout(learner.model, prompts, 1, ENDING, generator)
        batch.rewards = language.rewards(prompts, responses(batch))
        explained = learner.step(batch).get("critic/explained_variance", 0.0)
        if step % EVERY == 0 or step == scale.of(STEPS):
            measured = evaluate(learner.model, language, everything, seed)
            curve.add(step, measured | {"explained variance": explained})
    return curve


def steps_to(results: Results, arm: str, targets: np.ndarray) -> np.ndarray:
    """[seeds] steps until the mean of SMOOTHED neighbouring places is at least the seed's target; infinite if never."""
    values, places = results.curves(arm, "reward"), results.places(arm)
    smooth = np.lib.stride_tricks.sliding_window_view(values, SMOOTHED, axis=1).mean(-1)
    reached = smooth >= targets[:, None] - 1e-9
    when = places[SMOOTHED - 1 :][reached.argmax(1)]
    return np.where(reached.any(1), when, np.inf)


def speed_rows(results: Results) -> list[list[str]]:
    """How many times faster than PPO each other arm comes to PPO's final reward, and half of the way there."""
    final, first = results.last("PPO", "reward", SMOOTHED), results.first("PPO", "reward")
    rows = []
    for name, targets in (("PPO's final reward", final), ("half of PPO's rise", (first + final) / 2)):
        base = steps_to(results, "PPO", targets)
        for arm in results.arms[1:]:
            mine = steps_to(results, arm, targets)
            never = int(np.isinf(mine).sum())
            logs = np.log(base / np.where(np.isinf(mine), results.places(arm)[-1], mine))
            found = Interval.of(logs)
            shown = " ".join([f"{np.exp(found.mean):.2f}", f"({np.exp(found.low):.2f} to {np.exp(found.high):.2f})"])
            rows.append([arm, name, shown, f"{never} of {results.seeds}"])
    return rows


def report(results: Results) -> tuple[str, str]:
    """The section of the page, and its line in the summary."""
    final = {arm: results.last(arm, "reward", SMOOTHED) for arm in results.arms}
    course = {arm: results.course(arm, "reward") for arm in results.arms}
    compared = [
        Comparison(f"{arm}, less PPO: reward, {when}", values[arm] - values["PPO"])
        for when, values in (("at the end", final), ("mean of the course", course))
        for arm in results.arms[1:]
    ]
    longer, macro = results.arms[2], results.arms[1]
    gap = course[macro] - course[longer]
    compared.append(Comparison(f"{macro}, less {longer}: reward, mean of the course", gap))
    speeds = speed_rows(results)
    text = f"""## MA-RLHF: credit for macro actions

*Does MA-PPO reach PPO's final reward in fewer steps (the paper: 1.7 to 2 times faster)?*

A language of {LEXICON} words of two to six letters. The prompt is one of {TOPICS} topics, the response {WORDS} words, letter by letter,
at most {LIMIT} tokens. Topics like and dislike words of their own; one reward at the end says how much of the best possible
liking the words have (chance 0, the best 1; a repeated word 0, an unknown one negative). {STEPS} steps of {PROMPTS} responses in {UPDATES}
optimiser steps; the same critic, KL in the reward ({KL["coefficient"]}), clip and rates, gamma 1, lambda 0.95, no whitening in any arm. PPO is the same
recipe with macro actions of one token, which is token-level PPO to the last bit. The last arm asks what of the effect is
the horizon: lambda {LONGER} decays over five tokens as 0.95 does over one macro action of five.

{plot(results, ("reward", "explained variance"), "steps")}

{arms_table(results, ("reward",), SMOOTHED, course="reward")}

Before: {Interval.of(results.first("PPO", "reward")).shown()}. The end is the mean of the last {SMOOTHED} measurements ({EVERY} steps apart).

{comparisons_table(compared)}

How many times faster than PPO (geometric mean over seeds; a seed that never got there counts as if it had at the end):

{table(["arm", "until", "times faster (95 % interval)", "seeds that never got there"], speeds)}

What this does not show: the paper's responses have hundreds of tokens, ours at most {LIMIT}; and within so few steps the critic
comes to explain little of the returns (right panel), which favours whatever carries the reward further back: PPO with the longer lambda gains as much as macro actions do. In the earlier
round (0.1 million parameters, rates of 0.0002 and 0.001, six seeds) MA-PPO came to PPO's final reward 1.40 (1.11 to 1.76) times as fast, PPO
with the longer lambda 1.18 (1.00 to 1.41) times: the advantage is not there at every size and rate.
"""
    short = (
        f"**MA-RLHF**: {macro} comes to PPO's final reward {speeds[0][2]} times as fast (the paper: 1.7 to 2); PPO with a lambda "
        f"of the same horizon {speeds[1][2]} times."
    )
    return text, short
