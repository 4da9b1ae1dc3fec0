"""What the comparison of two commits counts and finds, on run folders made by hand."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import same_as


def make_run(folder, loss=0.5, tokens=(1, 2), weight=1.0, **extra):
    model = folder / "checkpoints" / "step-000002" / "model"
    model.mkdir(parents=True)
    metrics = {"step": 1, "time": 7.0, "timing/step": 1.5, "policy/loss": loss, **extra}
    (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    (folder / "samples.jsonl").write_text(json.dumps({"step": 1, "tokens": list(tokens)}) + "\n")
    save_file(
        {"head": torch.full((3,), weight, dtype=torch.bfloat16), "norm": torch.ones(2)}, model / "model.safetensors"
    )
    return folder


def test_equal_runs_are_the_same_and_time_is_not_compared(tmp_path):
    base, here = make_run(tmp_path / "base"), make_run(tmp_path / "here")
    text = (here / "metrics.jsonl").read_text().replace('"time": 7.0', '"time": 8.0')
    (here / "metrics.jsonl").write_text(text)
    assert same_as.compare(base, here) == same_as.Comparison(metrics=2, samples=1, tensors=2)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"loss": 0.5000001}, "metrics.jsonl line 1: policy/loss: 0.5 before, 0.5000001 now"),
        ({"tokens": (1, 3)}, "samples.jsonl line 1: tokens: [1, 2] before, [1, 3] now"),
        ({"weight": 1.0078125}, "model: model/model.safetensors:head differs"),
    ],
)
def test_the_smallest_difference_is_named(tmp_path, changed, said):
    found = same_as.compare(make_run(tmp_path / "base"), make_run(tmp_path / "here", **changed))
    assert found.differ == [said]


def test_a_field_of_one_side_is_listed_and_no_difference(tmp_path):
    found = same_as.compare(make_run(tmp_path / "base"), make_run(tmp_path / "here", novel=1))
    assert (found.differ, found.on_one_side) == ([], {"metrics.jsonl: novel"})


def test_missing_lines_and_models_are_differences(tmp_path):
    base, here = make_run(tmp_path / "base"), make_run(tmp_path / "here")
    (here / "samples.jsonl").unlink()
    (here / "checkpoints/step-000002/model/model.safetensors").unlink()
    found = same_as.compare(base, here)
    assert [line.split(":")[0] for line in found.differ] == ["samples.jsonl", "model"]


def test_a_commit_that_is_none_is_refused_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^same_as: got 'no-such-commit', expected a commit of this repository"):
        same_as.extract("no-such-commit", tmp_path / "base")
    with pytest.raises(SystemExit) as ended:
        same_as.main(["HEAD", "grop"])
    assert ended.value.code == 2
