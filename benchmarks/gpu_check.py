"""Check the whole stack on a GPU: doctor, a short run, speed beside bare vLLM and bare torch, syncs, memory.

    REQUIREMENTS=cuda make gpu-check                           # all parts: about ten minutes on one 80 GB GPU
    python -m benchmarks.gpu_check sync update --out check.json # some, and the figures as JSON
    python -m benchmarks.gpu_check --cpu                       # the same parts, small, to test this program

The model has random weights; nothing is downloaded. Each part runs in its own process with a time limit. A part that
fails is reported and the others go on; the exit status is 1 if any failed, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

PARTS = ("doctor", "quickstart", "model", "rollout", "update", "long_row", "sync", "families")


def all_parts() -> list:
    """Every part. Imports torch."""
    from benchmarks.gpu import runs, sides

    parts = [
        runs.DOCTOR, runs.QUICKSTART, runs.MAKE, sides.ROLLOUT, sides.UPDATE, sides.LONG_ROW, runs.SYNC, runs.FAMILIES,
    ]  # fmt: skip
    assert tuple(part.name for part in parts) == PARTS
    return parts


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; all if left out")
    parser.add_argument("--cpu", action="store_true", help="run the same parts small, without a GPU")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), help=argparse.SUPPRESS)  # of --one
    parser.add_argument("--one", help=argparse.SUPPRESS)  # run this part here and write its outcome to --out
    given = parser.parse_args(arguments)
    from benchmarks.gpu.apart import end_children_when_ended, gpu_is_there, run_all
    from benchmarks.gpu.report import find, run_here

    end_children_when_ended()
    if given.one:
        run_here(find(all_parts(), [given.one])[0], given.device, given.out)
        sys.stdout.flush()
        os._exit(0)  # vLLM's and DeepSpeed's threads are not waited for
    if not given.cpu and not gpu_is_there():
        print(
            "gpu_check: torch sees no GPU, expected one: run `REQUIREMENTS=cuda make gpu-check` on a machine with an NVIDIA "
            "GPU, or `python -m benchmarks.gpu_check --cpu` for the same parts, small, on this one",
            file=sys.stderr,
        )
        return 2
    try:
        chosen = find(all_parts(), given.parts)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if given.cpu:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    elif given.parts and "model" not in given.parts:
        chosen = find(all_parts(), ["model", *given.parts])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GPU_CHECK_MODEL"] = folder
        return run_all("benchmarks.gpu_check", chosen, "cpu" if given.cpu else "cuda", given.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
