"""Broken model folders end in one line with the folder, or load."""

import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from fuzz import cases, model_folders, try_all

from apportion.actors.loading import load_causal_lm
from apportion.actors.reward_model import ModelSource
from apportion.actors.reward_sources import RewardEntry
from apportion.actors.score_model import load_score_model
from apportion.conf.models import (
    check_own_tokenizer,
    check_rows_of_several,
    check_targets,
    read_description,
    read_limits,
    read_model,
)
from apportion.data.builtin import _build_tiny
from apportion.data.errors import DataError
from apportion.data.prompts import PromptEncoder, load_tokenizer
from apportion.platform.errors import ConfigError


def written(path):
    """A prompt in the words of the folder's own chat template, or one line about the template."""
    tokenizer = load_tokenizer(path)
    try:
        PromptEncoder(tokenizer).token_ids([{"role": "user", "content": "2+2?"}])
    except DataError as error:
        assert "\n" not in str(error) and "template" in str(error) and len(str(error)) < 1000, str(error)


def loaded(path):
    """The model, as a run loads it and as a reward model is loaded."""
    if Path(path).name == "scores":
        load_score_model(SimpleNamespace(model=path, **SETTINGS, lora=None, seed=0))
        ModelSource(RewardEntry(f"model:{path}", params={"device": "cpu"})).close()
    else:
        load_causal_lm(path, **SETTINGS)


SETTINGS = {"dtype": "float32", "attention": "sdpa", "trust_remote_code": False}


# What `plan` looks at, then what loads.
STEPS = (
    read_model,
    read_limits,
    read_description,
    check_own_tokenizer,
    lambda path: check_targets(["q_proj"], path),
    lambda path: check_rows_of_several(path, 100, "policy.pack"),
    written,
    loaded,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "plain"
    folder.mkdir()
    _build_tiny(folder)
    return model_folders.make_all(folder)


def refused(step, path):
    """The step's one line, None where it takes the folder."""
    try:
        step(path)
    except (ConfigError, DataError) as error:
        assert "\n" not in str(error) and path in str(error) and len(str(error)) < 1200, str(error)
        return str(error)
    return None


def test_whole_model_folders_load(made):
    assert {kind: refused(loaded, str(folder)) for kind, folder in made.items()} == dict.fromkeys(made)


def test_broken_model_folders(made, tmp_path):
    outcomes = {True: 0, False: 0}

    def case(number):
        rng = random.Random(number)
        kind = rng.choice(model_folders.KINDS)
        folder = tmp_path / str(number) / kind
        shutil.copytree(made[kind], folder)
        done = f"{kind}: {model_folders.spoil(rng, folder)}"
        try:
            lines = [line for step in STEPS[:-1] if (line := refused(step, str(folder)))]
            if not lines and (line := refused(STEPS[-1], str(folder))):
                lines.append(line)
        except Exception as error:
            raise AssertionError(done) from error
        outcomes[bool(lines)] += 1
        shutil.rmtree(folder)

    try_all("model folders", 40, case)
    if len(cases(40)) >= 40:
        assert min(outcomes.values()) > 0, outcomes  # some are refused, some load
