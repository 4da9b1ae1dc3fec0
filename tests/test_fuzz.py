"""Random command lines and damaged run folders: done, or one line that names a key or a file; no traceback, no hang.

APPORTION_FUZZ=N tries N of each; the same number gives the same cases.
"""

import os

import pytest
from fuzz.command_lines import command_line, number_line
from fuzz.outcome import fault, instead_of_runs, outcome
from fuzz.run_folders import damaged, evaluate, make_run, take_up

CASES = int(os.environ.get("APPORTION_FUZZ", "0"))
NAMES = r"[^\s:][^:]*(?::\d+)?: "  # a key, a file or a switch, and a line's number


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.timeout(14400)
def test_a_random_command_line_is_planned_or_refused_in_one_line():
    faults = []
    with instead_of_runs(lambda *_: 0, lambda *_: 0):
        for seed in range(CASES or 12):
            words = command_line(seed)
            if (found := fault(outcome(words), NAMES)) is not None:
                faults.append((seed, [word[:100] for word in words], found))
    assert faults == []


@pytest.mark.timeout(14400)
def test_an_odd_number_is_planned_or_refused_in_one_line():
    faults = []
    with instead_of_runs(lambda *_: 0, lambda *_: 0):
        for seed in range(CASES or 12):
            words = number_line(seed)
            if (found := fault(outcome(words), NAMES)) is not None:
                faults.append((seed, [word[:100] for word in words], found))
    assert faults == []


@pytest.mark.timeout(14400)
def test_a_damaged_run_folder_is_taken_up_or_refused_in_one_line(tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    make_run(tmp_path / "whole" / "given")
    faults = []
    with instead_of_runs(take_up, evaluate):
        for seed in range(CASES or 20):
            words = damaged(tmp_path / "whole" / "given", tmp_path / "runs" / "given", seed)
            if (found := fault(outcome(words), NAMES)) is not None:
                faults.append((seed, words, found))
            assert precious.read_text() == "precious", seed  # nothing is written through a link
    assert faults == []
