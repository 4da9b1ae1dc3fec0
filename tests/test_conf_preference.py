"""The preference stages on the command line: what each stage has, and one exact line for everything that cannot run."""

import sys
import types

import pytest
import yaml

from apportion.algorithms.preference import Dpo, RewardModel, Sft
from apportion.cli import compose_config, main, to_config
from apportion.conf.preference_schema import STAGES, check
from apportion.platform.errors import ConfigError
from apportion.preference_build import objective_of, train

WHOLE = ["model.path=builtin:tiny", "data.train=pairs.jsonl"]


def composed(stage, *words):
    return to_config(compose_config(list(words), stage=stage))[0]


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Stands for apportion.preference_build: keeps what it is given."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("apportion.preference_build")
    module.calls = []
    module.train = lambda config, resolved: module.calls.append((config, resolved)) or 0
    monkeypatch.setitem(sys.modules, "apportion.preference_build", module)
    return module


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_composes_and_is_called_by_its_own_name(stage):
    config = composed(stage, *WHOLE)
    assert (config.stage, config.recipe) == (stage, stage)
    check(config)


def test_each_section_becomes_its_loss():
    given = ["dpo.beta=0.3", "dpo.loss=ipo", "dpo.length_normalized=true", "dpo.reverse=true"]
    assert objective_of(composed("dpo", *WHOLE, *given)) == Dpo(0.3, "ipo", 0.0, True, True)
    assert objective_of(composed("dpo", *WHOLE, "dpo.label_smoothing=0.1")) == Dpo(label_smoothing=0.1)
    assert objective_of(composed("reward_model", *WHOLE, "reward_model.margin=1")) == RewardModel(margin=1.0)
    assert objective_of(composed("sft", *WHOLE)) == Sft()


def test_a_value_of_policy_lora_switches_adapters_on():
    assert composed("dpo", *WHOLE).policy.lora is None
    assert composed("dpo", *WHOLE, "policy.lora.rank=4").policy.lora.rank == 4


LINES = [
    ("dpo", [], "model.path, data.train: got no value, expected one each; give model.path=..."),
    ("dpo", ["dpo.beat=1"], "dpo.beat: got an unknown key, expected a key of dpo (did you mean 'dpo.beta'?)"),
    ("dpo", ["dpo.beta=x"], "dpo.beta: got 'x', expected a number"),
    ("dpo", [*WHOLE, "dpo.beta=0"], "dpo.beta: got 0.0, expected above 0"),
    ("dpo", [*WHOLE, "seed=-1"], "seed: got -1, expected 0 to 4294967295"),
    (
        "dpo",
        [*WHOLE, "cluster.object_store_gib=-1"],
        "cluster.object_store_gib: got -1.0, expected at least 0.075",
    ),
    ("dpo", [*WHOLE, "dpo.loss=hinge"], "dpo.loss: got 'hinge', expected one of sigmoid, ipo"),
    ("dpo", [*WHOLE, "+rollout.top_p=1"], "rollout: got an unknown key, expected a key that exists"),
    (
        "sft",
        [*WHOLE, "sft.beta=1"],
        "sft.beta: got an unknown key, expected a key of sft (did you mean 'sft.reduction'?)",
    ),
    (
        "dpo",
        [*WHOLE, "dpo.loss=ipo", "dpo.label_smoothing=0.1"],
        "dpo.label_smoothing: got 0.1 with dpo.loss=ipo, expected dpo.loss=sigmoid",
    ),
    (
        "sft",
        [*WHOLE, "data.eval=a.jsonl", "data.eval_share=0.1"],
        "data.eval_share: got 0.1 beside data.eval, expected one of the two",
    ),
    (
        "reward_model",
        [*WHOLE, "train.batch_size=none"],
        "train.batch_size: got 'none', expected an integer",
    ),
]


@pytest.mark.parametrize(
    ("stage", "words", "line"), LINES, ids=lambda value: " ".join(value) if isinstance(value, list) else None
)
def test_a_wrong_configuration_says_got_and_expected_in_one_line(stage, words, line):
    with pytest.raises(ConfigError) as error:
        composed(stage, *words)
    assert str(error.value) == line


