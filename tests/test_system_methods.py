"""Every method's recipe for two steps on real Ray and DeepSpeed, with what is its own in metrics and samples."""

import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from run_commands import QUICK, Run, lines_of, starting

pytestmark = pytest.mark.system

FILES = '''
def parity(prompts, completions, **columns):
    """Right or wrong by nothing that means anything, so that groups differ."""
    return [float(sum(map(ord, text)) % 2) for text in completions]


def one(prompts, completions, **columns):
    return [1.0 for _ in completions]


def judge(question, steps, answer, **columns):
    """Finds fault with the first step of every second response."""
    return [0] if sum(map(ord, steps[0])) % 2 else []


def rows():
    for number in range(8):
        yield {"prompt": f"{number} + 1 =", "answer": str(number + 1), "chosen": f"It is {number + 1}."}
'''

TEACHERS = ["teachers.dpo={folder}/teacher-1", "teachers.other={folder}/teacher-2"]
METHODS = {
    "ma_rlhf": [],
    "ma_rlhf_one_action": [],
    "thr": [],
    "capo": ["judge.function=own.py:judge", "judge.critiques=1", "reward.functions=own.py:one"],
    "nthr": ["algorithm.credit.tau=0.0"],  # the threshold of its own is rarely passed within eight tokens
    "aligndistil": TEACHERS,
    "aligndistil_offpolicy": [*TEACHERS, "rollout.response_column=chosen", "rollout.responses_per_prompt=1"],
}


def write_teacher(tiny: str, folder: Path, seed: int) -> None:
    """The student with noise on every weight: it knows something else."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny, folder)
    model, generator = AutoModelForCausalLM.from_pretrained(tiny), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    made = tmp_path_factory.mktemp("methods")
    (made / "own.py").write_text(FILES)
    for seed in (1, 2):
        write_teacher(tiny, made / f"teacher-{seed}", seed)
    return made


@pytest.fixture(scope="module")
def started(folder):
    with starting(folder) as start:
        yield start


@pytest.fixture(scope="module")
def runs(folder, started):
    """Every method's run, two at a time: much of a run's start is one thread's work."""

    def run(name: str) -> Run:
        own = [word.format(folder=folder) for word in METHODS[name]]
        words = [
            "train", "experiment=tiny_grpo", f"algorithm={name}", *QUICK, f"run_name={name}", "train.steps=2",
            "data.train=function:own.py:rows", "reward.functions=own.py:parity", "policy.zero_stage=1",
            "rollout.engine=transformers", *own,  # it starts in half the time; vLLM is in every other test of runs
        ]  # fmt: skip
        return started(*words).finished(480)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(METHODS, pool.map(run, METHODS), strict=True))


def read(folder, runs: dict[str, Run], name: str) -> tuple[list[dict], list[dict]]:
    """The lines of metrics and of samples."""
    assert runs[name].code == 0, runs[name].output
    return lines_of(folder / "runs" / name), lines_of(folder / "runs" / name, "samples.jsonl")


def credit_of(samples: list[dict]) -> list[list[float]]:
    return [sample["advantages"] for sample in samples]


def test_macro_actions_share_credit_among_five_tokens(folder, runs):
    metrics, samples = read(folder, runs, "ma_rlhf")
    assert [line["step"] for line in metrics] == [1, 2]
    assert all(line["policy/grad_norm"] > 0 and math.isfinite(line["critic/loss"]) for line in metrics)
    for row in credit_of(samples):
        assert all(len(set(row[start : start + 5])) == 1 for start in range(0, len(row), 5))
    assert any(len(set(row)) > 1 for row in credit_of(samples))


def test_one_macro_action_has_one_credit(folder, runs):
    metrics, samples = read(folder, runs, "ma_rlhf_one_action")
    assert all(line["policy/grad_norm"] > 0 for line in metrics)
    assert all(len(set(row)) == 1 for row in credit_of(samples)) and any(map(any, credit_of(samples)))


def test_a_step_that_the_judge_found_wrong_costs_its_tokens(folder, runs):
    """Every answer is right, so credit is the judge's alone."""
    metrics, samples = read(folder, runs, "capo")
    assert all(0 < line["credit/wrong_token_share"] < 1 and line["policy/grad_norm"] > 0 for line in metrics)
    assert {tuple(sample["wrong_steps"]) for sample in samples} == {(), (0,)}
    for sample in samples:
        first = [a for a, step in zip(sample["advantages"], sample["step_ids"], strict=True) if step == 0]
        assert all(a <= 0 for a in first) if sample["wrong_steps"] else all(a >= 0 for a in sample["advantages"])
    assert any(min(sample["advantages"]) < 0 for sample in samples)


@pytest.mark.parametrize("name", ["thr", "nthr"])
def test_hidden_rewards_differ_from_token_to_token(folder, runs, name):
    metrics, samples = read(folder, runs, name)
    assert any(line["policy/grad_norm"] > 0 for line in metrics)
    assert any(len({abs(value) for value in row}) > 1 for row in credit_of(samples))


def assert_it_learns_from_the_teachers(metrics: list[dict], scale: float) -> None:
    assert [line["step"] for line in metrics] == [1, 2]
    for line in metrics:
        assert line["policy/distillation_kl"] > 0 and line["policy/grad_norm"] > 0
        assert 0 < line["policy/distillation_total_variation"] < 1
        variation = line["policy/distillation_total_variation"]
        assert line["policy/distillation_alpha"] == pytest.approx(scale * variation + 1e-3, rel=1e-2)


def test_distillation_on_policy_has_a_gradient_and_no_credit(folder, runs):
    metrics, samples = read(folder, runs, "aligndistil")
    assert_it_learns_from_the_teachers(metrics, scale=30)
    assert not any(map(any, credit_of(samples)))


def test_distillation_off_policy_learns_from_the_datas_responses_and_samples_none(folder, runs):
    metrics, samples = read(folder, runs, "aligndistil_offpolicy")
    assert_it_learns_from_the_teachers(metrics, scale=20)
    assert all(sample["response"].startswith("It is ") for sample in samples)
