"""What DeepSpeed compiles: a mark that a killed process left does not keep later runs waiting."""

from types import SimpleNamespace

import pytest

from apportion.actors.extensions import VARIABLE, compile_extensions, extensions_folder


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Names of the builders that were asked for, each of which waits for the mark in its folder to go, as torch does."""
    names = []

    def builder(name):
        def load(verbose):
            if (extensions_folder() / name / "lock").exists():
                pytest.fail("would wait for ever")
            names.append(name)

        return SimpleNamespace(is_compatible=lambda verbose: True, load=load)

    accelerator = SimpleNamespace(device_name=lambda: "cpu", create_op_builder=builder)
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: accelerator)
    monkeypatch.setenv("APPORTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)
    return names


def test_a_mark_left_by_a_process_that_was_killed_is_removed(asked):
    left = extensions_folder() / "CPUAdamBuilder" / "lock"
    left.parent.mkdir(parents=True)
    left.write_text("")
    compile_extensions(offloads=True)
    assert asked == ["ShareMemCommBuilder", "CPUAdamBuilder"] and not left.exists()
    compile_extensions(offloads=False)
    assert asked[2:] == ["ShareMemCommBuilder"]


def test_a_folder_of_ones_own_and_a_cache_that_cannot_be_written_are_left_to_torch(asked, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine"))
    compile_extensions(offloads=True)
    assert asked == [] and not (tmp_path / "cache").exists()
    monkeypatch.delenv(VARIABLE)
    (tmp_path / "cache").write_text("a file")
    compile_extensions(offloads=True)
    assert asked == []
