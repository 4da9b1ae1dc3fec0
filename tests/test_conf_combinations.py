"""Parts of an algorithm that are each sound and together teach nothing are refused before anything starts."""

from functools import cache

import pytest
from omegaconf import OmegaConf

from apportion.cli import compose_config, to_config
from apportion.conf.combinations import check_combinations
from apportion.conf.parts import (
    drops_lone_responses,
    group_relative,
    kl_level,
    pooled_unit,
    units_of_one_advantage,
)
from apportion.platform.errors import ConfigError


@cache
def composition(algorithm):
    return compose_config(["experiment=quickstart", algorithm])


def check(algorithm, *overrides):
    config = to_config(OmegaConf.merge(composition(f"algorithm={algorithm}"), OmegaConf.from_dotlist([*overrides])))[0]
    check_combinations(config, frozenset(), None, None, 0)


def refusal(algorithm, *overrides):
    with pytest.raises(ConfigError) as error:
        check(algorithm, *overrides)
    return str(error.value)


SEQUENCE, TURN, MACRO = (f"algorithm.surrogate.ratio={ratio}" for ratio in ("sequence", "turn", "macro"))
DIFFER = "whose advantages differ within a response"
NO_MACRO = "which gives no macro actions with one advantage each"


@pytest.mark.parametrize(
    ("algorithm", "override", "line"),
    [
        ("thr", SEQUENCE, f"ratio: got sequence with credit hidden_reward, {DIFFER}, expected ratio=token"),
        ("nthr", SEQUENCE, f"ratio: got sequence with credit hidden_reward, {DIFFER}, expected ratio=token"),
        (
            "thr_gspo",
            "algorithm.surrogate.form=sequence",
            f"form: got sequence with credit hidden_reward, {DIFFER}, expected form=token",
        ),
        ("capo", SEQUENCE, f"ratio: got sequence with credit capo, {DIFFER}, expected ratio=token"),
        ("capo", TURN, "ratio: got turn with credit capo, whose advantages differ within a turn, expected ratio=token"),
        ("poad", TURN, "ratio: got turn with credit poad, whose advantages differ within a turn, expected ratio=token"),
        ("action_ppo", SEQUENCE, f"ratio: got sequence with credit poad, {DIFFER}, expected ratio=token"),
        ("ma_rlhf", SEQUENCE, f"ratio: got sequence with credit macro_actions, {DIFFER}, expected ratio=token"),
        ("grpo", MACRO, f"ratio: got macro with credit grpo, {NO_MACRO}, expected ratio=token"),
        ("thr", MACRO, f"ratio: got macro with credit hidden_reward, {NO_MACRO}, expected ratio=token"),
        ("poad", MACRO, f"ratio: got macro with credit poad, {NO_MACRO}, expected ratio=token"),
    ],
)
def test_a_ratio_over_more_than_one_advantage_is_refused_in_one_line(algorithm, override, line):
    assert refusal(algorithm, override) == f"algorithm.surrogate.{line}"


@pytest.mark.parametrize(
    ("algorithm", "overrides"),
    [
        ("rloo", []),
        ("grpo", [SEQUENCE]),
        ("grpo", [TURN]),
        ("gspo", ["algorithm.surrogate.form=sequence"]),
        ("thr_gspo", []),
        ("ma_rlhf", [MACRO]),
        ("ma_rlhf_one_action", []),
        ("ma_rlhf_one_action", [TURN]),
        ("action_ppo", []),
        ("action_ppo", [MACRO]),
        ("aligndistil", []),
        ("cispo", []),
    ],
)
def test_a_ratio_over_what_has_one_advantage_is_not(algorithm, overrides):
    check(algorithm, *overrides)


@pytest.mark.parametrize(
    ("credit", "units"),
    [
        ({"name": "macro_actions", "estimator": {"name": "rloo"}}, {"macro", "response"}),
        ({"name": "macro_actions", "estimator": {"name": "capo"}}, {"macro"}),
        ({"name": "macro_actions", "termination": {"name": "one"}}, {"macro", "turn"}),
        ({"name": "macro_actions", "termination": "one", "estimator": {"name": "capo"}}, {"macro"}),
        ({"name": "macro_actions", "termination": "one", "last_token_alone": True}, {"macro"}),
        ({"name": "hidden_reward", "base": {"name": "macro_actions", "n_gram": 2}}, set()),
        ({"name": "hidden_reward"}, set()),
        ({"name": "reinforce_pp"}, set()),
        ({"name": "reinforce_pp", "baseline": "group"}, {"response"}),
        ({"name": "gae"}, set()),
    ],
)
def test_wrapped_credit_has_one_advantage_where_its_parts_leave_it(credit, units):
    assert units_of_one_advantage(credit) == units


