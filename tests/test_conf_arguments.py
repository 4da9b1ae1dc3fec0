"""Words of the command line, and the values that they mean."""

import pytest
import yaml

from apportion.cli import compose_config, main, to_config
from apportion.conf.arguments import plain, rewritten
from apportion.conf.schema import Config
from apportion.platform.errors import ConfigError
from apportion.platform.runs import make_run_folder
from apportion.saved import read_saved, value_of


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def value(key, *words):
    found = to_config(compose_config(["experiment=tiny_grpo", *words]))[0]
    for name in key.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    return found


MEANT = [
    # Escapes between double quotes, and without quotes where the text is no path.
    (r'rollout.stop=["\n\n"]', ["\n\n"]),
    (r'rollout.stop=["\n", "a\tb", "\\n", "\u00e9"]', ["\n", "a\tb", r"\n", "é"]),
    (r"rollout.stop=[\n\n,</s>]", ["\n\n", "</s>"]),
    (r'reward.step_delimiter="\n"', "\n"),
    (r"reward.step_delimiter=\n\n", "\n\n"),
    ("reward.step_delimiter=\n", "\n"),  # as bash writes $'\n'
    ("reward.step_delimiter= ", " "),
    (r'data.system_prompt="You solve.\nAnswer \"yes\" with a number."', 'You solve.\nAnswer "yes" with a number.'),
    (r'data.system_prompt="Put it in \boxed{}. \frac{1}{2}"', r"Put it in \boxed{}. \frac{1}{2}"),
    (r'data.system_prompt="\theta, \nu and \right) \\tau"', r"\theta, \nu and \right) \tau"),
    (r"data.system_prompt='a\nb'", r"a\nb"),
    ("data.system_prompt=a\nb", "a\nb"),
    (r'reward.functions=[{function: "my_rewards:score", params: {end: "\n"}}]',
     [{"function": "my_rewards:score", "params": {"end": "\n"}}]),
    # Text that looks like something else.
    ("run_name=1e5", "1e5"),
    ("run_name=007", "007"),
    ("run_name=0x10", "0x10"),
    ("run_name=1_000", "1_000"),
    ("run_name=1.0", "1.0"),
    ("run_name=off", "off"),
    ("run_name=yes", "yes"),
    ("run_name=true", "true"),
    ("run_name=2026-11-28", "2026-11-28"),
    ("run_name=12:30", "12:30"),
    ('run_name="1e5"', "1e5"),
    ("run_name=null", None),
    ("run_name='null'", "null"),
    ("run_name=str(5)", "5"),
    ("tracking.wandb_tags=[1e5,007,off, v 2]", ["1e5", "007", "off", "v 2"]),
    ("tracking.wandb_tags=[]", []),
    ("data.system_prompt=Solve it, then answer (yes or no) in [x] = {y}.", "Solve it, then answer (yes or no) in [x] = {y}."),
    ('data.system_prompt="Yes" or "no"?', '"Yes" or "no"?'),
    ("recipe=${model.path}-x", "builtin:tiny-x"),
    # Numbers, words for true and false, and nothing.
    ("train.steps=1e3", 1000),
    ("train.steps=20.0", 20),
    ("seed=007", 7),
    ("policy.learning_rate=1E-6", 1e-6),
    ("policy.learning_rate=.5", 0.5),
    ("train.deterministic=off", False),
    ("train.deterministic=Yes", True),
    ("train.max_minutes=none", None),
    ("train.max_minutes=null", None),
    ("evaluation.k=[]", []),
    # Paths.
    ("model.path=/data/run=3/my model (v2)", "/data/run=3/my model (v2)"),
    ("model.path=/d/{a}/[b]/c,d#e@f:$g'h\"i", "/d/{a}/[b]/c,d#e@f:$g'h\"i"),
    ("model.path=/数据/größe/мир", "/数据/größe/мир"),
    (r"model.path=/a\ b", "/a b"),
    ("model.path=[x]", "[x]"),
    ("data.train=meine Fragen (1).jsonl", "meine Fragen (1).jsonl"),
    ("data.train=[~/a b.jsonl, c=1.jsonl]", ["~/a b.jsonl", "c=1.jsonl"]),
    ("data.train=[{source: ~/a (1).jsonl, weight: 2}]", [{"source": "~/a (1).jsonl", "weight": 2}]),
    ('data.train="data/meine Fragen.jsonl"', "data/meine Fragen.jsonl"),
    ("data.eval=null", None),
    ("reward.functions=my rewards (2).py:score", "my rewards (2).py:score"),
    ("+environment.params.path=/data/x (1)", "/data/x (1)"),
    ("+environment.params.count=3", 3),
]  # fmt: skip


