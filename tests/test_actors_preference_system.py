"""The preference stages on real Ray and DeepSpeed: sft, reward model, dpo and reverse dpo, each from the one before."""

import json

import pytest

from apportion.cli import main
from apportion.platform.tracking import read_metrics

WORDS = ["ant", "bee", "cow", "dog", "eel", "fox", "gnu", "hen"]


def write_pairs(path):
    """The chosen answer repeats the word, the rejected one is noise: a byte-level model tells them apart in a few steps."""
    rows = [
        {"prompt": f"say {word} {number}", "chosen": f"{word}.", "rejected": "zzzz"}
        for number in range(8)
        for word in WORDS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(tmp_path, stage, *words):
    assert (
        main(
            [
                stage,
                f"data.train={tmp_path}/pairs.jsonl",
                f"runs_folder={tmp_path}/runs",
                "data.eval_share=0.25",
                "data.max_prompt_tokens=24",
                "data.max_tokens=32",
                "policy.micro_batch_tokens=256",
                "policy.learning_rate=5e-3",
                "model.dtype=float32",
                "train.batch_size=16",
                "cluster.threads=1",
                "tracking.plots=false",
                "checkpoint.every_steps=0",
                *words,
            ]
        )
        == 0
    )


def model_of(tmp_path, name):
    return next((tmp_path / "runs" / name / "checkpoints").glob("step-*")) / "model"


def held_out(tmp_path, name):
    summary = json.loads((tmp_path / "runs" / name / "summary.json").read_text())
    return summary["held_out_before"], summary["held_out_after"]


@pytest.mark.system
def test_every_stage_learns_an_easy_task_from_where_the_one_before_ended(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl")
    run(tmp_path, "sft", "model.path=builtin:tiny", "run_name=sft", "train.steps=4")
    before, after = held_out(tmp_path, "sft")
    assert after["eval/nll"] < before["eval/nll"] - 0.5
    tuned = f"model.path={model_of(tmp_path, 'sft')}"

    run(
        tmp_path,
        "reward-model",
        tuned,
        "run_name=reward",
        "train.steps=3",
        "cluster.policy_ranks=2",
    )
    before, after = held_out(tmp_path, "reward")
    assert after["eval/pair_accuracy"] == 1.0
    assert after["eval/pair_loss"] < before["eval/pair_loss"]

    run(tmp_path, "dpo", tuned, "run_name=dpo", "train.steps=3", "policy.lora.rank=4")
    before, after = held_out(tmp_path, "dpo")
    assert before["eval/pair_accuracy"] == 0.5 and before["eval/pair_margin"] == 0.0
    assert after["eval/pair_accuracy"] == 1.0 and after["eval/pair_margin"] > 0.01

    run(tmp_path, "dpo", tuned, "run_name=reverse", "train.steps=3", "dpo.reverse=true")
    before, after = held_out(tmp_path, "reverse")
    assert after["eval/pair_accuracy"] == 1.0 and after["eval/pair_margin"] > 0.01
    first, *_, last = read_metrics(tmp_path / "runs" / "reverse")[1:]
    ways = [line["dpo/rejected_logprob"] - line["dpo/chosen_logprob"] for line in (first, last)]
    assert ways[1] > ways[0]  # what the data rejects gains on what it chooses
