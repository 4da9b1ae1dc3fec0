"""The recipes: every one composes, is valid, and builds; choosing another algorithm leaves nothing of the former."""

from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import yaml

from apportion.algorithms import registry
from apportion.algorithms.correction import ImportanceCorrection
from apportion.assembly.training import policy_requests
from apportion.cli import compose_config, to_config
from apportion.conf import schema
from apportion.conf.explain import config_keys
from apportion.conf.models import read_model
from apportion.conf.parts import check_parts, group_relative, parts_of
from apportion.plan import make_plan
from apportion.platform.errors import ConfigError

CONF = Path(schema.__file__).parent
ALGORITHMS = sorted(file.stem for file in (CONF / "algorithm").glob("*.yaml"))
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
BASELINES = ["cispo", "dapo", "dr_grpo", "gspo", "grpo", "ppo", "reinforce_pp", "reinforce_pp_baseline", "rloo"]


@cache
def composition(*overrides):
    return compose_config(list(overrides))


def composed(*overrides):
    return to_config(composition(*overrides))[0]


def test_every_baseline_has_a_recipe():
    assert set(BASELINES) <= set(ALGORITHMS)
    assert {"quickstart", "tiny_grpo", "tiny_ppo", "dapo_arithmetic", "gsm8k"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_part_of_an_algorithm_builds(name):
    algorithm = composed("experiment=quickstart", f"algorithm={name}").algorithm
    assert algorithm.name == name
    for kind, spec in parts_of(algorithm):
        part = registry.build(kind, spec)
        given = {key: value for key, value in spec.items() if key != "name"}
        assert {key: getattr(part, key) for key in given} == given


@pytest.mark.parametrize("name", BASELINES)
def test_a_recipe_lists_every_parameter_so_that_each_can_be_overridden(name):
    algorithm = composed("experiment=quickstart", f"algorithm={name}").algorithm
    for kind, spec in parts_of(algorithm):
        part = registry.build(kind, spec)
        assert set(spec) - {"name"} == {field.name for field in fields(part)}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_called_by_its_own_name_and_is_whole(name):
    config = composed(f"experiment={name}")
    assert config.recipe == name
    assert config.model.path and config.data.train and (config.reward.functions or config.environment.cls)


@pytest.mark.parametrize(
    ("experiment", "algorithm"),
    [*((name, "rloo") for name in EXPERIMENTS), ("dapo_arithmetic", "ppo"), ("tiny_ppo", "dr_grpo")],
)
def test_another_algorithm_replaces_every_part_of_the_former(experiment, algorithm):
    config = composed(f"experiment={experiment}", f"algorithm={algorithm}").algorithm
    recipe = yaml.safe_load((CONF / "algorithm" / f"{algorithm}.yaml").read_text())
    assert config.name == algorithm
    assert config.credit == recipe["credit"]
    assert config.surrogate == recipe["surrogate"]
    assert set(config.reduction) == set(recipe["reduction"])
    assert config.shaping == [] and config.selection == []


def test_references_between_values_are_resolved():
    config = composed("experiment=quickstart", "algorithm=dapo", "rollout.max_response_tokens=100")
    assert config.algorithm.shaping == [{"name": "overlong", "max_length": 100, "buffer": 20, "penalty": 1.0}]
    constant = composed("experiment=quickstart", "algorithm=dr_grpo").algorithm.reduction
    assert constant == {"name": "constant", "length": 24}


def test_the_quickstart_is_what_it_promises():
    config = composed("experiment=quickstart")
    assert config.model.path == "builtin:smollm2-135m-instruct" and config.model.dtype == "bfloat16"
    assert (config.train.steps, config.train.prompts_per_step, config.rollout.responses_per_prompt) == (40, 8, 8)
    assert (config.rollout.max_response_tokens, config.rollout.temperature, config.policy.learning_rate) == (
        24,
        1.0,
        1e-5,
    )
    assert (config.data.eval_limit, config.evaluation.greedy, config.tracking.plots) == (128, True, True)


def test_a_list_of_sources_is_replaced_not_merged():
    assert composed("experiment=quickstart", "data.train=my.jsonl").data.train == "my.jsonl"


def test_a_mapping_replaces_the_whole_part_and_its_key_one_value_of_it():
    thr = "algorithm.credit={name: hidden_reward, base: {name: rloo}, p: 0.5}"
    replaced = composed("experiment=tiny_grpo", thr).algorithm
    assert replaced.credit == {"name": "hidden_reward", "base": {"name": "rloo"}, "p": 0.5}
    inner = composed("experiment=tiny_grpo", thr, "algorithm.credit.base={name: grpo}", "algorithm.credit.p=0.25")
    assert inner.algorithm.credit == {"name": "hidden_reward", "base": {"name": "grpo"}, "p": 0.25}
    one = composed("experiment=tiny_grpo", "algorithm.credit.eps=1e-3").algorithm.credit
    assert one == {"name": "grpo", "normalize": "std", "eps": 1e-3}
    assert composed("experiment=tiny_grpo", "+algorithm.credit={eps: 1e-3}").algorithm.credit == one
    assert composed("experiment=tiny_grpo", "data.chat_template_kwargs={a: 1}").data.chat_template_kwargs == {"a": 1}
    kl = composed("experiment=tiny_grpo", "algorithm.kl={place: loss, coefficient: 0.1}").algorithm.kl
    assert kl == schema.KlConfig(place="loss", coefficient=0.1)


def test_a_mapping_may_take_the_place_of_null():
    distilled = ("experiment=tiny_grpo", "algorithm=aligndistil", "algorithm.distillation=null")
    back = composed(*distilled, "algorithm.surrogate={name: ppo_clip}").algorithm
    assert (back.surrogate, back.distillation) == ({"name": "ppo_clip"}, None)
    added = composed(*distilled, "+algorithm.surrogate={name: ppo_clip}").algorithm
    assert added.surrogate == {"name": "ppo_clip"}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "algorithm.surrogate={name: ppo_clip}",
            "algorithm.surrogate: got one beside algorithm.distillation, expected null",
        ),
        (
            "algorithm.surrogate.name=ppo_clip",
            "algorithm.surrogate.name: got a value of algorithm.surrogate, which is null, expected "
            "algorithm.surrogate={name: ...}",
        ),
        ("algorithm.surrogat={name: ppo_clip}", "algorithm.surrogat: got an unknown key, expected a key of algorithm"),
    ],
)
def test_a_mapping_where_it_has_no_place_is_one_line(override, line):
    with pytest.raises(ConfigError) as error:
        composed("experiment=tiny_grpo", "algorithm=aligndistil", override)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_one_value_of_lora_switches_it_on_with_the_others_as_they_are():
    assert composed("experiment=quickstart").policy.lora is None
    lora = composed("experiment=quickstart", "policy.lora.rank=4").policy.lora
    assert lora == schema.LoraConfig(rank=4)
    assert composed("experiment=quickstart", "policy.lora={alpha: 8}").policy.lora == schema.LoraConfig(alpha=8.0)


