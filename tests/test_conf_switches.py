"""Hydra's switches: taken apart from the overrides, whichever way they are written."""

import pytest

from apportion.conf.switches import split
from apportion.platform.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "switches"),
    [
        (["-m"], ["--multirun"]),
        (["-c", "job"], ["--cfg=job"]),
        (["-c=job", "--resolve"], ["--cfg=job", "--resolve"]),
        (["--config-dir", "--multirun"], ["--config-dir=--multirun"]),  # a value, whatever it looks like
        (["--cfg", "job", "-c", "all"], ["--cfg=job", "--cfg=all"]),
        (["-h", "--resolve"], ["--help", "--resolve"]),
    ],
)
def test_switches_are_told_from_overrides_in_their_long_form(words, switches):
    assert split("train", ["seed=1", *words, "train.steps=2"]) == (switches, ["seed=1", "train.steps=2"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["-c", "x"], "--cfg: got 'x', expected job, hydra or all"),
        (["--cfg", "job", "--cfg", "x"], "--cfg: got 'x', expected job, hydra or all"),
        (["--cfg="], "train: got '--cfg=', expected KEY=VALUE, --help, --cfg job, --multirun or --config-dir DIR"),
        (["-i"], "train: got -i and nothing after it, expected -i VALUE"),
        (["-r", "-m"], "--run: got it together with --multirun, expected one of --run, --multirun, --cfg, --info"),
        (["--multirun=1"], "train: got '--multirun=1', expected KEY=VALUE, --help"),
        (["--gpus", "8"], "train: got '--gpus', expected cluster.gpus_per_policy_rank=1 and the like: --gpus is for"),
    ],
)
def test_a_switch_that_does_not_fit_is_one_line(words, line):
    with pytest.raises(ConfigError) as caught:
        split("train", words)
    assert str(caught.value).startswith(line)