def test_a_method_of_ones_own_that_does_not_say_is_left_alone_and_one_that_does_is_held_to_it(tmp_path, monkeypatch):
    body = "from dataclasses import dataclass\n\n@dataclass\nclass {}:\n    needs = frozenset()\n    {}\n"
    (tmp_path / "one_of_mine.py").write_text(body.format("Silent", "") + body.format("Says", "one_advantage_per = {}"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert units_of_one_advantage({"name": "one_of_mine:Silent"}) is None
    check("rloo", "algorithm.credit.name=one_of_mine:Silent")
    line = f"algorithm.surrogate.ratio: got sequence with credit one_of_mine:Says, {DIFFER}, expected ratio=token"
    assert refusal("rloo", "algorithm.credit.name=one_of_mine:Says") == line


def test_the_token_form_pools_nothing_that_is_differentiated():
    assert pooled_unit({"name": "gspo"}) is None
    assert pooled_unit({"name": "gspo", "form": "sequence"}) == ("response", {"form": "sequence"})
    assert pooled_unit({"name": "ppo_clip", "ratio": "turn"}) == ("turn", {"ratio": "turn"})
    assert pooled_unit({"name": "reinforce"}) is None


PPO = {ratio: {"name": "ppo_clip", "ratio": ratio} for ratio in ("token", "turn", "macro", "sequence")}
ON_MACRO_ACTIONS = {"name": "macro_actions", "estimator": {"name": "rloo"}}


@pytest.mark.parametrize(
    ("credit", "surrogate", "level"),
    [
        ({"name": "rloo"}, PPO["token"], "token"),
        ({"name": "rloo"}, PPO["sequence"], "response"),
        ({"name": "rloo"}, PPO["turn"], "response"),
        ({"name": "rloo"}, {"name": "gspo"}, "token"),
        ({"name": "rloo"}, {"name": "gspo", "form": "sequence"}, "response"),
        ({"name": "rloo"}, {"name": "reinforce"}, "token"),
        ({"name": "none"}, None, "token"),  # a distillation
        ({"name": "poad", "level": "action"}, PPO["turn"], "token"),  # sums over turns by itself
        ({"name": "macro_actions", "termination": "one"}, PPO["turn"], "token"),
        (ON_MACRO_ACTIONS, PPO["macro"], "token"),
        (ON_MACRO_ACTIONS, PPO["sequence"], "response"),
        (ON_MACRO_ACTIONS, PPO["turn"], "response"),
    ],
)
def test_a_kl_in_the_reward_is_of_the_response_where_one_ratio_covers_more_than_credit_sums_over(
    credit, surrogate, level
):
    assert kl_level(credit, surrogate) == level


def test_the_kl_of_credit_that_does_not_say_is_of_the_response_under_a_sequence_ratio(tmp_path, monkeypatch):
    text = "from dataclasses import dataclass\n\n@dataclass\nclass Silent:\n    needs = frozenset()\n"
    (tmp_path / "one_that_is_silent.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert kl_level({"name": "one_that_is_silent:Silent"}, PPO["sequence"]) == "response"
    assert kl_level({"name": "one_that_is_silent:Silent"}, PPO["token"]) == "token"


@pytest.mark.parametrize("base", ["grpo", "gae", "rloo", "capo", "poad"])
def test_hidden_reward_over_any_base_compares_the_responses_to_a_prompt(base):
    config = to_config(composition("algorithm=thr"))[0]
    config.algorithm.credit = {"name": "hidden_reward", "base": {"name": base}}
    assert group_relative(config.algorithm)
    config.algorithm.credit = {"name": "macro_actions", "termination": {"name": "one"}, "estimator": {"name": base}}
    assert group_relative(config.algorithm) == (base in ("grpo", "rloo", "capo"))


@pytest.mark.parametrize("algorithm", ["thr", "thr_gspo", "nthr", "capo"])
def test_a_group_of_one_is_refused_for_methods_that_learn_from_the_others(algorithm):
    line = refusal(algorithm, "rollout.responses_per_prompt=1")
    assert line.startswith("rollout.responses_per_prompt: got 1 with credit ")
    assert line.endswith(
        "which compares the responses to a prompt, expected at least 2 (or algorithm=reinforce_pp or ppo)"
    )


def by(way):
    return f"algorithm.selection=[{{name: dynamic_sampling, by: {way}}}]"


@pytest.mark.parametrize("way", ["auto", "outcome"])
def test_a_selection_that_would_drop_every_group_of_one_is_refused(way):
    assert refusal("reinforce_pp", by(way), "rollout.responses_per_prompt=1") == (
        "rollout.responses_per_prompt: got 1 with selection dynamic_sampling, which keeps responses to a prompt only where "
        "their rewards differ, expected at least 2, or algorithm.selection without it"
    )


def test_a_selection_that_compares_tokens_may_keep_a_group_of_one():
    one = "rollout.responses_per_prompt=1"
    check("reinforce_pp", by("tokens"), one)
    check("reinforce_pp", "algorithm.selection=[{name: drop_truncated}]", one)
    check("reinforce_pp", by("outcome"), "rollout.responses_per_prompt=2")
    assert not drops_lone_responses({"name": "dynamic_sampling"}, judged=True)
    assert drops_lone_responses({"name": "dynamic_sampling", "by": "outcome"}, judged=True)
