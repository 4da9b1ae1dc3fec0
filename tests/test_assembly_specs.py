"""What each actor and the loop are told, whole: every value is another than its default and than its neighbours'."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from apportion.actors.credit import CreditSpec
from apportion.actors.critic import CriticSpec
from apportion.actors.distillation import DistillationSpec
from apportion.actors.engine_settings import EngineSettings
from apportion.actors.engines import Sampling
from apportion.actors.policy import LossSpec, PolicySpec
from apportion.actors.reference import ReferenceSpec
from apportion.algorithms.correction import ImportanceCorrection
from apportion.algorithms.kl import KlCoefficient
from apportion.assembly.loop_settings import evaluation_settings, loop_settings, sync_check
from apportion.assembly.needs import Needs, needs_of
from apportion.assembly.serving import serving_requests
from apportion.assembly.training import critic_requests, policy_requests, reference_requests
from apportion.build import _evaluator, _trainer
from apportion.cli import compose_config, to_config
from apportion.conf.schema import Config, LoraConfig
from apportion.data.prompts import load_tokenizer
from apportion.loop.evaluation import EvaluationSettings
from apportion.loop.state import Actors, LoopSettings, Progress
from apportion.platform.runs import RunFolder

GIVEN = {
    "seed": 17,
    "model": {"dtype": "float16", "attention": "eager", "trust_remote_code": True, "chat_template": None},
    "rollout": {
        "temperature": 0.7, "top_p": 0.95, "top_k": 40, "max_response_tokens": 50, "stop": ["END"],
        "responses_per_prompt": 6,
    },
    "reward": {"max_failed_share": 0.35},
    "judge": {"max_failed_share": 0.45},
    "algorithm": {
        "kl": {
            "place": "loss", "coefficient": 0.04, "estimator": "k2", "straight_through": True, "target": 3.5, "horizon": 70,
        },
        "correction": {
            "method": "mask", "level": "sequence", "cap": 3.0, "floor": 0.25, "normalize": True, "bound": 0.25,
        },
        "entropy_coefficient": 0.1,
        "updates_per_batch": 2,
        "epochs": 3,
    },
    "policy": {
        "learning_rate": 2e-4, "micro_batch_tokens": 333, "logits_chunk_tokens": 44, "share_prompts": True,
        "lora": {"rank": 3, "alpha": 5.0, "dropout": 0.2, "targets": ["q_proj"]},
    },
    "critic": {
        "learning_rate": 3e-4, "micro_batch_tokens": 555, "logits_chunk_tokens": 66, "model": "a-critic",
        "value_clip": 0.15, "warmup_steps_without_policy": 4,
    },
    "reference": {"model": "a-reference", "micro_batch_tokens": 777},
    "cluster": {"threads": 3, "call_timeout_seconds": 99.0},
    "train": {"steps": 5, "prompts_per_step": 9, "max_minutes": 12.5, "sync_check": False, "sync_unproved": ["*.rotary"]},
    "evaluation": {
        "every_steps": 8, "before": False, "after": True, "greedy": False, "samples": 16, "k": [2, 10],
        "temperature": 0.6, "max_response_tokens": 32, "correct_at": 0.55, "show": 11,
    },
    "tracking": {"samples_per_step": 13},
    "checkpoint": {"every_steps": 14, "every_minutes": 7.5, "keep": 5, "final": False},
}  # fmt: skip


@cache
def composition(name: str) -> Any:
    return compose_config(["experiment=tiny_grpo", f"algorithm={name}"])


def configured(name: str = "dapo", /, **changes: Any) -> Config:
    """`changes` of whole sections, on top of what is given above."""
    return to_config(OmegaConf.merge(composition(name), GIVEN, changes))[0]


def spec(requests: list) -> Any:
    [request] = requests
    return request.arguments[0]


LOSS = LossSpec(
    surrogate={"name": "ppo_clip", "clip_low": 0.2, "clip_high": 0.28, "dual_clip": None, "ratio": "token"},
    temperature=0.7,
    kl_in_loss=True,
    kl_estimator="k2",
    entropy_coefficient=0.1,
    correction=ImportanceCorrection("mask", "sequence", 3.0, 0.25, True),
    mismatch_bound=0.25,
    epochs=3,
    kl_straight_through=True,
)
LORA = LoraConfig(3, 5.0, 0.2, ["q_proj"])
RANKS = {
    "policy": {
        "ranks": 1, "zero_stage": 0, "dtype": "float16", "offload_optimizer": False,
        "lora": {"rank": 3, "targets": ["q_proj"]},
    },
    "critic": {"ranks": 1, "zero_stage": 0, "dtype": "float16", "offload_optimizer": False},
}  # fmt: skip
ENGINE = EngineSettings(learning_rate=2e-4, micro_batch_tokens=333, logits_chunk_tokens=44)


def test_a_policy_rank_is_told_its_model_its_loss_and_that_it_takes_thirty_steps(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    told = spec(policy_requests(configured(model={"chat_template": str(template)}), "start"))
    assert told == PolicySpec(
        model="start",
        dtype="float16",
        attention="eager",
        trust_remote_code=True,
        lora=LORA,
        settings=ENGINE,
        loss=LOSS,
        total_optimizer_steps=30,
        share_prompts=True,
        credit=None,
        distillation=None,
        chat_template="{{ messages }}",
    )


def test_a_kl_in_the_reward_is_the_credit_workers_and_not_the_losss():
    kl = {"place": "reward", "estimator": "abs", "straight_through": False}
    config = configured(algorithm={"kl": kl})
    loss = replace(LOSS, kl_in_loss=False, kl_estimator="abs", kl_straight_through=False)
    assert spec(policy_requests(config, "start")).loss == loss
    credit = spec(serving_requests(config, "start")["credit"])
    assert (credit.kl_in_reward, credit.kl_estimator) == (True, "abs")


def test_the_credit_worker_is_told_where_a_kl_in_the_reward_belongs():
    def level(name, **changes):
        config = configured(name, algorithm={"kl": {"place": "reward", "straight_through": False}, **changes})
        return spec(serving_requests(config, "start")["credit"]).kl_level

    assert [level("rloo"), level("ppo"), level("action_ppo")] == ["response", "token", "token"]
    assert level("gspo", surrogate={"form": "sequence"}) == "response"


def test_a_policy_rank_that_distills_has_its_two_teachers_each_in_its_place(tmp_path):
    folders = {name: tmp_path / name for name in ("dpo", "other")}
    for folder in folders.values():
        folder.mkdir()
    config = configured("aligndistil", teachers={name: str(folder) for name, folder in folders.items()})
    told = spec(policy_requests(config, "start"))
    part = {
        "name": "aligndistil", "variant": "aligndistil", "beta0": 0.1, "scale": 30.0, "offset": 1e-3, "temperature": 1.0,
        "extrapolation_cap": None, "weight_cap": None,
    }  # fmt: skip
    dpo, other = str(folders["dpo"]), str(folders["other"])
    assert told.distillation == DistillationSpec(part, dpo, other, "float16", "eager", True)
    assert told.loss == replace(LOSS, surrogate=None)


def test_a_critic_rank_is_told_its_own_model_and_settings_and_the_policys_steps():
    own = EngineSettings(learning_rate=3e-4, micro_batch_tokens=555, logits_chunk_tokens=66)
    right = CriticSpec("a-critic", "float16", "eager", True, own, 0.15, 3, 30, True)
    assert spec(critic_requests(configured(), "start")) == right
    config = configured(critic={"model": None})
    assert spec(critic_requests(config, "start")) == replace(right, model="start")
    config = configured(policy={"share_prompts": False})
    assert spec(critic_requests(config, "start")) == replace(right, share_prompts=False)


def test_a_reference_rank_is_told_its_own_model_and_the_sampling_temperature():
    right = ReferenceSpec("a-reference", "float16", "eager", True, 777, 44, 0.7, 3, True)
    assert spec(reference_requests(configured(), "start")) == right
    assert spec(reference_requests(configured(reference={"model": None}), "start")) == replace(right, model="start")
    config = configured(policy={"share_prompts": False})
    assert spec(reference_requests(config, "start")) == replace(right, share_prompts=False)


def test_the_credit_worker_is_told_the_algorithms_credit_reduction_shaping_and_selection():
    config = configured(environment={"cls": "microwave"})
    assert spec(serving_requests(config, "start", needs_of(config))["credit"]) == CreditSpec(
        credit={"name": "grpo", "normalize": "std", "eps": 1e-6},
        reduction={"name": "token_mean"},
        shaping=[{"name": "overlong", "max_length": 50, "buffer": 10, "penalty": 1.0}],
        selection=[{"name": "dynamic_sampling", "by": "auto"}],
        kl_in_reward=False,
        kl_estimator="k2",
        tokenizer="start",
        keep_groups_together=False,
        trust_remote_code=True,
        continues=True,
    )


def test_where_gradients_of_a_group_meet_ranks_know_the_credit_and_groups_stay_together():
    config = configured("thr")
    told = spec(serving_requests(config, "start", needs_of(config))["credit"])
    assert told.keep_groups_together and not told.continues
    assert told.credit["name"] == "hidden_reward" and spec(policy_requests(config, "start")).credit == told.credit


def loop(**changes: Any) -> LoopSettings:
    settings = LoopSettings(
        steps=5,
        prompts_per_step=9,
        responses_per_prompt=6,
        sampling=Sampling(0.7, 0.95, 40, 50, ["END"], None),
        minibatches=2,
        policy_signals=True,
        selects=True,
        max_failed_share=0.35,
        sync_check=False,
        sync_unproved=["*.rotary"],
        call_timeout_seconds=99.0,
        critic_only_steps=4,
        samples_shown=13,
        max_minutes=12.5,
        checkpoint_every=14,
        checkpoint_minutes=7.5,
        checkpoint_final=False,
        seeds={"run": 17},
        ranks=RANKS,
        max_failed_critiques=0.45,
        parts=1,
    )
    return replace(settings, **changes)


NEEDS = Needs(policy_signals=True, reference=False, critic=True, groups_together=False)


def test_the_loop_is_set_as_the_configuration_says():
    assert loop_settings(configured(), NEEDS) == loop()
    alone = {"policy": RANKS["policy"]}
    assert loop_settings(configured(), replace(NEEDS, critic=False)) == loop(critic_only_steps=0, ranks=alone)
    assert loop_settings(configured(), replace(NEEDS, policy_signals=False)) == loop(policy_signals=False)
    assert loop_settings(configured(algorithm={"selection": []}), NEEDS) == loop(selects=False)
    assert loop_settings(configured(train={"sync_check": True}), NEEDS) == loop(sync_check=True)
    judged = replace(NEEDS, judge=True)
    for changes, parts in (  # 9 prompts with 6 responses
        ({"rollout": {"max_sequences": 54}, "cluster": {"rollout_engines": 1}}, 1),
        ({"rollout": {"max_sequences": 14}, "cluster": {"rollout_engines": 1}}, 1),
        ({"rollout": {"max_sequences": 13}, "cluster": {"rollout_engines": 1}}, 2),
        ({"rollout": {"max_sequences": 3}, "cluster": {"rollout_engines": 2}}, 5),
        ({"rollout": {"max_sequences": 8}, "judge": {"parts": 3}}, 3),
    ):
        config = configured(**changes)
        assert loop_settings(config, judged) == loop(parts=parts)
        assert loop_settings(config, NEEDS) == loop(parts=1)
    given = configured(rollout={"response_column": "chosen"})
    assert loop_settings(given, NEEDS).sampling == Sampling(0.7, 0.95, 40, 50, ["END"], "chosen")


def test_a_sync_check_scores_what_engine_and_ranks_have_room_for(tiny):
    def made(**changes: Any) -> Any:
        tokenizer = load_tokenizer(tiny)
        train = {"sync_check": True, "max_sync_gap": 0.4}
        return sync_check(configured(**({"train": train} | changes)), actors, tokenizer, tiny, warned.append)

    actors, warned = Actors([], [], None, []), []
    check = made()
    assert (check.actors, check.max_gap, check.call_timeout_seconds) == (actors, 0.4, 99.0)
    assert len(check.token_ids) == 64 and check.token_ids.max() < 264
    unset = {"sync_check": True, "max_sync_gap": None}
    for changes in ({}, {"model": {"dtype": "bfloat16"}}, {"model": {"dtype": "bfloat16"}, "policy": {"lora": None}}):
        assert made(train=unset, **changes)._bound(Progress(sync_baseline=0.0))[0] == 0.02  # with adapters too
    short = {
        "data": {"max_prompt_tokens": 3},
        "rollout": {"max_response_tokens": 4},
        "evaluation": {"max_response_tokens": None},
    }
    assert made(**short).token_ids.tolist() == check.token_ids[:6].tolist()  # one token is sampled behind them
    assert len(made(policy={"micro_batch_tokens": 16}).token_ids) == 16
    assert made(train={"sync_check": False}).is_off and warned == []
    short["data"]["max_prompt_tokens"] = short["rollout"]["max_response_tokens"] = 1
    assert made(**short).is_off
    assert len(warned) == 1 and warned[0].startswith("train.sync_check: sequences of at most 2 tokens leave no room")


EVALUATION = EvaluationSettings(
    every_steps=8,
    before=False,
    after=True,
    greedy=False,
    samples=16,
    ks=[2, 10],
    temperature=0.6,
    max_tokens=32,
    correct_at=0.55,
    show=11,
    max_failed_share=0.35,
)


def test_an_evaluation_is_set_as_the_configuration_says_and_has_rollouts_tokens_where_it_names_none():
    assert evaluation_settings(configured()) == EVALUATION
    config = configured(evaluation={"max_response_tokens": None})
    assert evaluation_settings(config) == replace(EVALUATION, max_tokens=50)


@pytest.mark.parametrize("name", ["before", "after", "greedy"])
def test_each_switch_of_an_evaluation_is_its_own(name):
    one = dict.fromkeys(["before", "after", "greedy"], False) | {name: True}
    assert evaluation_settings(configured(evaluation=one)) == replace(EVALUATION, **one)


def test_a_trainer_has_the_runs_coefficient_checkpoints_and_evaluator(tmp_path):
    config, actors = configured(), Actors([], [], None, [])
    prompts, tracker = object(), SimpleNamespace(warn=print)
    trainer = _trainer(config, NEEDS, actors, prompts, tracker, RunFolder(tmp_path))
    assert trainer.settings == loop() and trainer.kl == KlCoefficient(0.04, target=3.5, horizon=70)
    assert (trainer.store.root, trainer.store.keep) == (tmp_path / "checkpoints", 5)
    assert (trainer.actors, trainer.prompts, trainer.tracker) == (actors, prompts, tracker)
    evaluator = _evaluator(config, actors, ["held out"], print)
    assert evaluator.settings == EVALUATION and (evaluator.actors, evaluator.prompts) == (actors, ["held out"])
    assert (evaluator.stop, evaluator.call_timeout_seconds, evaluator.warn) == (["END"], 99.0, print)
