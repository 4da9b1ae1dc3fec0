"""One process a run's folder: who holds it, who is refused, and file systems that have no locks."""

import errno
import subprocess
import sys

import pytest

from apportion.platform import run_lock
from apportion.platform.errors import ConfigError
from apportion.platform.run_lock import held, is_held


def test_a_folder_that_is_held_is_refused_by_its_name_and_free_again_after(tmp_path):
    assert not is_held(tmp_path)
    with held(tmp_path):
        assert is_held(tmp_path)
        with pytest.raises(ConfigError, match=rf"run folder: got {tmp_path}, which another process is running"):
            held(tmp_path).__enter__()
    assert not is_held(tmp_path)
    with held(tmp_path):
        pass


def test_a_killed_process_holds_nothing(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from apportion.platform.run_lock import held\n"
        "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    assert is_held(tmp_path)
    holder.kill()
    holder.wait()
    assert not is_held(tmp_path)


def test_a_file_system_without_locks_is_said_once_and_stops_nothing(tmp_path, monkeypatch, capsys):
    def refuse(file, how):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    run_lock._warn_once.cache_clear()
    for _ in range(2):
        with held(tmp_path):
            assert not is_held(tmp_path)
    expected = f"warning: {tmp_path.parent} is on a file system without locks: start no second process on a run\n"
    assert capsys.readouterr().err == expected
