"""Random command lines and damaged run folders: done, or one line that names a key or a file; no traceback, no hang."""

import pytest
from fuzz import try_all
from fuzz.command_lines import command_line, number_line
from fuzz.outcome import fault, instead_of_runs, outcome
from fuzz.run_folders import damaged, evaluate, make_run, make_stage_run, take_up, take_up_stage


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.timeout(14400)
def test_a_random_command_line_is_planned_or_refused_in_one_line(tmp_path):
    make_run(tmp_path / "runs" / "given")
    make_stage_run(tmp_path / "runs" / "stage")

    def case(number):
        words = command_line(number)
        found = fault(outcome(words), words)
        return found and f"{[word[:100] for word in words]}: {found}"

    with instead_of_runs(lambda *_: 0, lambda *_: 0, lambda *_: 0):
        try_all("command lines", 12, case)


@pytest.mark.timeout(14400)
def test_an_odd_number_is_planned_or_refused_in_one_line():
    def case(number):
        words = number_line(number)
        found = fault(outcome(words), words)
        return found and f"{words}: {found}"

    with instead_of_runs(lambda *_: 0, lambda *_: 0, lambda *_: 0):
        try_all("odd numbers", 12, case)


@pytest.mark.timeout(14400)
def test_a_damaged_run_folder_is_taken_up_or_refused_in_one_line(tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    make_run(tmp_path / "whole" / "given")
    make_stage_run(tmp_path / "whole" / "stage")

    def case(number):
        words = damaged(tmp_path / "whole", tmp_path / "runs" / "given", number)
        found = fault(outcome(words), words)
        if precious.read_text() != "precious":
            precious.write_text("precious")
            found = "writes through a link"
        return found and f"{words}: {found}"

    with instead_of_runs(take_up, evaluate, take_up_stage):
        try_all("run folders", 20, case)
