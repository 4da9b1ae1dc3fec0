"""What every actor process has: a log with a bound, and sockets of Ray that its children do not hold."""

import ast
import inspect
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from apportion.platform import logs
from apportion.platform.process import ActorBase, safe_children


@pytest.fixture
def small(monkeypatch):
    for name, value in (("MOST_BYTES", 5000), ("HEAD_BYTES", 500), ("TAIL_BYTES", 1000)):
        monkeypatch.setattr(logs, name, value)


def test_a_long_log_keeps_its_beginning_and_its_end_and_goes_on(tmp_path, small):
    log = tmp_path / "reward-0.log"
    printed = "".join(f"line {i:05d}\n" for i in range(1000))
    with open(log, "ab", buffering=0) as writer:  # as the actor's own descriptor
        writer.write(printed.encode())
        logs.shorten_all(tmp_path)
        writer.write(b"after\n")
    # Lines have 11 bytes: the last 1,000 bytes begin in line 909, which is left out.
    said = f"\n[... {910 * 11 - 500} bytes left out: a log keeps its beginning and its end ...]\n"
    assert log.read_text() == printed[:500] + said + printed[910 * 11 :] + "after\n"


def test_a_log_of_one_endless_line_is_bounded_too(tmp_path, small):
    log = tmp_path / "a.log"
    log.write_bytes(b"x" * 9000)
    logs.shorten(log)
    assert len(log.read_bytes()) < 1700


def test_a_log_below_the_bound_and_one_that_is_gone_are_left_alone(tmp_path, small):
    log = tmp_path / "a.log"
    log.write_bytes(b"x" * 5000)
    logs.shorten(log)
    logs.shorten(tmp_path / "none.log")
    assert log.read_bytes() == b"x" * 5000


def test_a_running_process_keeps_its_log_short(tmp_path, small, monkeypatch):
    monkeypatch.setattr(logs, "LOOK_SECONDS", 0.02)
    log = tmp_path / "a.log"
    log.write_bytes(b"x\n" * 5000)
    logs.keep_short(log)
    deadline = time.monotonic() + 5
    while log.stat().st_size > 5000:
        assert time.monotonic() < deadline
        time.sleep(0.02)


CHILDREN = """
import os, socket, subprocess, sys, time
from apportion.platform.inherited import keep_sockets_from_children
raylet = socket.socket(fileno=int(sys.argv[1]))
os.set_inheritable(raylet.fileno(), True)
keep_sockets_from_children()
mine, childs = socket.socketpair()
if sys.argv[2] == "fork":
    if os.fork() == 0:
        childs.send(b"hello")
        time.sleep(60)
    assert mine.recv(5) == b"hello"
else:
    subprocess.Popen(["sleep", "60"], close_fds=False)
os._exit(3)
"""


@pytest.mark.parametrize("how", ["fork", "program"])
def test_the_death_of_an_actor_is_noticed_while_a_child_of_it_lives(how):
    """The other end of the actor's connection, which the raylet holds, sees it close at once."""
    import socket

    raylet, worker = socket.socketpair()
    with raylet, worker:
        actor = subprocess.Popen(
            [sys.executable, "-c", CHILDREN, str(worker.fileno()), how], pass_fds=[worker.fileno()],
            start_new_session=True,
        )  # fmt: skip
        worker.close()
        raylet.settimeout(20)
        try:
            assert raylet.recv(1) == b""
            assert actor.wait(5) == 3
        finally:
            os.killpg(actor.pid, 9)


ROOT = Path(__file__).parents[1]


