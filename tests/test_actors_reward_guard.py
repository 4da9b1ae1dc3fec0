"""A user's function that keeps the interpreter ends its process with a line that names it, and no other one does."""

import signal
import subprocess
import sys
import textwrap
from contextlib import nullcontext

import pytest
from scoring_parts import batch_of

from apportion.actors.reward import RewardWorker
from apportion.data.prompts import TokenizerPath

PROGRAM = """
import re, sys, time
from apportion.actors import reward_guard
from apportion.actors.reward_guard import InterpreterGuard

def stuck_pattern():
    re.match("(a+)+$", "a" * 60 + "b")

guard = InterpreterGuard(["first", "stuck"], 1.5)
"""


def run(rest: str) -> subprocess.CompletedProcess:
    program = PROGRAM + textwrap.dedent(rest)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_function_that_keeps_the_interpreter_ends_the_process_and_is_named():
    done = run("""
        with guard:
            stuck_pattern()
        print("not reached")
    """)
    assert done.returncode == -signal.SIGKILL and "not reached" not in done.stdout
    assert "in stuck_pattern" in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("reward functions first, stuck: one of them kept the interpreter for 1.5 s")


@pytest.mark.slow
def test_a_function_that_waits_and_a_process_that_is_not_scoring_are_left_alone():
    done = run("""
        for _ in range(2):
            with guard:
                time.sleep(2.5)
        [sum(range(10 ** 6)) for _ in range(3)]
        time.sleep(8)
        print("reached")
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "reached\n", "")


def test_a_reward_actor_is_guarded_where_it_calls_a_users_function_and_only_there(tmp_path):
    (tmp_path / "mine.py").write_text("def f(completions):\n    return [1.0] * len(completions)\n")
    entries = ["numeric_match", {"function": f"{tmp_path / 'mine.py'}:f", "timeout_seconds": 5.0}]
    guarded = RewardWorker(entries, 60.0, None, TokenizerPath("builtin:tiny"), "\n\n")
    assert (guarded._guard._functions, guarded._guard._seconds) == ("f", 35.0)
    batch, prompts = batch_of("a 0", "b 2")
    assert guarded.score(batch, prompts)[1].rewards.tolist() == [2.0, 1.0]
    assert guarded.score(batch, prompts)[1].rewards.tolist() == [2.0, 1.0]
    guarded._guard._process.kill()
    guarded._guard._process.wait()
    assert guarded.score(batch, prompts)[1].rewards.tolist() == [2.0, 1.0]
    guarded._guard._connection.close()
    assert guarded._guard._process.wait(10) == 0
    plain = RewardWorker(["numeric_match", "math_verify"], 60.0, None, TokenizerPath("builtin:tiny"), "\n\n")
    assert isinstance(plain._guard, nullcontext)
