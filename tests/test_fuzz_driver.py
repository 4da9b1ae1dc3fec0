"""`make fuzz` counts its cases, goes on after a fault, and tells of a case that ends the process or never returns."""

import textwrap

import pytest
from fuzz import __main__ as driver
from fuzz import try_all


@pytest.fixture
def kind(tmp_path, monkeypatch):
    """A kind whose case is a line of Python about `number`."""

    def make(line):
        text = f"""
            import os, time, sys, fuzz
            fuzz.SECONDS = 1
            def case(number):
                {line}
            def test_it():
                fuzz.try_all("things", 1, case)
        """
        (tmp_path / "test_it.py").write_text(textwrap.dedent(text))
        return "things", str(tmp_path / "test_it.py"), 3, 5

    monkeypatch.setenv("PYTHONPATH", str(driver.TESTS))
    return make


@pytest.mark.slow
def test_every_case_is_tried_whatever_one_of_them_does(kind):
    ends = "{3: lambda: 'odd', 4: lambda: 1 / 0, 5: lambda: time.sleep(9), 6: lambda: os._exit(3)}"
    tally = driver.run(*kind(f"return {ends}.get(number, lambda: None)()"))
    assert (tally.tried, tally.hangs, len(tally.faults)) == (5, 1, 4)
    odd, error, hang, death = tally.faults
    assert odd == "case 3 of things: odd"
    assert error.startswith("case 4 of things: Traceback") and error.endswith("ZeroDivisionError: division by zero")
    assert hang.startswith("case 5 of things: Traceback") and hang.endswith("Hang: still busy after 1 s")
    assert death.startswith("case 6 of things: the process ended with 3")


@pytest.mark.slow
def test_a_hang_that_no_signal_ends_leaves_its_stack(kind, monkeypatch):
    name, test, _, _ = kind("list(map(time.sleep, [9] * (number == 4)))")
    text = (
        (driver.Path(test))
        .read_text()
        .replace("fuzz.SECONDS = 1", "fuzz.SECONDS = -9; import signal; signal.alarm = lambda _: 0")
    )
    driver.Path(test).write_text(text)
    tally = driver.run(name, test, 3, 5)
    assert (tally.tried, tally.hangs, len(tally.faults)) == (5, 1, 1)
    assert tally.faults[0].startswith("case 4 of things: Timeout (0:00:01)!") and "in case" in tally.faults[0]


def test_the_fault_names_how_to_try_its_case_again(monkeypatch):
    monkeypatch.setenv("APPORTION_FUZZ_FIRST", "17")
    with pytest.raises(
        AssertionError, match="case 18 of things: odd\n1 of 2 things; `make fuzz SEED=n` tries case n alone"
    ):
        try_all("things", 2, lambda number: "odd" if number == 18 else None)
