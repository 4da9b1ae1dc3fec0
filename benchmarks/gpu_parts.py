"""Check on a real GPU what needs only torch (2.11 or newer) and transformers: no vLLM, Ray or DeepSpeed.

    python -m benchmarks.gpu_parts                            # all parts: about 6 minutes on one GPU
    python -m benchmarks.gpu_parts head tree --out parts.json # some, and the figures as JSON
    python -m benchmarks.gpu_parts --device cpu               # what has a CPU path, small: under a minute

Models have random weights; nothing is downloaded. On a GPU each part runs in its own process. A part that fails is
reported and the others go on; the exit status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

PARTS = (
    "device", "head", "update", "adam", "memory", "causal", "tree", "varlen", "flex", "offload", "ipc", "host_path",
    "checksums", "sampling",
)  # fmt: skip


def all_parts() -> list:
    """Every part. Imports torch."""
    from benchmarks.gpu import attention, hardware, head, memory, optimizer, packed, sampling, transfer, update

    parts = [
        hardware.PART, head.PART, update.PART, optimizer.ADAM, memory.PART, attention.CAUSAL, attention.TREE,
        packed.VARLEN, packed.FLEX, optimizer.OFFLOAD, transfer.IPC, transfer.HOST, transfer.CHECKSUMS, sampling.PART,
    ]  # fmt: skip
    assert tuple(part.name for part in parts) == PARTS
    return parts


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_parts", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; all if left out")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda if torch sees a GPU")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # run this part here and write its outcome to --out
    given = parser.parse_args(arguments)
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("APPORTION_CACHE", cache)  # the tokenizer of random models is made there
        return check(given)


def check(given: argparse.Namespace) -> int:
    from benchmarks.gpu.apart import end_children_when_ended, gpu_is_there, run_all
    from benchmarks.gpu.report import find, run_here

    if given.one:
        run_here(find(all_parts(), [given.one])[0], given.device, given.out)
        return 0
    there = given.device != "cpu" and gpu_is_there()
    if given.device == "cuda" and not there:
        print("--device: got cuda, and torch sees no GPU, expected cpu", file=sys.stderr)
        return 2
    try:
        chosen = find(all_parts(), given.parts)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not there:
        import torch

        torch.set_num_threads(1)  # models this small gain nothing from more
    end_children_when_ended()
    # A fault on a GPU spoils a process's CUDA context for whatever follows: there each part has a process of its own.
    return run_all("benchmarks.gpu_parts", chosen, "cuda" if there else "cpu", given.out, apart=there)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
