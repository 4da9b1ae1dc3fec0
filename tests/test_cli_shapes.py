"""Command lines whose values have another shape than their keys: one line that names the key."""

import pytest

from apportion.cli import compose_config, to_config
from apportion.platform.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["before=[{source: arithmetic}]"], "before: got [{'source': 'arithmetic'}], expected a list [a,b]"),
        (["train=${seed}"], "train: got 0, expected its keys, one by one (steps, prompts_per_step, deterministic, "),
        (
            ["policy.lora=${seed}"],
            "policy.lora: got 0, expected its keys, one by one (rank, alpha, dropout, targets) or null",
        ),
        (["rollout.stop=[{a: b}]"], "rollout.stop: got [{'a': 'b'}], expected a list [a,b]"),
        (
            ["algorithm.shaping.x=1"],
            "algorithm.shaping.x: got a value of algorithm.shaping, which is a list of 0, expected an",
        ),
        (
            ["cluster=${seed}", "cluster.policy_ranks=1"],
            "cluster.policy_ranks: got a value of cluster, which is the reference ",
        ),
        (["=1"], "override: got '=1', expected key=value: there is no key"),
        (
            ["algorithm=[{source: arithmetic}]"],
            "algorithm: got [{source: arithmetic}], expected a name: algorithm=NAME",
        ),
        (["algorithm=1.5"], "algorithm: got 1.5, expected a name: algorithm=NAME"),
        (
            ["~train.steps=7"],
            "train.steps: got ~train.steps=7 where the value is 3, expected train.steps=VALUE: a key of",
        ),
        (
            ["~algorithm.credit.eps=7"],
            "algorithm.credit.eps: got ~algorithm.credit.eps=7 where the value is 1e-06, expected",
        ),
        (["train.steps=" + "9" * 5000], "train.steps: got a number of more than 308 digits"),
        (["policy.learning_rate=1" + "0" * 400], "policy.learning_rate: got a number of more than 308 digits"),
        (["x" * 5000 + "=1"], "xxxxxx"),
        (["model.path=" + "y" * 300], "model.path: got 'yyyyyyy"),
        (["model.path=~nobody_here/m"], "model.path: got '~nobody_here/m', expected ~/ or ~USER of a user"),
        (["train.steps=" + "x" * 5000], "train.steps: got 'xxxxxxx"),
        (["+algorithm=rloo", "algorithm=rloo"], "algorithm: got it twice, expected algorithm=NAME once"),
        (
            ["rollout=${checkpoint}"],
            "rollout: got the keys every_steps, every_minutes, keep, final, expected its keys, one by one",
        ),
        (["~train"], "train: got a deletion, expected train=VALUE: a key of the schema cannot be deleted"),
        (["~policy.lora"], "policy.lora: got a deletion"),
        (["a@b=1"], "a: got 'a@b=1', expected key=value: only a group of files takes @"),
    ],
)
def test_a_value_of_another_shape_is_named_in_one_short_line(words, line):
    with pytest.raises(ConfigError) as error:
        to_config(compose_config(["experiment=tiny_grpo", *words]))
    assert str(error.value).startswith(line)
    assert len(str(error.value)) < 1200 and "\n" not in str(error.value)
