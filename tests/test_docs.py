"""The pages say what is so: examples are the files they show, commands compose, messages exist, links lead somewhere."""

import ast
import json
import re
import shlex
import sys
import types
from functools import cache
from pathlib import Path

import pytest
import yaml

from apportion.actors.reward_sources import RewardEntry
from apportion.cli import COMMANDS, compose_config, main, to_config
from apportion.conf.reference import recipe_note, render
from apportion.data.verifiers import VERIFIERS
from apportion.platform.metric_names import METRICS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "deploy" / "README.md", ROOT / "SECURITY.md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ALGORITHMS = sorted((ROOT / "apportion" / "conf" / "algorithm").glob("*.yaml"))


def blocks(language):
    """(page, what stands after the language, text) of every fenced block in that language."""
    found = []
    for page in PAGES:
        for info, text in FENCE.findall(page.read_text(encoding="utf-8")):
            first, _, rest = info.strip().partition(" ")
            if first == language:
                found.append((page.name, rest, text))
    return found


def commands():
    lines = [(page, line) for page, _, text in blocks("sh") for line in text.splitlines() if line.strip()]
    return [(page, line) for page, line in lines if line.startswith("apportion ")]


# --- examples ---


SHOWN = [
    (page, path, text)
    for kind in ("python", "yaml", "json")
    for page, path, text in blocks(kind)
    if path and not path.startswith("file=")
]


@pytest.mark.parametrize(("page", "path", "text"), SHOWN, ids=[f"{page}: {path}" for page, path, _ in SHOWN])
def test_a_shown_file_is_the_file(page, path, text):
    assert text == (ROOT / path).read_text(encoding="utf-8")


def test_readme_shows_a_reward_data_and_a_recipe():
    shown = {path for page, path, _ in SHOWN if page == "README.md"}
    assert shown >= {"examples/reward.py", "examples/held_out.jsonl", "examples/experiment/capitals.yaml"}


# --- commands ---


@cache
def saved_run():
    return yaml.safe_dump(to_config(compose_config(["experiment=tiny_grpo"]))[1])


@pytest.fixture
def ready(tmp_path, monkeypatch):
    """A folder in which the pages' commands can be composed: the examples, a model, a run named first. Nothing starts:
    what would be run is kept."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "vocab_size": 261, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 256, "max_position_embeddings": 1024}
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text(json.dumps(sizes))
    for teacher in ("sharpened", "reversed"):
        (tmp_path / teacher).symlink_to(tmp_path / "my-model")
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    run.joinpath("config.yaml").write_text(saved_run())
    sample = {"step": 1, "prompt": "", "reward": 1, "finish_reason": "stop", "policy_version": 0, "tokens": []}
    run.joinpath("samples.jsonl").write_text(json.dumps(sample) + "\n")
    monkeypatch.setattr("apportion.before.run_before", lambda config: None)
    calls = []
    module = types.ModuleType("apportion.build")
    module.train = lambda config, resolved: calls.append(config) or 0
    module.evaluate = lambda config, checkpoint: calls.append(config) or 0
    monkeypatch.setitem(sys.modules, "apportion.build", module)
    monkeypatch.setitem(sys.modules, "apportion.preference_build", module)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line"), commands(), ids=[f"{page}: {line[:70]}" for page, line in commands()])
def test_a_command_in_the_pages_is_one_that_can_run(page, line, ready, capsys):
    words = shlex.split(line)[1:]
    assert words[0] in COMMANDS
    if words[0] == "doctor":
        return
    assert main(words) == 0, capsys.readouterr().err
    if words[0] not in ("plan", "show") and "--cfg" not in words:
        assert len(ready) == (4 if "-m" in words else 1)


def test_every_command_of_the_program_is_in_the_readme():
    shown = {shlex.split(line)[1] for page, line in commands() if page == "README.md"}
    assert shown == set(COMMANDS)


def test_make_targets_in_the_pages_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [*PAGES, ROOT / "CONTRIBUTING.md"]
    named = {
        t for page in pages for t in re.findall(r"(?:`|^    |\.\.\. )make ([a-z-]+)", page.read_text(), re.MULTILINE)
    }
    assert named >= {"quickstart", "test"}
    assert named <= targets


def test_make_has_one_recipe_for_each_target_and_help_names_it():
    text = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):(?!=)", text, re.MULTILINE)
    assert len(targets) == len(set(targets))
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())
    assert set(targets) == phony
    assert phony - {"help"} == set(re.findall(r'@echo "(?:REQUIREMENTS=cuda )?make ([a-z-]+)', text))


# --- links ---


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_to_files_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    lost = [t for t in targets if "://" not in t and not (page.parent / t.partition("#")[0]).exists()]
    assert lost == []


# --- what is generated or counted ---


def test_configuration_page_is_the_schemas():
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == render(), "run python -m apportion.conf.reference > docs/configuration.md"


def test_configuration_page_has_types_defaults_and_meanings():
    page = render()
    assert "| `rollout.top_k` | an integer | `0` | 0: off |" in page
    assert "| `policy.schedule` | one of constant, linear, cosine | `constant` |" in page
    assert "| `policy.lora.rank` | an integer | `16` |" in page
    assert "| `model.path` | text | `???` | folder, hub name, or builtin:smollm2-135m-instruct, builtin:tiny |" in page


def algorithm_rows():
    return dict(
        re.findall(r"^\| `(\w+)` \| (.*) \|$", README.partition("## Algorithms")[2].partition("\n## ")[0], re.MULTILINE)
    )


def test_every_algorithm_recipe_is_in_the_readme_with_its_paper():
    rows = algorithm_rows()
    assert sorted(rows) == [file.stem for file in ALGORITHMS]
    for file in ALGORITHMS:
        for paper in re.findall(r"arXiv (\d{4}\.\d{5})", recipe_note(file)):
            assert paper in rows[file.stem], f"{file.stem}: {paper}"


def test_rewards_page_has_every_verifier_and_setting():
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert rows >= set(VERIFIERS)
    assert rows >= set(RewardEntry.__dataclass_fields__) - {"function", "urls"}


def test_metrics_named_in_troubleshooting_exist():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rooms = {name.partition("/")[0] for name in METRICS}
    named = {n for n in re.findall(r"`(\w+/\w+)`", page) if n.partition("/")[0] in rooms}
    assert "mismatch/abs_logprob_diff" in named
    assert {n for n in named if n not in METRICS and not n.startswith("credit/")} == set()


# --- messages ---


def texts_in_the_source():
    """Every text constant of the program, f-strings with … for what is filled in."""
    texts = [(ROOT / "requirements" / "install.sh").read_text()]
    for file in (ROOT / "apportion").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


FOREIGN = ("operator torchvision", "DO NOT MATCH")  # said by others


def test_messages_in_troubleshooting_are_said_somewhere_in_the_source():
    page = (
        (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## It runs and does not learn")[0]
    )
    said = texts_in_the_source()
    cells = [cell for cell in re.findall(r"^\| ([^|]*) \|", page, re.MULTILINE) if "`" in cell]
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 50
    lost = []
    for message in messages:
        pieces = [piece.strip(" :,;()") for piece in message.split("…")]
        lost += [piece for piece in pieces if len(piece) > 3 and piece not in said and not message.startswith(FOREIGN)]
    assert lost == []