def test_signals_follow_from_credit_and_kl():
    needs = {name: check_parts(composed("experiment=quickstart", f"algorithm={name}").algorithm) for name in BASELINES}
    assert needs["grpo"] == frozenset()
    assert needs["ppo"] == {"values", "reference_logprobs"}
    assert needs["reinforce_pp_baseline"] == {"reference_logprobs"}
    for name in BASELINES:
        algorithm = composed("experiment=quickstart", f"algorithm={name}").algorithm
        declared = registry.build("credit", algorithm.credit).needs
        assert needs[name] - {"reference_logprobs"} == set(declared) - {"reference_logprobs"}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "algorithm.credit.normalize=sdt",
            "algorithm.credit grpo: normalize: got 'sdt', expected std, population or none",
        ),
        ("algorithm.credit.eps=small", "algorithm.credit grpo: got eps='small' (str), expected float"),
        (
            "algorithm.reduction.name=token_maen",
            "algorithm.reduction: got 'token_maen', expected one of token_mean, sequence_mean, sequence_sum, constant, "
            "or a dotted path of your own (did you mean 'token_mean'?)",
        ),
        (
            "algorithm.shaping=[overlong]",
            "algorithm.shaping: got 'overlong', expected a mapping with a name and its parameters",
        ),
    ],
)
def test_a_part_that_cannot_be_built_is_one_line(override, line):
    with pytest.raises(ConfigError) as error:
        make_plan(composed("experiment=quickstart", override))
    assert str(error.value) == line


