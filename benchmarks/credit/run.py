"""Runs the credit study: `python -m benchmarks.credit.run [--question thr ...] [--seeds 6] [--processes 2]`.

One job is one seed of one question; every arm of it starts from the same model. Results go to benchmarks/credit/results,
the page to docs/credit-study.md.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import time

from benchmarks.credit.page import write_page
from benchmarks.credit.protocol import Outcome, Results, Scale

QUESTIONS = ("macro_actions", "poad", "capo", "aligndistil", "thr")


def work(job: tuple[str, int, int | None]) -> tuple[str, int, Outcome, float]:
    """Question, seed, outcome and seconds of CPU time of one job."""
    import torch

    torch.set_num_threads(1)
    question, seed, most = job
    start = time.process_time()
    outcome = importlib.import_module(f"benchmarks.credit.{question}").run(seed, Scale(most))
    return question, seed, outcome, time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="The credit study: five papers' questions on tiny models.")
    parser.add_argument("--question", nargs="+", choices=QUESTIONS, default=QUESTIONS, help="which; all if not given")
    parser.add_argument("--seeds", type=int, default=6, help="at least 2, for intervals")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="jobs at a time, a thread each")
    parser.add_argument("--most-steps", type=int, help="cut every run to so many steps, to try the programs; no page")
    chosen = parser.parse_args()
    if chosen.seeds < 2:
        parser.error(f"--seeds: got {chosen.seeds}, expected at least 2")
    os.environ["OMP_NUM_THREADS"] = "1"
    # Seed by seed, so that every question has an answer, if a wide one, before any has all its seeds.
    jobs = [(question, seed, chosen.most_steps) for seed in range(chosen.seeds) for question in chosen.question]
    start, done = time.perf_counter(), 0
    outcomes: dict[str, dict[int, Outcome]] = {question: {} for question in chosen.question}
    seconds = dict.fromkeys(chosen.question, 0.0)
    with multiprocessing.get_context("spawn").Pool(chosen.processes) as pool:
        for question, seed, outcome, taken in pool.imap_unordered(work, jobs):
            outcomes[question][seed] = outcome
            seconds[question] += taken
            done += 1
            past = time.perf_counter() - start
            print(f"{done}/{len(jobs)} {question} seed {seed}: {taken:.0f} s of CPU, {past:.0f} s so far", flush=True)
            if len(outcomes[question]) >= 1 and chosen.most_steps is None:  # what is there outlasts an interruption
                in_order = dict(sorted(outcomes[question].items()))
                Results(question, in_order, seconds[question]).save()
    if chosen.most_steps is None:
        print(f"written: {write_page(QUESTIONS)}")


if __name__ == "__main__":
    main()
