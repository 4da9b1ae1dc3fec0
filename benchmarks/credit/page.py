"""docs/credit-study.md from the results of all questions that were run."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from benchmarks.credit.model import TinyLM
from benchmarks.credit.protocol import RESULTS, Results
from benchmarks.credit.report import PAGE

HEAD = """# Credit study

<!-- Written by benchmarks/credit/page.py from benchmarks/credit/results. `make study` runs everything again. -->

For each of the five methods the question that its paper asks, on a task made for it, with a model small enough for two CPU
cores. What is measured is the code that ships: selection, credit, denominators, losses and influences come from the same
methods of the same classes that the actors of a run call, with the recipes of `apportion/conf/algorithm`. Left out is only
what starts processes and moves data (Ray, vLLM, DeepSpeed): one process, AdamW on plain torch, sampling by the model itself.

**Model.** A decoder of two layers, width 208, about {millions:.1f} million parameters, trained from scratch: first supervised, on
responses that leave room to learn, then by reinforcement learning. Vocabularies have 10 to 30 tokens and responses 10 to 60.

**Seeds and intervals.** {seeds} seeds a question. A seed sets the task, the starting weights and all sampling; within it
every arm starts from the same model and sees the same prompts, so arms are compared seed by seed. Intervals are 95 % by
Student's t over seeds. They say how much another seed of the *same* small task would change the mean. They are not
corrected for the number of comparisons, and they say nothing about other tasks, larger models or better-tuned
baselines. Within a question all arms have the same learning rates, samples and steps.

**How tasks were chosen.** In trials on one or two seeds, which are among those of the study, difficulty and rates were changed until
the baseline learned something and not everything. That choice decides how large a difference can be, and each section says
what other settings gave; those trials, and an earlier round of the whole study, had a model of 0.1 million parameters and rates
about twice as high. Nothing here was registered beforehand.

**Claim** is what a paper's claim makes of a difference: *holds* where the whole interval lies on the claimed side of 0,
*the opposite holds* where it lies on the other, *not told apart* where it contains 0.

## In short

{summary}
"""


def write_page(questions: Sequence[str]) -> Path:
    """Sections in the order of `questions`; those without results are left out."""
    sections, lines, seeds, seconds = [], [], [], 0.0
    for name in questions:
        if not (RESULTS / f"{name}.json").exists():
            continue
        results, module = Results.load(name), importlib.import_module(f"benchmarks.credit.{name}")
        text, short = module.report(results)
        sections.append(text)
        lines.append(short)
        seeds.append(results.seeds)
        seconds += results.seconds
    shown = str(seeds[0]) if len(set(seeds)) == 1 else f"{min(seeds)} to {max(seeds)}"
    millions = sum(weight.numel() for weight in TinyLM(30).parameters()) / 1e6
    page = HEAD.format(seeds=shown, millions=millions, summary="\n".join(f"- {line}" for line in lines))
    page += f"\nAll runs together took {seconds / 60:.0f} minutes of CPU time.\n"
    PAGE.write_text("\n".join([page, *sections]))
    return PAGE
