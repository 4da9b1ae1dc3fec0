"""Samples/s of the whole loop beside TRL's GRPOTrainer, which lives in an environment of its own (.cache/trl-venv).

python benchmarks/bench_peer.py     measures, prints and renews docs/benchmarks.md
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_report import ROOT, Part, Row, Table, show, spread, store, write_page, write_part
from bench_step import WARM_UP, train
from bench_work import rounds_or

VENV = ROOT / ".cache" / "trl-venv"
TORCH = "torch==2.13.0"
PACKAGES = ("trl==1.16.0", "transformers==5.19.0", "datasets==5.2.0", "accelerate==1.15.0", "numpy==2.3.5")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STEPS, TOKENS, SAMPLES = WARM_UP + rounds_or(3), 32, 64


def environment() -> Path:
    """TRL's Python; installed the first time."""
    python, done = VENV / "bin" / "python", VENV / ".installed"
    if done.exists() and done.read_text() == " ".join(PACKAGES):
        return python
    print(f"installing TRL into {VENV} (some minutes, once)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    if not _cpu_torch(pip):
        subprocess.run([*pip, "--index-url", CPU_INDEX, TORCH], check=True)
    subprocess.run([*pip, *PACKAGES], check=True)
    done.write_text(" ".join(PACKAGES))
    return python


def _cpu_torch(pip: list[str]) -> bool:
    """Install torch from the usual index if that gives a CPU build; otherwise nothing, for it would be gigabytes."""
    report = subprocess.run(
        [*pip, "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", TORCH],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    build = json.loads(report.stdout[report.stdout.index("{") :])["install"][0]["metadata"]["version"]
    if not build.endswith("+cpu"):
        return False
    subprocess.run([*pip, TORCH], check=True)
    return True


def questions() -> list[str]:
    return [f"What is {a} + {b}? Answer with a number." for a in range(1, 31) for b in range(1, 31)]


def theirs(python: Path, folder: Path) -> list[float]:
    """Seconds of each step after the first."""
    from apportion.data.builtin import resolve_model

    rows, out = folder / "questions.json", folder / "seconds.json"
    rows.write_text(json.dumps(questions()))
    command = [
        str(python),
        str(Path(__file__).with_name("peer_trl.py")),
        resolve_model("builtin:smollm2-135m-instruct"),
    ]
    command += [str(rows), str(STEPS), str(TOKENS), str(out)]
    variables = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count()), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=variables)
    return json.loads(out.read_text())


def ours(folder: Path) -> list[float]:
    """Seconds of each step after the first."""
    folder.mkdir()
    reward = f"{Path(__file__).with_name('peer_reward.py')}:vowels"
    steps, _ = train(
        str(folder), f"train.steps={STEPS}", f"rollout.max_response_tokens={TOKENS}", f"reward.functions={reward}",
        "rollout.compile=true", "data.eval=null",
    )  # fmt: skip
    return [s["timing/step"] for s in steps]


def main(out: str) -> int:
    started = time.perf_counter()
    python = environment()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own, peer = ours(folder / "runs"), theirs(python, folder)
    ratio = statistics.median(peer) / statistics.median(own)
    rows = [
        Row(
            "samples/s, whole loop, ours / TRL's GRPOTrainer", ratio, "", 2.5, True,
            "The forward and backward passes, in which both call the same kernels, are most of a step on two cores.",
            f"{SAMPLES / statistics.median(own):.2f} against {SAMPLES / statistics.median(peer):.2f} samples/s",
        )
    ]  # fmt: skip
    table = Table(
        "Seconds a step", ["side", "median (least to most)"], [["ours", spread(own, 1)], ["TRL", spread(peer, 1)]]
    )
    method = (
        f"8 prompts x 8 responses x at most {TOKENS} tokens, SmolLM2-135M bf16 on CPU, the same questions, the same reward "
        "(one that differs in every group, so that no rows are left out), temperature 1, no KL. Ours: the quickstart's "
        f"recipe with `rollout.compile=true`, every stage of the loop. TRL {PACKAGES[0].partition('==')[2]}: model in "
        f"bf16, no reference model, no gradient checkpointing, 4 micro-batches of 16. {STEPS} steps a run, the first "
        f"{WARM_UP} left out; one side after the other."
    )
    write_part(out, Part("peer", "Beside TRL", method, rows, [table]), started)
    return 0


def alone() -> int:
    """`make bench-peer`"""
    from bench_report import read_part

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        code = main(str(out))
        part = read_part(json.loads(out.read_text()))
    write_page(store([part]))
    show([part])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) if len(sys.argv) > 1 else alone())
