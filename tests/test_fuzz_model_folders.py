"""Broken model folders end in one line with the folder, or load."""

import random
import shutil

import pytest
from fuzz import at_most, cases, model_folders

from apportion.actors.loading import load_causal_lm
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
from apportion.data.prompts import load_tokenizer
from apportion.platform.errors import ConfigError

# What `plan` looks at, then what loads.
STEPS = (
    read_model,
    read_limits,
    read_description,
    check_own_tokenizer,
    lambda path: check_targets(["q_proj"], path),
    lambda path: check_rows_of_several(path, 100, "policy.pack"),
    load_tokenizer,
    lambda path: load_causal_lm(path, "float32"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "model"
    folder.mkdir()
    _build_tiny(folder)
    return folder


def refused(step, path):
    """The step's one line, None where it takes the folder."""
    try:
        with at_most(30):
            step(path)
    except (ConfigError, DataError) as error:
        assert "\n" not in str(error) and path in str(error) and len(str(error)) < 1200, str(error)
        return str(error)
    return None


def test_broken_model_folders(made, tmp_path):
    refusals, loaded = 0, 0
    for seed in cases(40):
        folder = tmp_path / "model"
        shutil.copytree(made, folder)
        done = model_folders.spoil(random.Random(seed), folder)
        try:
            lines = [line for step in STEPS[:-1] if (line := refused(step, str(folder)))]
            if not lines and (line := refused(STEPS[-1], str(folder))):
                lines.append(line)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {done}") from error
        refusals, loaded = refusals + bool(lines), loaded + (not lines)
        shutil.rmtree(folder)
    assert refusals and loaded
