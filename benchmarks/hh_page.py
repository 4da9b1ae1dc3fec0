"""What one run of examples/hh_pipeline.sh did, stage by stage: a log and plots, written to docs/hh-pipeline.md.

python benchmarks/hh_page.py runs hh        the folder of the runs, and their prefix
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench_report import ROOT, machine

PAGE, PICTURE = ROOT / "docs" / "hh-pipeline.md", ROOT / "docs" / "hh-pipeline.png"
STAGES = {  # run -> (command, the curve that is drawn, what the log shows)
    "sft": ("sft", "sft/nll", ("sft/nll", "sft/grad_norm")),
    "reward": (
        "reward-model",
        "reward_model/loss",
        ("reward_model/loss", "reward_model/accuracy", "reward_model/margin"),
    ),
    "dpo": ("dpo", "dpo/loss", ("dpo/loss", "dpo/accuracy", "dpo/margin")),
    "reverse": ("dpo dpo.reverse=true", "dpo/loss", ("dpo/loss", "dpo/accuracy", "dpo/margin")),
    "ma_rlhf": (
        "train experiment=ma_rlhf",
        "reward/mean",
        ("reward/mean", "policy/kl_reference", "critic/loss", "policy/grad_norm"),
    ),
    "aligndistil": (
        "train experiment=aligndistil",
        "policy/distillation_kl",
        ("policy/distillation_kl", "policy/distillation_total_variation", "policy/grad_norm", "reward/mean"),
    ),
}


def read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, json.loads((folder / "summary.json").read_text())


def section(name: str, lines: list[dict[str, Any]], summary: dict[str, Any]) -> list[str]:
    command, _, shown = STAGES[name]
    held_out = {key: [line[key] for line in lines if key in line] for line in lines for key in line}
    facts = [f"{summary['steps']} steps, {summary['wall_seconds'] / 60:.1f} minutes"]
    if "examples" in summary:
        facts.append(f"{summary['examples']} examples, {summary['held_out_examples']} held out")
    for key in ("eval/nll", "eval/pair_accuracy", "eval/pair_loss"):
        if values := held_out.get(key):
            facts.append(f"held-out {key.removeprefix('eval/')} {values[0]:.3f} -> {values[-1]:.3f}")
    rows = [line for line in lines if shown[0] in line]
    table = [" ".join(["step", *(f"{key:>34}" for key in shown)])]
    cell = lambda row, key: f"{row[key]:>34.4f}" if key in row else f"{'':>34}"  # noqa: E731 - a critic may learn alone
    table += [" ".join([f"{row['step']:>4}", *(cell(row, key) for key in shown)]).rstrip() for row in rows]
    return ["", f"## `apportion {command}`", "", "; ".join(facts) + ".", "", "```", *table, "```"]


def draw(runs: dict[str, list[dict[str, Any]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(2, 3, figsize=(11, 5))
    for axes, (name, lines) in zip(places.flat, runs.items(), strict=True):
        curve = STAGES[name][1]
        points = [(line["step"], line[curve]) for line in lines if curve in line]
        axes.plot(*zip(*points, strict=True), "o-", markersize=3)
        axes.set_title(f"{name}: {curve}", fontsize=9)
        axes.set_xlabel("step", fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=90)
    pyplot.close(figure)


def main(runs_folder: str, prefix: str) -> int:
    found = {name: read(Path(runs_folder) / f"{prefix}-{name}") for name in STAGES}
    minutes = sum(summary["wall_seconds"] for _, summary in found.values()) / 60
    lines = [
        "# From pairs to token credit: one run",
        "",
        "`STEPS=10 RL_STEPS=5 LIMIT=500 examples/hh_pipeline.sh pairs.jsonl.gz` on human preferences about harmlessness (the hh",
        "format; of 500 pairs those within 128 tokens), SmolLM2-135M-Instruct, two cores: fine-tuning, a reward model, DPO and reverse DPO, then MA-RLHF with that reward model and AlignDistil with",
        "those two as its teachers. Written by `benchmarks/hh_page.py` from the runs' own metrics.",
        "",
        f"Machine: {machine()}. {minutes:.0f} minutes in all, starts of actors not counted. It shows that the stages fit together on",
        "real data and real actors; so few steps on so few pairs are not meant to align anything, and do not: see the held-out",
        "numbers.",
        "",
        "![the curve of each stage](hh-pipeline.png)",
    ]
    for name, (metrics, summary) in found.items():
        lines += section(name, metrics, summary)
    draw({name: metrics for name, (metrics, _) in found.items()})
    PAGE.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    sys.exit(main(sys.argv[1], sys.argv[2]))