def test_credit_of_ones_own_is_asked_for_its_needs_and_whether_it_compares(tmp_path, monkeypatch):
    (tmp_path / "mine_of_my_own.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass\nclass Mine:\n    scale: float = 1.0\n"
        "    needs = frozenset({'values', 'entropies'})\n    group_relative_with = {'scale': 2.0}\n"
        "    def __call__(self, batch): return None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = composed("experiment=quickstart")
    config.algorithm.credit = {"name": "mine_of_my_own:Mine", "scale": 2.0}
    assert check_parts(config.algorithm) == {"values", "entropies"}
    assert group_relative(config.algorithm)
    config.algorithm.credit = {"name": "macro_actions", "estimator": {"name": "mine_of_my_own:Mine", "scale": 1.0}}
    assert check_parts(config.algorithm) == {"values", "entropies"}
    assert not group_relative(config.algorithm)


def test_every_key_says_what_it_takes():
    keys = config_keys()
    assert keys["train.steps"] == "an integer"
    assert keys["policy.learning_rate"] == "a number"
    assert keys["cluster.address"] == "text or null"
    assert keys["evaluation.k"] == "a list of integers [1,2]"
    assert keys["policy.lora.rank"] == "an integer"
    assert "policy.section" not in keys


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: schema.PolicyConfig(zero_stage=5), "policy.zero_stage: got 5, expected 0, 1, 2 or 3"),
        (lambda: schema.CriticConfig(learning_rate=-1), "critic.learning_rate: got -1, expected at least 0"),
        (lambda: schema.RolloutConfig(top_p=1.5), "rollout.top_p: got 1.5, expected 1e-06 to 1.0"),
        (
            lambda: schema.RolloutConfig(engine="vlm"),
            "rollout.engine: got 'vlm', expected one of vllm, transformers (did you mean 'vllm'?)",
        ),
        (
            lambda: schema.RolloutConfig(temperature=0),
            "rollout.temperature: got 0, expected above 0 (greedy has no policy gradient)",
        ),
        (lambda: schema.EvaluationConfig(samples=4, k=[8]), "evaluation.k: got 8, expected 1 to evaluation.samples=4"),
        (
            lambda: schema.KlConfig(target=0.1),
            "algorithm.kl.target: got a value with place=none, expected place=reward or place=loss",
        ),
        (
            lambda: schema.CorrectionConfig(level="geometric"),
            "algorithm.correction.level: got geometric with method=truncate, which has no response to mask, expected "
            "method=mask, or level=token or sequence",
        ),
        (
            lambda: schema.CorrectionConfig(floor=2.0),
            "algorithm.correction.floor: got 2.0, expected 0 to 1, or null",
        ),
        (
            lambda: schema.CorrectionConfig(method="none", floor=0.5),
            "algorithm.correction.floor: got 0.5 with method=none, which corrects nothing, expected method=truncate or "
            "method=mask",
        ),
        (
            lambda: schema.CorrectionConfig(method="none", normalize=True),
            "algorithm.correction.normalize: got True with method=none, which corrects nothing, expected method=truncate "
            "or method=mask",
        ),
        (
            lambda: schema.KlConfig(place="reward", straight_through=True),
            "algorithm.kl.straight_through: got true with place=reward, which has no gradient, expected place=loss",
        ),
    ],
)
def test_a_value_out_of_range_says_where_what_and_what_is_right(make, line):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["method=truncate", "cap=5", "floor=0.5"], ("truncate", "token", 5.0, 0.5, False)),  # OpenRLHF's tis
        (["method=mask", "level=geometric", "cap=5", "floor=0.5"], ("mask", "geometric", 5.0, 0.5, False)),
        (["method=mask", "level=sequence", "cap=3", "floor=0"], ("mask", "sequence", 3.0, 0.0, False)),  # TRL's
        (["level=sequence", "normalize=true"], ("truncate", "sequence", 2.0, None, True)),  # verl's
    ],
)
def test_the_corrections_of_released_code_can_be_had_from_the_command_line(words, settings):
    overrides = [f"algorithm.correction.{word}" for word in words]
    config, _ = to_config(compose_config(["experiment=tiny_grpo", *overrides]))
    assert policy_requests(config, "start")[0].arguments[0].loss.correction == ImportanceCorrection(*settings)


