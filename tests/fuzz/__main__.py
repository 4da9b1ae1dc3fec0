"""What `make fuzz` runs: thousands of cases of each kind, in processes of their own, as many at a time as there are cores.

python -m fuzz [SEED]     with SEED: that case of each kind alone
FUZZ_FIRST=100000         other cases than the first ones
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).parents[1]
# (kind, its test, how many cases, how many of them one process tries)
KINDS = (
    ("command lines", "test_fuzz.py::test_a_random_command_line_is_planned_or_refused_in_one_line", 2000, 200),
    ("odd numbers", "test_fuzz.py::test_an_odd_number_is_planned_or_refused_in_one_line", 500, 125),
    ("run folders", "test_fuzz.py::test_a_damaged_run_folder_is_taken_up_or_refused_in_one_line", 600, 100),
    ("data files", "test_fuzz_data_files.py::test_broken_data_files", 1000, 250),
    ("rows of messages", "test_fuzz_data_files.py::test_odd_messages", 5000, 5000),
    ("model folders", "test_fuzz_model_folders.py::test_broken_model_folders", 300, 75),
    ("hostile services", "test_fuzz_services.py::test_a_mixture_of_answers_ends_in_rewards_or_failures", 200, 50),
)
LONGEST = 3600  # seconds that one process may take
LINES_OF_A_FAULT = 30


@dataclass
class Tally:
    tried: int = 0
    hangs: int = 0
    faults: list[str] = field(default_factory=list)


def run(kind: str, test: str, first: int, count: int) -> Tally:
    """Cases `first` to `first + count - 1`. A case that ends the process is a fault, and the next process goes on after it."""
    tally, end = Tally(), first + count
    while first < end:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            report = Path(folder) / "report.jsonl"
            environment = os.environ | {
                "APPORTION_FUZZ": str(end - first),
                "APPORTION_FUZZ_FIRST": str(first),
                "APPORTION_FUZZ_REPORT": str(report),
            }
            words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--basetemp={folder}/tmp"]
            done = subprocess.run(
                [*words, f"--timeout={LONGEST}", str(TESTS / test)],
                env=environment, cwd=TESTS.parent, capture_output=True, text=True, errors="replace",
            )  # fmt: skip
            notes = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
            stacks = Path(f"{report}.stacks")
            left = stacks.read_text(errors="replace") if stacks.exists() else ""
        ended = [note for note in notes if note["done"]]
        tally.tried += len(ended)
        tally.faults += [note["fault"] for note in ended if note["fault"]]
        tally.hangs += sum("still busy after" in (note["fault"] or "") for note in ended)
        if notes and not notes[-1]["done"]:  # the process died in this case
            tally.tried, tally.hangs = tally.tried + 1, tally.hangs + bool(left)
            how = left or f"the process ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
            tally.faults.append(f"case {notes[-1]['case']} of {kind}: {how}")
            first = notes[-1]["case"] + 1
            continue
        if done.returncode == 0 and not notes:  # a test that counts its cases by itself
            tally.tried += end - first
        elif done.returncode != 0 and not any(note["fault"] for note in ended):
            tally.faults.append(f"{kind}, cases {first} to {end - 1}: {done.stdout[-3000:]}{done.stderr[-1000:]}")
        break
    return tally


def main(arguments: list[str]) -> int:
    start = time.monotonic()
    first = int(os.environ.get("FUZZ_FIRST") or 0)
    only = os.environ.get("FUZZ_KINDS", "")
    kinds = [kind for kind in KINDS if only in kind[0]]
    pieces = [
        (kind, test, at, min(size, first + count - at))
        for kind, test, count, size in kinds
        for at in range(first, first + count, size)
    ]
    if arguments and arguments[0]:
        pieces = [(kind, test, int(arguments[0]), 1) for kind, test, *_ in kinds]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        tallies = [(piece, pool.submit(run, *piece)) for piece in pieces]
        total: dict[str, Tally] = {}
        for (kind, _, at, count), future in tallies:
            tally, sum_of_kind = future.result(), total.setdefault(kind, Tally())
            print(f"fuzz: {kind} {at} to {at + count - 1}: {len(tally.faults)} faults", flush=True)
            for fault in tally.faults:
                print("\n".join(["", *fault.splitlines()[-LINES_OF_A_FAULT:], ""]), flush=True)
            sum_of_kind.tried += tally.tried
            sum_of_kind.hangs += tally.hangs
            sum_of_kind.faults += tally.faults
    print(f"\nfuzz: {time.monotonic() - start:.0f} s")
    for kind, tally in total.items():
        print(f"fuzz: {tally.tried} {kind}: {len(tally.faults)} faults, {tally.hangs} hangs")
    faults = sum(len(tally.faults) for tally in total.values())
    passed = sum(tally.tried for tally in total.values()) - faults
    if faults:
        print("fuzz: `make fuzz SEED=n` tries case n of each kind alone")
    print(f"{passed} passed, {faults} failed")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
