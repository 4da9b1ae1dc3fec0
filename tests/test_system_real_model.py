"""The quickstart's recipe cut short, with the model a user meets there: SmolLM2-135M-Instruct in bfloat16."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.system
APPORTION = str(Path(sys.executable).parent / "apportion")
MODEL = "builtin:smollm2-135m-instruct"


def apportion(folder: Path, *words: str) -> str:
    done = subprocess.run([APPORTION, *words], cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    (folder / "length.py").write_text(
        "def length(prompts, completions, **columns):\n    return [len(text) / 100 for text in completions]\n"
    )  # right answers alone are too rare here to move anything in two steps
    apportion(
        folder, "train", "experiment=quickstart", "run_name=real", "train.steps=2", "train.prompts_per_step=4",
        "rollout.responses_per_prompt=4", "data.eval_limit=16", "policy.learning_rate=1e-4",
        f"reward.functions=[numeric_match,{folder}/length.py:length]",
    )  # fmt: skip
    return folder / "runs" / "real"


def test_the_engine_samples_from_the_weights_that_the_trainer_holds(run):
    """bfloat16 on both sides, each with its own kernels: a few hundredths of a nat, where stale weights make tenths."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "policy/loss" in step]
    assert [step["weights/version"] for step in steps] == [1, 2]
    for step in steps:
        assert 0 < step["sync/gap"] < 0.1
        assert 0 < step["mismatch/abs_logprob_diff"] < 0.05
        assert abs(step["mismatch/kl"]) < 0.02


def test_the_run_leaves_what_a_user_looks_for(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2
    assert 0 < summary["accuracy_before"] < 1
    assert (run / "metrics.jsonl").is_file()
    assert len(list(run.rglob("*.png"))) >= 1


def test_transformers_loads_the_checkpoint_and_it_answers(run):
    from apportion.data.builtin import resolve_model

    folder = next((run / "checkpoints").glob("step-*")) / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    before = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=torch.bfloat16)
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2 + 3? Answer with a number."}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    answer = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_evaluating_the_run_gives_what_the_run_said_of_itself(run):
    told = apportion(run.parent.parent, "evaluate", "real")
    after = json.loads((run / "summary.json").read_text())["accuracy_after"]
    assert f"{after:.3f}" in told
