"""Curves of finished runs of the recipes: a picture and a table, written to docs/recipes.md.

apportion train experiment=thr run_name=thr        and so on, then
python benchmarks/recipe_page.py runs/thr runs/poad ...     the others' rows and pictures stay as they are
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from bench_report import ROOT, machine

PAGE, PICTURES = ROOT / "docs" / "recipes.md", ROOT / "docs" / "recipes"
ENDS = 5  # steps that the reward at either end is the mean of


@dataclass
class Run:
    recipe: str
    rewards: list[float]  # of each step, the mean over its samples
    accuracies: list[tuple[int, float]]  # step, held-out greedy accuracy
    minutes: float
    before: float  # minutes of the stages that it trained first


def read(folder: Path) -> Run:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    accuracies = [(line["step"], line["eval/greedy_accuracy"]) for line in lines if "eval/greedy_accuracy" in line]
    rewards = [line["reward/mean"] for line in lines if "reward/mean" in line]
    words = [shlex.split(line) for line in yaml.safe_load((folder / "config.yaml").read_text())["before"]]
    names = [word.partition("=")[2] for line in words for word in line if word.startswith("run_name=")]
    stages = [json.loads((folder.parent / name / "summary.json").read_text())["wall_seconds"] / 60 for name in names]
    return Run(folder.name, rewards, accuracies, summary["wall_seconds"] / 60, sum(stages))


def draw(run: Run) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3))
    axes.plot(range(1, len(run.rewards) + 1), run.rewards, color="tab:gray", label="reward of the step's samples")
    axes.plot(*zip(*run.accuracies, strict=True), "o-", color="tab:blue", label="held-out greedy accuracy")
    axes.set_xlabel("step")
    axes.set_title(f"experiment={run.recipe}")
    axes.legend(fontsize=8)
    figure.tight_layout()
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / f"{run.recipe}.png", dpi=90)
    pyplot.close(figure)


def row(run: Run) -> str:
    (_, before), (_, after) = run.accuracies[0], run.accuracies[-1]
    first, last = statistics.mean(run.rewards[:ENDS]), statistics.mean(run.rewards[-ENDS:])
    minutes = f"{run.minutes:.1f}" + (f" and {run.before:.1f} of its teachers" if run.before else "")
    return (
        f"| `{run.recipe}` | {len(run.rewards)} | {minutes} | {first:.2f} -> {last:.2f} | {before:.3f} -> {after:.3f} |"
    )


def standing_rows() -> dict[str, str]:
    """The page's rows as they are, by recipe."""
    text = PAGE.read_text() if PAGE.is_file() else ""
    return {name: line for line in text.splitlines() for name in re.findall(r"^\| `(\w+)` \|", line)}


def main(folders: list[str]) -> int:
    runs = [read(Path(folder)) for folder in folders]
    if not runs:
        print(__doc__, file=sys.stderr)
        return 2
    rows = standing_rows() | {run.recipe: row(run) for run in runs}
    lines = [
        "# The recipes' curves",
        "",
        "One run of each, as `apportion train experiment=NAME` makes it, on real actors (Ray, vLLM, DeepSpeed); written by",
        "`benchmarks/recipe_page.py` from the runs' own metrics. One seed each: a curve shows that a recipe learns, not that it",
        "is better than another; for comparisons see [credit-study.md](credit-study.md).",
        "",
        f"Machine: {machine()}. Other programs ran beside these runs, so minutes are upper bounds. Reward is the mean of the",
        f"first and of the last {ENDS} steps' samples. Where fewer steps are shown than the recipe has, `train.max_minutes` ended the run.",
        "",
        "| `experiment=` | steps | minutes | reward | held-out greedy accuracy |",
        "|---|---|---|---|---|",
        *rows.values(),
    ]
    for run in runs:
        draw(run)
    for recipe in rows:
        lines += ["", f"![{recipe}](recipes/{recipe}.png)"]
    PAGE.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