@pytest.mark.parametrize(("word", "meant"), MEANT, ids=[word for word, _ in MEANT])
def test_a_word_means_what_was_typed(word, meant):
    got = value(word.partition("=")[0].lstrip("+"), word)
    assert (got, type(got)) == (meant, type(meant))


REFUSED = [
    ("run_name=none", "run_name: got none, expected null for no value, or the text in quotes: run_name='\"none\"'"),
    (
        "data.train=a.jsonl,b.jsonl",
        "data.train: got 'a.jsonl,b.jsonl', expected one value; write data.train=[a.jsonl,b.jsonl] for a list, sweep with "
        "-m, or quote a name that has a comma: data.train='\"a.jsonl,b.jsonl\"'",
    ),
    (
        "data.chat_template_kwargs={enable_thinking: off}",
        "data.chat_template_kwargs: got off, expected false, or the text in quotes: '\"off\"'",
    ),
    (
        "+environment.params.render=yes",
        "environment.params.render: got yes, expected true, or the text in quotes: '\"yes\"'",
    ),
    ("train.steps=1.5", "train.steps: got 1.5, expected an integer"),
    ("train.steps=1e-3", "train.steps: got 0.001, expected an integer"),
    ("rollout.stop=a", "rollout.stop: got 'a', expected a list [a,b]"),
]


@pytest.mark.parametrize(("word", "line"), REFUSED, ids=[word for word, _ in REFUSED])
def test_an_ambiguous_word_is_refused_in_one_line(word, line):
    with pytest.raises(ConfigError) as error:
        value("seed", word)
    assert str(error.value) == line


def test_a_comma_is_part_of_a_files_name_where_there_is_such_a_file(tmp_path):
    (tmp_path / "a,b.jsonl").write_text("")
    assert value("data.train", "data.train=a,b.jsonl") == "a,b.jsonl"


def test_what_backslashes_could_also_mean_is_said(capsys):
    rewritten([r'data.system_prompt="\theta"', r"rollout.stop=['\n']", r'run_name="\boxed"'], Config)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(r"warning: data.system_prompt: \theta is read as LaTeX, not as an escape")
    assert (
        second == r"warning: rollout.stop: '\n' holds a backslash, not what \n stands for; use double quotes for that"
    )


def test_commas_separate_the_values_of_a_sweep(build):
    words = [
        "experiment=tiny_grpo",
        "-m",
        r'reward.step_delimiter="\n",a b',
        "train.steps=1e1,2e1",
        "rollout.stop=[a],[</s>]",
    ]
    assert main(["train", *words]) == 0
    configs = [config for _, config, _ in build.calls]
    assert len(configs) == 8
    assert {config.reward.step_delimiter for config in configs} == {"\n", "a b"}
    assert {config.train.steps for config in configs} == {10, 20}
    assert {tuple(config.rollout.stop) for config in configs} == {("a",), ("</s>",)}


def test_quotes_that_do_not_close_are_refused_in_a_sweep(capsys):
    assert main(["train", "experiment=tiny_grpo", "-m", "run_name=a(,b"]) == 2
    assert capsys.readouterr().err.startswith("error: run_name: got 'a(,b', whose quotes or brackets do not close")


def test_a_saved_configuration_is_read_as_what_it_was(tmp_path):
    saved = {"run_name": "1e5", "tags": ["1E+5", "007", "off", "a\nb", "null"], "rate": 1e-06, "steps": 3}
    folder = make_run_folder(tmp_path, "mine", "q")
    folder.save_config(saved)
    assert read_saved(folder.path / "config.yaml") == saved == yaml.safe_load((folder.path / "config.yaml").read_text())


def test_a_path_is_read_from_the_words_before_they_are_composed(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["resume=a", 'resume="my runs/it\'s"', "runs_folder=~/runs", "x"]
    assert value_of("resume", words) == "my runs/it's"
    assert value_of("runs_folder", words) == "/home/me/runs" == value("runs_folder", "runs_folder=~/runs")
    assert value("resume", "resume=~/runs/a") == "/home/me/runs/a"
    assert value_of("seed", words) is None and plain("'a b'") == "a b"
