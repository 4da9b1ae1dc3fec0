"""What is installed is what is pinned, down to the bytes: every pin has hashes, and the installer lets in nothing else."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "requirements"
LISTS = sorted(file.stem for file in FOLDER.glob("*.txt"))
ENTRY = re.compile(r"^(\S+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)


def pins(name):
    lines = (FOLDER / f"{name}.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(package): version for package, version in found}


def normal(package):
    return re.sub(r"[-_.]+", "-", package).lower()


def test_every_list_has_a_lock():
    assert LISTS == ["build", "cpu", "cuda", "dev", "torch-cpu"]


@pytest.mark.parametrize("name", LISTS)
def test_every_pin_has_hashes_and_nothing_else_is_locked(name):
    text = (FOLDER / f"{name}.lock").read_text()
    entries = ENTRY.findall(text)
    assert {normal(package): version for package, version, _ in entries} == pins(name)
    assert len(entries) == len(pins(name))
    assert ENTRY.sub("", text) == ""  # no option, no address, no line without a hash


def test_the_lists_agree():
    cpu, cuda = pins("cpu"), pins("cuda")
    differ = {package for package in cpu.keys() & cuda.keys() if cpu[package] != cuda[package]}
    assert differ == {"apache-tvm-ffi"}  # what the two builds of vLLM ask for
    assert pins("torch-cpu")["torch"] == cuda["torch"] + "+cpu"
    assert not pins("build").keys() & (cpu.keys() | cuda.keys() | pins("dev").keys())


def installer(tmp_path, lists):
    """The installer in a folder of its own, with the lists given."""
    folder = tmp_path / "requirements"
    folder.mkdir()
    shutil.copy(FOLDER / "install.sh", folder)
    (folder / "torch-cpu.txt").write_text("torch==2.0+cpu\n")
    for name, text in lists.items():
        (folder / f"{name}.lock").write_text(text)
    return folder / "install.sh"


def environment(tmp_path, python):
    """A virtual environment whose Python is this script."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name in ("python", "pip"):
        file = tmp_path / "venv" / "bin" / name
        file.write_text(f"#!/bin/sh\n{python}\n")
        file.chmod(0o755)
    return tmp_path / "venv"


@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_the_installer_asks_pip_for_hashes_and_for_no_other_build_tools(build, tmp_path):
    said = tmp_path / "said"
    venv = environment(
        tmp_path,
        f'echo "$@" >> {said}; case "$*" in *"m.version"*) test -e {said}.asked && echo 2.0+cpu; touch {said}.asked;; esac',
    )
    done = subprocess.run([installer(tmp_path, {}), venv, build], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    calls = [line.partition(" install ")[2] for line in said.read_text().splitlines() if " install " in line]
    checked = "--require-hashes --no-deps --no-build-isolation -r requirements/"
    torch = [f"{checked}torch-cpu.lock"] if build == "cpu" else []
    lists = f"{checked}{build}.lock -r requirements/dev.lock"
    assert calls == [f"{checked}build.lock", *torch, lists, "--no-deps --no-build-isolation --editable ."]


def wheel(folder, content):
    file = folder / "demo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("demo.py", content)
        made.writestr("demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n")
        made.writestr("demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr("demo-1.0.dist-info/RECORD", "")
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["file", "pin"])
def test_a_changed_file_or_pin_is_not_installed(changed, tmp_path):
    index, target = tmp_path / "index", tmp_path / "target"
    index.mkdir()
    digest = wheel(index, "x = 1")
    if changed == "file":
        assert wheel(index, "x = 2") != digest
    lock = f"demo=={'1.0' if changed == 'file' else '1.1'} \\\n    --hash=sha256:{digest}\n"
    venv = environment(tmp_path, f'exec {sys.executable} "$@"')
    done = subprocess.run(
        [installer(tmp_path, {"build": lock}), venv, "cuda"], capture_output=True, text=True,
        env=os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_TARGET": str(target), "PIP_CONFIG_FILE": os.devnull},
    )  # fmt: skip
    assert done.returncode == 1
    assert (
        "DO NOT MATCH THE HASHES" if changed == "file" else "No matching distribution found for demo==1.1"
    ) in done.stderr
    assert done.stderr.splitlines()[-1].startswith("install: pip installed nothing of this list, and says above why.")
    assert not target.exists()
