"""Signatures: a configuration is this user's own in the folder that it was written to, and nowhere else."""

import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from apportion.platform import signature
from apportion.platform.runs import RunFolder
from apportion.platform.signature import VARIABLE, identity_file, signed, unsigned_because

TEXT = "seed: 1\n"


@pytest.fixture(autouse=True)
def key(tmp_path, monkeypatch):
    """The file of a user who has signed nothing yet."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "me" / "identity"))
    return tmp_path / "me" / "identity"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    RunFolder(folder).save_config({"seed": 1, "trust_run": True})
    return folder


def why(folder):
    return unsigned_because((folder / "config.yaml").read_text(), folder)


def test_a_saved_configuration_is_signed_and_reads_as_before(run, key):
    assert why(run) is None
    assert yaml.safe_load((run / "config.yaml").read_text()) == {"seed": 1, "trust_run": False}
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_text().strip() not in (run / "config.yaml").read_text()


def test_the_same_folder_by_another_path_is_the_same(run, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    assert why(tmp_path / "link" / "first") is None
    monkeypatch.chdir(run)
    assert why(run.relative_to(run)) is None


def test_a_copied_a_moved_and_an_edited_run_are_foreign(run, tmp_path):
    shutil.copytree(run, tmp_path / "runs" / "second")
    assert "copied, moved or edited" in why(tmp_path / "runs" / "second")
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert "copied, moved or edited" in why(tmp_path / "moved" / "first")
    (tmp_path / "moved").rename(tmp_path / "runs")
    assert why(run) is None
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("seed: 1", "seed: 2"))
    assert "copied, moved or edited" in why(run)


def test_text_after_the_signature_or_a_second_one_is_an_edit(run):
    file = run / "config.yaml"
    text = file.read_text()
    tag = text.rpartition("# signature: ")[2]
    for changed in (
        text + "seed: 2\n",
        text + f"seed: 2\n# signature: {tag}",
        text.replace(tag, "é\n"),
        text.replace(tag, ""),
    ):
        file.write_text(changed)
        assert "copied, moved or edited" in why(run)


def test_a_run_of_an_earlier_version_has_no_signature(run):
    (run / "config.yaml").write_text(TEXT)
    assert why(run) == "its config.yaml has no signature: somebody else or an earlier version of apportion wrote it"


def test_another_users_signature_is_none_of_this_users(run, key):
    key.unlink()
    assert "cannot be read" in why(run)
    signed(TEXT, run)  # makes a key
    assert "copied, moved or edited" in why(run)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_can_read_or_write_proves_nothing(mode, run, key):
    key.chmod(mode)
    assert f"chmod 600 {key}" in why(run)
    with pytest.raises(OSError, match="others can read"):
        signed(TEXT, run)


@pytest.mark.parametrize("text", ["", "zz", "00" * 31, "00" * 33, "\xff"])
def test_a_damaged_key_is_named(text, run, key):
    key.write_text(text)
    assert f"{key}: got " in why(run)


def test_a_run_goes_on_where_no_key_can_be_made(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "identity"))
    RunFolder(tmp_path).save_config({"seed": 1})
    assert (tmp_path / "config.yaml").read_text() == TEXT
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path} is not signed as your own (")


def test_the_key_is_in_the_users_own_configuration_unless_a_variable_names_it(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert identity_file() == tmp_path / ".config" / "apportion" / "identity"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert identity_file() == tmp_path / "xdg" / "apportion" / "identity"
    monkeypatch.setenv(VARIABLE, "~/key")
    assert identity_file() == tmp_path / "key"


def test_processes_that_make_the_key_at_once_use_the_same(run, key):
    key.unlink()
    with ThreadPoolExecutor(8) as pool:
        signed = set(pool.map(lambda _: signature.signed("seed: 1\n", run), range(8)))
    assert len(signed) == 1 and os.listdir(key.parent) == ["identity"]
