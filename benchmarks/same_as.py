"""Compare this working tree with another commit: do the same runs give the same samples and weights, bit for bit?

    python -m benchmarks.same_as main~20              # all cases: about ten minutes on two cores
    python -m benchmarks.same_as main~20 grpo lora    # some

Each case runs once with the code of each side, in deterministic mode with the same seed. Metrics that measure time or
memory are not compared. A field that only one side writes is listed, not counted as a difference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LIMIT_SECONDS = 600  # of one run; most take half a minute
MEASURED = ("time", "timing/", "perf/", "gpu/", "sync/sent_bytes", "sync/proved_bytes", "sync/read_bytes")
COMMON = (
    "tracking.console=false", "tracking.plots=false", "cluster.threads=1", "seed=5",
    "checkpoint.every_steps=0", "checkpoint.final=true",
)  # fmt: skip
LOOP = (
    *COMMON,
    "train.deterministic=true",
    "data.eval=null",
    "evaluation.before=false",
    "tracking.samples_per_step=64",
)
GUESS = (
    "environment.cls={root}/examples/guess.py:Guess", "data.train=function:{root}/examples/guess.py:rows",
    "reward.functions=null", "environment.max_turns=3", "environment.max_turn_tokens=4", "environment.workers=2",
    "rollout.max_response_tokens=160", "data.max_prompt_tokens=160",
)  # fmt: skip
CASES: dict[str, tuple[str, ...]] = {
    "grpo": ("train", "experiment=tiny_grpo", *LOOP),
    "ppo": ("train", "experiment=tiny_ppo", *LOOP, "algorithm.updates_per_batch=2"),
    "lora": ("train", "experiment=tiny_grpo", *LOOP, "policy.lora.rank=4"),
    "environment": ("train", "experiment=tiny_grpo", *LOOP, *GUESS),
    "dpo": (
        "dpo", *COMMON, "train.deterministic=true", "model.path=builtin:tiny", "data.train={root}/examples/pairs.jsonl",
        "data.eval=null", "train.batch_size=4", "train.steps=3", "policy.learning_rate=1e-3",
    ),
}  # fmt: skip


@dataclass
class Comparison:
    """What two finished runs have in common. `differ` holds a sentence for each difference."""

    metrics: int = 0  # values of steps that are equal
    samples: int = 0  # rows that are equal
    tensors: int = 0  # tensors of the model that are equal
    differ: list[str] = field(default_factory=list)
    on_one_side: set[str] = field(default_factory=set)


def compare(base: Path, here: Path) -> Comparison:
    """Compare the run folders of both sides."""
    found = Comparison()
    _compare_rows(found, "metrics.jsonl", _rows(base, "metrics.jsonl"), _rows(here, "metrics.jsonl"))
    _compare_rows(found, "samples.jsonl", _rows(base, "samples.jsonl"), _rows(here, "samples.jsonl"))
    _compare_models(found, base, here)
    return found


def _rows(run: Path, name: str) -> list[dict[str, Any]]:
    file = run / name
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def _compare_rows(found: Comparison, name: str, base: list[dict[str, Any]], here: list[dict[str, Any]]) -> None:
    if len(base) != len(here):
        found.differ.append(f"{name}: {len(base)} lines before, {len(here)} now")
    for number, (one, other) in enumerate(zip(base, here, strict=False), 1):
        names = {key for key in {*one, *other} if not key.startswith(MEASURED)}
        found.on_one_side |= {f"{name}: {key}" for key in names if (key in one) != (key in other)}
        both = [key for key in sorted(names) if key in one and key in other]
        unequal = [key for key in both if json.dumps(one[key]) != json.dumps(other[key])]
        found.differ += [f"{name} line {number}: {key}: {one[key]!r} before, {other[key]!r} now" for key in unequal]
        if name == "metrics.jsonl":
            found.metrics += len(both) - len(unequal)
        else:
            found.samples += not unequal


def _compare_models(found: Comparison, base: Path, here: Path) -> None:
    one, other = dict(_tensors(base)), dict(_tensors(here))
    if not one or one.keys() != other.keys():
        odd = sorted(one.keys() ^ other.keys())[:3]
        found.differ.append(
            f"model: {len(one)} tensors before, {len(other)} now ({', '.join(odd) or 'none was saved'})"
        )
    for name in one.keys() & other.keys():
        if one[name] == other[name]:
            found.tensors += 1
        else:
            found.differ.append(f"model: {name} differs")


def _tensors(run: Path) -> Iterator[tuple[str, tuple[str, tuple[int, ...], bytes]]]:
    """Name, and type, shape and bytes of every tensor that the last checkpoint's models hold."""
    import torch
    from safetensors.torch import load_file

    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    for file in sorted(checkpoints[-1].rglob("*.safetensors")) if checkpoints else []:
        where = file.relative_to(checkpoints[-1])
        for name, tensor in load_file(file).items():
            content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            yield f"{where}:{name}", (str(tensor.dtype), tuple(tensor.shape), content)


def run(tree: Path, case: str, folder: Path) -> Path:
    """Run one case with the code of `tree`; SystemExit with its last lines where it fails."""
    words = [word.format(root=ROOT) for word in CASES[case]]
    command = [sys.executable, "-P", "-m", "apportion", *words, f"runs_folder={folder}", f"run_name={case}"]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{case}.log", "w+", encoding="utf-8") as log:
        ended = subprocess.run(
            command, cwd=folder, env=kept | {"PYTHONPATH": str(tree)}, stdout=log, stderr=subprocess.STDOUT,
            timeout=LIMIT_SECONDS,
        )  # fmt: skip
        log.seek(0)
        if ended.returncode:
            raise SystemExit(f"{case} failed with the code in {tree}:\n" + "".join(log.readlines()[-15:]))
    return folder / case


def extract(commit: str, folder: Path) -> Path:
    """Write the tree of a commit into `folder`; SystemExit for a name that git does not know."""
    archive = folder.with_suffix(".tar")
    made = subprocess.run(["git", "archive", f"--output={archive}", commit], cwd=ROOT, capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"same_as: got {commit!r}, expected a commit of this repository ({made.stderr.strip()})")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_as", description=__doc__.splitlines()[0])
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of {', '.join(CASES)}; all if left out")
    given = parser.parse_args(arguments)
    unknown = [case for case in given.cases if case not in CASES]
    if unknown:
        parser.error(f"got {unknown[0]!r}, expected some of {', '.join(CASES)}")
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        base = extract(given.base, Path(temporary) / "base")
        print("case         equal values of metrics, samples, tensors")
        for case in given.cases or CASES:
            sides = [
                run(tree, case, Path(temporary) / f"runs-{name}") for name, tree in (("base", base), ("here", ROOT))
            ]
            found = compare(sides[0], sides[1])
            failed |= bool(found.differ)
            word = "DIFFERS" if found.differ else "same"
            print(f"{case:12} {found.metrics}, {found.samples}, {found.tensors}: {word}", flush=True)
            for line in found.differ[:5]:
                print(f"    {line[:300]}")
            for line in sorted(found.on_one_side):
                print(f"    only one side has {line}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