def test_sizes_of_the_builtin_models_are_known_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setenv("APPORTION_CACHE", str(tmp_path))
    smollm = read_model("builtin:smollm2-135m-instruct")
    assert (smollm.parameters, smollm.context) == (134_515_008, 8192)
    assert smollm.kv_bytes_per_token(2) == 2 * 30 * 3 * 64 * 2
    assert read_model("builtin:tiny").context == 2048
    with pytest.raises(ConfigError) as error:
        read_model("builtin:tinny")
    assert str(error.value) == (
        "model.path: got 'builtin:tinny', expected one of builtin:smollm2-135m-instruct, builtin:tiny, "
        "builtin:apprentice (did you mean 'builtin:tiny'?)"
    )


def test_a_folder_of_weights_is_measured_by_its_headers(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 10, "num_attention_heads": 2, '
        '"intermediate_size": 16, "max_position_embeddings": 64}'
    )
    facts = read_model(str(tmp_path))
    assert (facts.parameters, facts.context, facts.key_value_heads, facts.head_dim) == (22, 64, 2, 4)
    assert facts.lora_parameters(2, ["q_proj", "down_proj"]) == 2 * (2 * (8 + 8) + 2 * (16 + 8))


def test_weights_that_were_left_behind_by_git_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    for text in ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n", ""):
        (tmp_path / "model.safetensors").write_text(text)
        with pytest.raises(ConfigError, match=r"model.safetensors, which is no safetensors file .* fetch them"):
            read_model(str(tmp_path))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"a folder without config\.json, expected a Hugging Face model's folder"):
        read_model(str(tmp_path))
    with pytest.raises(ConfigError, match=r"which does not exist, expected a folder, a hub name or builtin:NAME"):
        read_model("./nowhere")
    assert read_model("nobody/nothing-of-that-name") is None


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("policy.learning_rate=nan", "policy.learning_rate: got nan, expected a finite number"),
        ("policy.max_grad_norm=inf", "policy.max_grad_norm: got inf, expected a finite number"),
        ("rollout.temperature=nan", "rollout.temperature: got nan, expected a finite number"),
        ("reward.clip=inf", "reward.clip: got inf, expected a finite number"),
        ("judge.timeout_seconds=nan", "judge.timeout_seconds: got nan, expected a finite number"),
        ("train.max_minutes=inf", "train.max_minutes: got inf, expected a finite number"),
        ("algorithm.credit.eps=nan", "algorithm.credit.eps: got nan, expected a finite number"),
        ("algorithm.shaping=[{name: mine, low: nan}]", "algorithm.shaping.0.low: got nan, expected a finite number"),
    ],
)
def test_a_number_that_is_none_is_refused_wherever_it_stands(override, line):
    with pytest.raises(ConfigError) as caught:
        to_config(compose_config(["experiment=quickstart", override]))
    assert str(caught.value) == line


def test_a_components_own_infinity_stays():
    config, _ = to_config(compose_config(["experiment=quickstart", "algorithm=thr", "algorithm.credit.beta=-inf"]))
    assert config.algorithm.credit["beta"] == float("-inf")
