"""Check on a real GPU what needs only torch (2.11 or newer) and transformers: no vLLM, Ray or DeepSpeed.

    python -m benchmarks.gpu_parts                            # all parts: about 6 minutes on one GPU
    python -m benchmarks.gpu_parts head tree --out parts.json # some, and the figures as JSON
    python -m benchmarks.gpu_parts --device cpu               # what has a CPU path, small: under a minute

Models have random weights; nothing is downloaded. On a GPU each part runs in its own process. A part that fails is
reported and the others go on; the exit status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import json
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
    import torch

    from benchmarks.gpu.apart import run_part_apart
    from benchmarks.gpu.device import describe
    from benchmarks.gpu.report import as_json, exit_status, find, run_here, show, summary

    there = torch.cuda.is_available()
    if given.device == "cuda" and not there:
        print("--device: got cuda, and torch sees no GPU, expected cpu", file=sys.stderr)
        return 2
    device = given.device or ("cuda" if there else "cpu")
    if given.one:
        run_here(find(all_parts(), [given.one])[0], device, given.out)
        return 0
    try:
        chosen = find(all_parts(), given.parts)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if device == "cpu":
        torch.set_num_threads(1)  # models this small gain nothing from more
    machine = describe(device)
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None), flush=True)
    outcomes = []
    for part in chosen:
        # A fault on a GPU spoils the process's CUDA context for whatever follows.
        apart = device == "cuda"
        outcomes.append(run_part_apart("benchmarks.gpu_parts", part, device) if apart else run_here(part, device))
        print(show(outcomes[-1]), flush=True)
        if given.out is not None:  # after each: a machine may be taken away
            given.out.write_text(json.dumps(as_json("gpu_parts", machine, outcomes), indent=1) + "\n")
    print(summary(outcomes))
    return exit_status(outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