TOGETHER = [
    (
        "dpo",
        ["data.max_tokens=2048"],
        "policy.micro_batch_tokens: got 2048, expected at least 4096 = 2 x data.max_tokens, both answers of a pair; "
        "raise it or lower data.max_tokens",
    ),
    (
        "sft",
        ["data.max_tokens=512"],
        "data.max_tokens: got 512 with data.max_prompt_tokens=512, expected more, so that there is room for an answer",
    ),
    (
        "sft",
        ["cluster.policy_ranks=4", "train.batch_size=2"],
        "train.batch_size: got 2 with cluster.policy_ranks=4, expected at least one example a rank",
    ),
    (
        "dpo",
        ["evaluation.every_steps=2"],
        "evaluation.every_steps: got 2 without held-out examples, expected data.eval or data.eval_share",
    ),
    (
        "dpo",
        ["data.margin_column=gap"],
        "data.margin_column: got 'gap', expected none: only reward-model reads margins",
    ),
    (
        "sft",
        ["data.max_tokens=4096", "policy.micro_batch_tokens=8192"],
        "data.max_tokens: got 4096, expected at most 2048, the model's context",
    ),
    (
        "dpo",
        ["dpo.reference=./no"],
        "dpo.reference: got './no', which does not exist, expected a folder, a hub name or builtin:NAME",
    ),
    (
        "dpo",
        ["dpo.reference=short"],
        "dpo.reference: got short with a context of 1023 tokens, expected at least data.max_tokens=1024, or shorter "
        "examples",
    ),
    (
        "dpo",
        ["dpo.reference=few"],
        "dpo.reference: got few with 99 tokens, expected at least the 264 of builtin:tiny, with the same tokenizer: it "
        "reads the policy's token ids",
    ),
    (
        "sft",
        ["policy.lora.targets=[q_prj]"],
        "policy.lora.targets: got 'q_prj', expected names of layers of builtin:tiny: down_proj, gate_proj, k_proj, "
        "o_proj, q_proj, up_proj, v_proj (did you mean 'q_proj'?)",
    ),
]


@pytest.mark.parametrize(("stage", "words", "line"), TOGETHER, ids=[line.split(":")[0] for *_, line in TOGETHER])
def test_values_that_cannot_run_together_are_refused_before_anything_starts(
    stage, words, line, build, capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("APPORTION_CACHE", str(tmp_path))  # builtin models as they are described, not as they were made
    for name, sizes in (("short", '{"n_positions": 1023}'), ("few", '{"vocab_size": 99, "n_embd": 8}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(sizes)
    assert main([stage.replace("_", "-"), *WHOLE, *words]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert build.calls == []


def test_a_resumed_run_takes_its_own_values_and_the_command_lines_on_top(build, tmp_path):
    assert main(["dpo", *WHOLE, "dpo.beta=0.3", "train.steps=3"]) == 0
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(build.calls[0][1]))
    assert main(["dpo", "resume=mine", "train.steps=9"]) == 0
    resumed = build.calls[1][0]
    assert (resumed.dpo.beta, resumed.train.steps, resumed.model.path) == (0.3, 9, "builtin:tiny")


def test_one_stages_values_are_unknown_to_another():
    with pytest.raises(ConfigError, match=r"dpo\.beta: got an unknown key"):
        composed("sft", *WHOLE, "dpo.beta=1")


def test_a_run_of_another_command_is_not_taken_up(build, tmp_path, capsys):
    assert main(["dpo", *WHOLE]) == 0
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(build.calls[0][1]))
    for words, wanted in ((["sft", "resume=mine"], "sft"), (["train", "resume=mine"], "train")):
        assert main(words) == 2
        line = f"error: resume: got 'mine', a run of `apportion dpo`, expected one of `apportion {wanted}`\n"
        assert capsys.readouterr().err == line
    assert main(["evaluate", "mine"]) == 2
    assert capsys.readouterr().err.startswith("error: checkpoint: got 'mine', a run of `apportion dpo`")
    assert len(build.calls) == 1


def test_a_reference_with_another_tokenizer_is_refused(tmp_path, tiny):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tiny)
    other.save_pretrained(tmp_path)
    spelled = (tmp_path / "tokenizer.json").read_text()
    word = next(token for token in other.get_vocab() if token.isascii() and token.isalpha() and len(token) == 1)
    (tmp_path / "tokenizer.json").write_text(spelled.replace(f'"{word}":', f'"{word}{word}":', 1))
    (tmp_path / "config.json").write_text('{"vocab_size": 264}')
    config = composed("dpo", *WHOLE, f"dpo.reference={tmp_path}")
    check(config)
    with pytest.raises(ConfigError, match=r"^dpo.reference: .* in 1 of 264 tokens .* it reads the policy's token ids$"):
        train(config, {})