def commands() -> list[tuple[str, list[str]]]:
    """Every command of this Python that the package and the benchmarks write, up to the first word that is computed."""
    found = []
    for file in [*ROOT.glob("apportion/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable":
                words = [
                    word.value for word in node.elts if isinstance(word, ast.Constant) and isinstance(word.value, str)
                ]
                found.append((str(file.relative_to(ROOT)), words))
    return found


def test_no_program_that_is_started_looks_into_the_working_folder_first():
    found = commands()
    assert len(found) >= 10
    for file, words in found:
        # A benchmark of this repository is not installed, and runs in the repository's folder.
        own = file.startswith("benchmarks/") and not ("-m" in words and "apportion" in words)
        assert own or words[0] in ("-P", "-I"), (file, words)


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    for name in ("yaml", "json", "torch", "typing_extensions"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_a_stage_that_runs_first_imports_nothing_of_the_working_folder(hostile):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "apportion", "--version"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "hijacked" not in done.stderr and "apportion" in done.stdout


@pytest.mark.parametrize("given", [None, "", "1"])
def test_what_a_library_starts_with_python_m_imports_nothing_of_the_working_folder(hostile, monkeypatch, given):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    if given is not None:
        monkeypatch.setenv("PYTHONSAFEPATH", given)
    command = [sys.executable, "-m", "json.tool", "--help"]
    with safe_children():
        assert subprocess.run(command, capture_output=True, text=True, timeout=60).returncode == 0
    assert os.environ.get("PYTHONSAFEPATH") == given
    assert (subprocess.run(command, capture_output=True, timeout=60).returncode == 1) == (not given)


class Leaky(ActorBase):
    def __init__(self, settings, raises=None):
        print("made with", settings["password"], os.environ["PLAIN_NAME"])
        if raises is not None:
            raise raises

    def fail(self, error):
        raise error

    def value(self, a, b=2):
        return a + b


def test_an_actor_masks_the_secrets_of_its_settings_and_its_environment_in_its_log(tmp_path):
    log = tmp_path / "logs" / "leaky-0.log"
    program = (
        "import logging, sys; from test_platform_process import Leaky\n"
        "early = logging.StreamHandler(sys.stderr); logging.getLogger('early').addHandler(early)\n"
        "actor = Leaky.__new__(Leaky)\n"  # as Ray makes it
        "actor.__init__({'password': 'open/sesame 9', 'auth_env': 'PLAIN_NAME'})\n"
        "logging.getLogger('early').error('logged open/sesame 9')\n"
        "raise ValueError(repr('open/sesame 9') + ' plain words')\n"
    )
    environment = {
        **os.environ,
        "APPORTION_LOG": str(log),
        "PLAIN_NAME": "plain words",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    text = log.read_text()
    assert ended.stdout == ended.stderr == "" and ended.returncode == 1
    assert "made with <redacted> <redacted>\n" in text and "logged <redacted>\n" in text
    assert "ValueError: '<redacted>' <redacted>" in text and "Traceback" in text
    assert "sesame" not in text and "plain words" not in text


def test_what_an_actor_raises_has_no_secret(monkeypatch):
    monkeypatch.setenv("PLAIN_NAME", "x")
    actor = Leaky({"password": "open-sesame-9"})
    assert actor.value(1) == 3 and str(inspect.signature(Leaky.value)) == "(self, a, b=2)"
    behind = OSError(2, "no open-sesame-9", "/x/open-sesame-9")
    error = KeyError("open-sesame-9", 5)
    error.__cause__ = behind
    with pytest.raises(KeyError) as caught:
        actor.fail(error)
    assert caught.value is error and caught.value.args == ("<redacted>", 5)
    assert str(behind) == "[Errno 2] no <redacted>: '/x/<redacted>'"
    with pytest.raises(ValueError, match=r"^lost <redacted>$"):
        Leaky({"password": "open-sesame-9"}, ValueError("lost open-sesame-9"))


class OfItsOwn(Exception):
    def __init__(self, answer):
        super().__init__("asked")
        self.answer = answer

    args = property(lambda self: ("fixed",))

    def __str__(self):
        return f"answered {self.answer}"


def test_an_error_of_any_form_has_no_secret_and_none_replaces_it(monkeypatch):
    secret = "-".join(("open", "sesame", "9"))  # no traceback's line holds it
    monkeypatch.setenv("PLAIN_NAME", "x")
    group = ExceptionGroup("several", [ValueError({"said": [secret, 3]}), OfItsOwn({"key": secret})])
    group.add_note(f"asked with {secret}")
    with pytest.raises(ExceptionGroup) as caught:
        Leaky({"password": secret}).fail(group)
    text = "".join(traceback.format_exception(caught.value))
    assert caught.value is group and secret not in text
    assert "ValueError: {'said': ['<redacted>', 3]}" in text and "answered {'key': '<redacted>'}" in text
    assert "asked with <redacted>" in text
