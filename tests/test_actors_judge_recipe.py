"""A recipe with a judge: its configuration, the task of step sums, and a whole run."""

import json
import subprocess
import sys

import pytest

from apportion.cli import compose_config, to_config
from apportion.conf.devices import Machine
from apportion.data import step_sums
from apportion.plan import make_plan
from apportion.platform.errors import ConfigError

# the configuration

MACHINE = Machine(2, 64 * 2**30, 0)


def plan_of(*overrides):
    return make_plan(to_config(compose_config(["experiment=tiny_grpo", "algorithm=capo", *overrides]))[0], MACHINE)


FUNCTION = "judge.function=apportion.data.step_sums:judge"


def test_a_method_that_needs_critiques_gets_a_judge_and_others_get_none():
    assert "critiques" in plan_of(FUNCTION).needs
    assert plan_of(FUNCTION, "judge.workers=2").actor("judge").count == 2
    assert plan_of("judge.model=builtin:tiny", "judge.context_tokens=2048").actor("judge").cpus == 1
    assert plan_of(FUNCTION, "algorithm=grpo").actor("judge") is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "judge: got none with algorithm capo, which needs critiques, expected judge.function="),
        (["judge.function=apportion.data.step_sums:juge"], "judge.function: apportion.data.step_sums:juge"),
        (["judge.function=math:sqrt"], "expected f(question, steps, answer, **columns)"),
        ([FUNCTION, "judge.model=x"], "judge: got judge.function and judge.model, expected one of"),
        (["judge.url=http://127.0.0.1:1/v1"], "judge.model: got null with judge.url"),
        (["judge.url=localhost:1", "judge.model=m"], "judge.url: got an address that does not begin with http:// or"),
        (["judge.url=http://127.0.0.1:99999/v1", "judge.model=m"], "judge.url: got an address whose port is no number"),
        (["judge.url=http://127.0.0.1:abc/v1", "judge.model=m"], "judge.url: got an address whose port is no number"),
        (["judge.url=http://a..b/v1", "judge.model=m"], "judge.url: got an address whose host has an empty part"),
        (
            ["judge.url=[http://h/v1,5]", "judge.model=m"],
            "judge.url: got an address that does not begin with http:",
        ),
        (["judge.url=5", "judge.model=m"], "judge.url: got an address that does not begin with http:"),
        (["judge.url=[]", "judge.model=m"], "judge.url: got an empty list"),
        (
            ["judge.url=http://h/v1", "judge.model=m", "judge.api_key_env=NO_SUCH_KEY"],
            "got NO_SUCH_KEY, which is not set",
        ),
        ([FUNCTION, "judge.api_key_env=X"], "judge.api_key_env: got a name without judge.url"),
        (["judge.url=http://h/v1", "judge.model=m", "judge.temperature=0"], "which would all be the same"),
        ([FUNCTION, "judge.batch_timeout_seconds=1800"], "expected less than cluster.call_timeout_seconds=1800"),
        (["judge.model=builtin:tiny"], "judge.context_tokens: got 8192, expected at most 2048"),
        ([FUNCTION, "judge.context_tokens=64"], "expected more than judge.max_tokens=1024"),
        ([FUNCTION, "judge.delimiter=''"], "judge.delimiter: got an empty text"),
        ([FUNCTION, "judge.workers=0"], "judge.workers: got 0, expected at least 1"),
        (
            ["judge.model=builtin:tiny", "judge.context_tokens=2048", "judge.tensor_parallel_size=2"],
            "judge.tensor_parallel_size: got 2 with judge.engine=vllm and cluster.gpus_per_judge=0",
        ),
    ],
)
def test_a_judge_that_cannot_work_is_refused_in_one_line_before_anything_starts(overrides, message):
    with pytest.raises(ConfigError) as refused:
        plan_of(*overrides)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_method_that_asks_for_one_critique_may_have_a_judge_that_always_says_the_same():
    greedy = ["judge.url=http://h/v1", "judge.model=m", "judge.temperature=0"]
    assert plan_of(*greedy, "algorithm.credit.critiques=1").actor("judge").count == 1
    assert plan_of(*greedy, "judge.critiques=1").actor("judge").count == 1
    with pytest.raises(ConfigError, match="which would all be the same"):
        plan_of(*greedy, "algorithm.credit.critiques=1", "judge.critiques=2")


# the task of the recipe


def test_sums_of_the_recipe_are_on_one_side_only_and_the_same_every_time():
    sides = {side: list(step_sums.rows(side, count=300)) for side in ("train", "eval")}
    held_out = {tuple(sorted(row["terms"])) for row in sides["eval"]}
    assert held_out.isdisjoint(tuple(sorted(row["terms"])) for row in sides["train"])
    assert all(int(row["answer"]) == sum(row["terms"]) for row in sides["train"])
    assert list(step_sums.rows("eval", count=300)) == sides["eval"]


def test_the_exact_judge_finds_each_wrong_sum_whatever_the_final_number():
    steps = ["2 + 2 = 5\n", "so far so good\n", "5 + 3 = 7 and 1+1 = 2\n", "1 + 2 + 3 = 6"]
    assert step_sums.judge("2 + 2 + 3:", steps, "7") == [0, 2]


# the whole run


@pytest.mark.system
def test_a_run_with_a_judge_model_of_its_own_keeps_its_critiques_beside_the_trajectories(tmp_path):
    words = ["experiment=tiny_grpo", "algorithm=capo", "judge.model=builtin:tiny", "judge.context_tokens=2048"]
    words += [
        "judge.max_tokens=8",
        "judge.critiques=2",
        "judge.concurrency=8",
        "judge.max_failed_share=1",
        "train.steps=1",
        "train.prompts_per_step=2",
    ]
    words += ["data.eval=null", "tracking.plots=false", "checkpoint.final=false"]
    words += [f"runs_folder={tmp_path}", "run_name=judged"]
    done = subprocess.run(
        [sys.executable, "-m", "apportion", "train", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    [step] = [json.loads(line) for line in (tmp_path / "judged" / "metrics.jsonl").read_text().splitlines()]
    # A random model gives no verdict: every critique is counted, has no vote, and nothing is penalised.
    assert step["judge/critiques"] == 16 and step["judge/failed_share"] == 1.0 and step["judge/unjudged_share"] == 1.0
    assert step["credit/wrong_token_share"] == 0.0 and step["timing/judge"] > 0
    samples = [json.loads(line) for line in (tmp_path / "judged" / "samples.jsonl").read_text().splitlines()]
    assert all(len(sample["critiques"]) == 2 and sample["wrong_steps"] == [] for sample in samples)
    assert {c["failure"] for sample in samples for c in sample["critiques"]} <= {"cut", "unparseable"}
    assert len(list((tmp_path / "judged" / "critiques").rglob("*.json"))) <= 8
