"""Our speed beside bare vLLM and a bare torch loop, side by side, as ratios; writes docs/benchmarks.md.

python benchmarks/bench.py                   every part
python benchmarks/bench.py rollout update    some
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_report import Part, read_part, show, store, write_page

HERE = Path(__file__).resolve().parent
PARTS = {"rollout": 300, "update": 300, "step": 400, "credit": 400}  # seconds each may take
PEER = {"peer": 900}


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
        try:
            code = subprocess.run(command, timeout=seconds, cwd=HERE.parent, check=False).returncode
        except subprocess.TimeoutExpired:
            print(f"{name}: no end within {seconds:.0f} s; is the machine busy?", file=sys.stderr)
            return None
        return read_part(json.loads(out.read_text())) if code == 0 and out.exists() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
