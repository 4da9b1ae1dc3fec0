"""What DeepSpeed compiles: a mark that a killed process left does not keep later runs waiting."""

import subprocess
import sys

import pytest

PROGRAM = """
import deepspeed, sys
from apportion.actors.extensions import compile_extensions, extensions_folder
compile_extensions(offloads=False)
print(sorted(path.name for path in extensions_folder().glob("*/*.so")))
"""


def run(tmp_path, **environment):
    import os

    given = {name: value for name, value in os.environ.items() if name != "TORCH_EXTENSIONS_DIR"}
    given |= {"DS_ACCELERATOR": "cpu", "APPORTION_CACHE": str(tmp_path), **environment}
    return subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240, env=given)


@pytest.mark.slow
def test_a_mark_left_by_a_process_that_was_killed_is_removed(tmp_path):
    import socket

    left = tmp_path / "extensions" / socket.gethostname() / "deepspeed_shm_comm" / "lock"
    left.parent.mkdir(parents=True)
    left.write_text("")
    first = run(tmp_path)
    assert first.returncode == 0, first.stderr
    assert "deepspeed_shm_comm" in first.stdout and not left.exists()


def test_a_folder_of_ones_own_for_extensions_is_left_alone(tmp_path, monkeypatch):
    from apportion.actors import extensions

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("APPORTION_CACHE", str(tmp_path / "cache"))
    extensions.compile_extensions(offloads=True)
    assert not (tmp_path / "cache").exists() and not (tmp_path / "mine").exists()
