"""Our speed beside bare vLLM and a bare torch loop, side by side, as ratios; writes docs/benchmarks.md.

python benchmarks/bench.py                   every part
python benchmarks/bench.py rollout update    some
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_report import Part, read_part, show, store, write_page

HERE = Path(__file__).resolve().parent
PARTS = {"rollout": 300, "update": 300, "step": 400, "credit": 400}  # seconds each may take
PEER = {"peer": 1500}


def main(names: list[str]) -> int:
    every = PARTS | PEER
    unknown = [name for name in names if name not in every]
    if unknown:
        print(f"part: got {unknown[0]!r}, expected some of {', '.join(every)}", file=sys.stderr)
        return 2
    parts, failed = [], []
    for name in names or PARTS:
        part = run(name, every[name])
        parts.append(part) if part else failed.append(name)
    everything = store(parts)
    write_page(everything)
    show(parts)
    if failed:
        print(f"\nthese parts failed, their last results stand: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(name: str, seconds: float) -> Part | None:
    """One part in a process of its own; None if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        print(f"measuring {name} ...", flush=True)
        command = [sys.executable, str(HERE / f"bench_{name}.py"), str(out)]
        # A group of its own: a part that is late leaves neither Ray nor engines behind.
        process = subprocess.Popen(command, cwd=HERE.parent, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"{name}: no end within {seconds:.0f} s; is the machine busy?", file=sys.stderr)
            code = None
        finally:
            _stop(process)
        return read_part(json.loads(out.read_text())) if code == 0 and out.exists() else None


def _stop(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
