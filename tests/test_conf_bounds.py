"""Numbers that no run can use are refused with their key, and what is allowed and surely not wanted is said."""

import dataclasses
import typing

import pytest

from apportion.cli import compose_config, main, to_config
from apportion.conf.checks import check_finite
from apportion.conf.preference_schema import STAGES, check
from apportion.conf.schema import Config
from apportion.conf.unwanted import unwanted
from apportion.plan import make_plan
from apportion.platform.errors import ApportionError, ConfigError

KINDS = {"train": Config} | STAGES
# Shares and decay rates from 0 on: a tiny one is as good as 0, and does no harm.
FROM_TINY = (
    "adam_beta1", "adam_beta2", "min_lr_ratio", "dropout", "max_failed_share", "floor", "label_smoothing", "bound",
    "correct_at", "outage_seconds",
)  # fmt: skip


def numbers(kind, prefix=""):
    """(key, its section's class, its name, int or float) of every number of a schema."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        parts = () if typing.get_origin(hint) is list else (hint, *typing.get_args(hint))
        key = f"{prefix}{field.name}"
        section = next((part for part in parts if dataclasses.is_dataclass(part)), None)
        if section is not None:
            yield from numbers(section, f"{key}.")
        elif float in parts or int in parts:
            yield key, kind, field.name, float if float in parts else int


NUMBERS = {(key, section): (name, number) for kind in KINDS.values() for key, section, name, number in numbers(kind)}


def made(section, name, value):
    check_finite(section(**{name: value}))


@pytest.mark.parametrize(("key", "section"), NUMBERS, ids=[f"{s.__name__}:{k}" for k, s in NUMBERS])
def test_a_number_has_bounds_and_its_key_is_in_the_error(key, section):
    name, number = NUMBERS[key, section]
    values = [2**63, -(2**63)] if number is int else [1e300, -1e300]
    if number is float and name not in FROM_TINY:
        values += [1e-300, 5e-324]
    for value in values:
        with pytest.raises(ConfigError) as refused:
            made(section, name, value)
        assert f"{name}: got {value}, expected " in str(refused.value) and "\n" not in str(refused.value)


TINY = ["experiment=tiny_grpo"]
REFUSED = [
    ("rollout.max_sequences=9223372036854775808", "got 9223372036854775808, expected at most 1000000"),
    ("rollout.temperature=1e-300", "got 1e-300, expected 0.01 to 100"),
    ("rollout.temperature=1e300", "got 1e+300, expected 0.01 to 100"),
    ("rollout.stop=[{a: 1}]", "got [{'a': 1}], expected a list [a,b]"),
    ("train.sync_unproved=[[a]]", "got [['a']], expected a list [a,b]"),
    ("policy.adam_eps=1e300", "got 1e+300, expected 1e-30 to 1"),
    ("policy.adam_eps=1e-300", "got 1e-300, expected 1e-30 to 1"),
    ("policy.learning_rate=1e-300", "got 1e-300, expected 0, or 1e-15 to 1000"),
    ("policy.learning_rate=1e300", "got 1e+300, expected 0, or 1e-15 to 1000"),
    ("policy.max_grad_norm=1e-300", "got 1e-300, expected 0, or 1e-30 to 1e+30"),
    ("train.prompts_per_step=100000000", "got 100000000, expected at most 1000000"),
    ("cluster.policy_ranks=100000", "got 100000, expected at most 10000"),
    ("cluster.call_timeout_seconds=1e300", "got 1e+300, expected at most 100000000"),
    ("cluster.gpus_per_policy_rank=1e-300", "got 1e-300, expected 0, or 0.001 to 1024"),
    ("reward.timeout_seconds=1e-300", "got 1e-300, expected 0.001 to 1e+08"),
    ("judge.retries=2000", "got 2000, expected at most 1000"),
    ("checkpoint.every_minutes=1e300", "got 1e+300, expected 0, or 1e-06 to 1e+07"),
    ("algorithm.kl.coefficient=1e300", "got 1e+300, expected 0, or 1e-30 to 1e+06"),
    ("algorithm.credit.eps=1e-300", "got 1e-300, expected 0, or 1e-30 to 1e+30 in size"),
    (
        "policy.warmup_steps=4",
        "got 4 for the run's 3 optimizer steps, expected at most 3, or the rate would never be policy.learning_rate",
    ),
]


@pytest.mark.parametrize(("override", "problem"), REFUSED)
def test_a_value_that_no_run_can_use_is_refused_by_the_plan(override, problem):
    with pytest.raises(ConfigError) as refused:
        make_plan(to_config(compose_config([*TINY, override]))[0])
    assert str(refused.value) == f"{override.partition('=')[0]}: {problem}"


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("weight: 1e300", "got weight 1e+300, expected a number above 0, 1e-30 to 1e+30"),
        ("weight: 1e-320", "got weight 1e-320, expected a number above 0, 1e-30 to 1e+30"),
        (
            "limit: 9223372036854775808",
            "got limit 9223372036854775808, expected a whole number of at most 4294967295 in size",
        ),
        (
            "high: 9223372036854775808",
            "got high 9223372036854775808, expected a whole number of at most 4294967295 in size",
        ),
    ],
)
def test_a_number_of_a_source_has_bounds_too(entry, problem):
    words = [*TINY, f"data.train=[{{source: arithmetic, {entry}}}]"]
    with pytest.raises(ApportionError) as refused:
        make_plan(to_config(compose_config(words))[0])
    assert str(refused.value).endswith(f"arithmetic: {problem}")


CLUSTER = "cluster.address: got an address {}, expected HOST:PORT, ray://HOST:PORT or auto, or null for a Ray of the run's own"


@pytest.mark.parametrize("stage", [None, "dpo"])
@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("h:99999", "whose port is no number from 1 to 65535"),
        ("ray://a..b:10001", "whose host has an empty part between its dots"),
        ("'h h:1'", "with a space, a control character or half a character"),
        ("''", "without a host"),
    ],
)
def test_what_is_no_address_of_a_cluster_is_refused(stage, address, problem):
    base = TINY if stage is None else ["model.path=builtin:tiny", "data.train=pairs.jsonl"]
    with pytest.raises(ConfigError) as refused:
        to_config(
            compose_config(
                [*base, f'cluster.address="{address}"' if "'" not in address else f"cluster.address={address}"],
                stage=stage,
            )
        )
    assert str(refused.value) == CLUSTER.format(problem)


@pytest.mark.parametrize(
    "address", ["auto", "local", "ray://head:10001", "10.0.0.1:6379", "[::1]:6379", "head", "k8s://x y"]
)
def test_addresses_that_ray_knows_are_left_to_ray(address):
    assert to_config(compose_config([*TINY, f'cluster.address="{address}"']))[0].cluster.address == address


def test_a_dropout_that_drops_everything_is_refused():
    with pytest.raises(ConfigError, match=r"^policy.lora.dropout: got 1.0, expected 0 to below 1 \("):
        to_config(compose_config([*TINY, "lora=default", "policy.lora.dropout=1"]))


def test_more_trajectories_than_any_step_has_are_refused():
    words = [*TINY, "train.prompts_per_step=100000", "rollout.responses_per_prompt=1000"]
    with pytest.raises(ConfigError, match="100,000,000 trajectories a step, expected at most 10,000,000; lower one"):
        make_plan(to_config(compose_config(words))[0])


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("weight: 1e300", "got weight 1e+300, expected a number (0, or 1e-30 to 1e30 in size)"),
        (
            "timeout_seconds: 1e300",
            "got timeout_seconds 1e+300, expected above 0 (a number of seconds, 0.001 to 1e+08)",
        ),
        ("retries: 100000", "got retries 100000, expected at least 0 (a whole number) and at most 1000"),
    ],
)
def test_a_number_of_a_reward_component_has_bounds_too(entry, problem):
    words = [*TINY, f"reward.functions=[{{function: numeric_match, {entry}}}]"]
    with pytest.raises(ConfigError) as refused:
        make_plan(to_config(compose_config(words))[0])
    assert str(refused.value) == f"reward.functions numeric_match: {problem}"


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (["policy.learning_rate=0"], "policy.learning_rate is 0: the weights of the policy do not change"),
        (
            ["algorithm=ppo", "critic.learning_rate=0"],
            "critic.learning_rate is 0: the weights of the critic do not change",
        ),
        (["reward.clip=0"], "reward.clip is 0: every reward is 0"),
    ],
)
def test_what_is_allowed_and_not_wanted_is_a_note_of_the_plan(words, note):
    plan = make_plan(to_config(compose_config([*TINY, *words]))[0])
    assert note in plan.notes and f"  - {note}" in plan.render()


def test_a_stage_whose_warm_up_outlasts_it_is_refused():
    words = ["model.path=builtin:tiny", "data.train=pairs.jsonl", "data.max_tokens=600", "policy.warmup_steps=5"]
    check(to_config(compose_config([*words, "train.steps=5"], stage="sft"))[0])
    with pytest.raises(
        ConfigError, match=r"^policy.warmup_steps: got 5 for the run's 4 optimizer steps, expected at most 4"
    ):
        check(to_config(compose_config([*words, "train.steps=4"], stage="sft"))[0])


def test_a_stage_says_so_too_and_a_sound_run_has_no_such_note():
    stage = ["model.path=builtin:tiny", "data.train=pairs.jsonl", "policy.learning_rate=0"]
    config, _ = to_config(compose_config(stage, stage="sft"))
    assert unwanted(config) == ["policy.learning_rate is 0: the weights of the policy do not change"]
    assert unwanted(to_config(compose_config(TINY))[0], frozenset({"values"})) == []


@pytest.mark.parametrize("url", ["http://h:99999/v1", "http://a..b/v1", "ftp://h/v1", "[]", "[5]", "{a: b}"])
def test_an_address_of_a_judge_that_nothing_asks_is_checked_too(url, capsys):
    assert main(["plan", "experiment=tiny_grpo", f"judge.url={url}"]) == 2
    assert capsys.readouterr().err.startswith("error: judge.url: got ")
