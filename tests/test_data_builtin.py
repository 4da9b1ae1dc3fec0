"""Built-in models: made once, whole or not at all."""

import multiprocessing
import os
import socket
import time
from pathlib import Path

import pytest

from apportion.data import builtin
from apportion.data.errors import DataError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("APPORTION_CACHE", str(tmp_path))
    return tmp_path


def test_other_paths_are_left_as_they_are():
    assert builtin.resolve_model("org/model") == "org/model"
    assert builtin.resolve_model("./folder") == "./folder"


def test_a_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert builtin.resolve_model("~/folder") == "/home/me/folder"


def test_a_misspelt_builtin_is_refused_with_the_nearest_name():
    with pytest.raises(
        DataError, match=r"expected builtin:smollm2-135m-instruct, builtin:tiny, builtin:apprentice \(did you mean"
    ):
        builtin.resolve_model("builtin:smollm2-135m-instrukt")


def test_the_tiny_model_is_the_same_every_time_and_reads_bytes(cache, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = builtin.resolve_model("builtin:tiny")
    monkeypatch.setenv("APPORTION_CACHE", str(cache / "other"))
    again = builtin.resolve_model("builtin:tiny")
    assert Path(folder).parent.parent == cache and folder != again
    model, twin = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (folder, again))
    assert sum(p.numel() for p in model.parameters()) == 164672
    for (name, mine), (_, other) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
        assert torch.equal(mine, other), name
        assert torch.equal(mine, mine.to(torch.bfloat16).float()), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size == 264
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert (model.generation_config.pad_token_id, model.generation_config.eos_token_id) == (0, 1)
    text = "Grüße, 12 + 7?\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) == len(text.encode())


def test_a_random_state_is_not_touched_by_making_the_tiny_model(cache):
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    builtin.resolve_model("builtin:tiny")
    assert torch.equal(torch.rand(3), expected)


def _count_and_make(folder: str, log: str) -> None:
    def build(building: Path) -> None:
        with open(log, "a") as file:
            file.write("built\n")
        (building / "config.json").write_text("{}")

    builtin._made_once(Path(folder), build)


def test_processes_that_want_a_model_at_once_make_it_once(tmp_path):
    folder, log = tmp_path / "models" / "m-1", tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_count_and_make, args=(str(folder), str(log))) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [p.exitcode for p in processes] == [0, 0, 0, 0]
    assert log.read_text() == "built\n"
    assert os.listdir(folder) == ["config.json"]


def test_a_build_that_fails_leaves_nothing_that_looks_finished(tmp_path):
    def build(building: Path) -> None:
        (building / "config.json").write_text("{}")
        raise OSError("no space left on device")

    folder = tmp_path / "models" / "m-1"
    with pytest.raises(DataError, match=r"could not be written .no space left on device.; free some space"):
        builtin._made_once(folder, build)
    assert os.listdir(folder.parent) == [".m-1.lock"]


def test_what_a_killed_process_left_is_removed_before_a_model_is_made(tmp_path):
    folder = tmp_path / "models" / "m-1"
    left, other = folder.parent / ".m-1.abc", folder.parent / ".m-2.abc"
    for made in (left, other):
        made.mkdir(parents=True)
        (made / "model.safetensors").write_text("half")
    fresh = folder.parent / ".m-1.def"  # of another node, perhaps, whose lock is not seen here
    fresh.mkdir()
    long_ago = time.time() - builtin.LOCK_SECONDS - 60
    os.utime(left, (long_ago, long_ago))
    builtin._made_once(folder, lambda building: None)
    assert sorted(os.listdir(folder.parent)) == [".m-1.def", ".m-1.lock", ".m-2.abc", "m-1"]


def test_waiting_for_another_process_is_said_once_and_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(builtin, "LOCK_SECONDS", 0.3)
    monkeypatch.setattr(builtin, "LOCK_POLL_SECONDS", 0.05)
    folder, me = tmp_path / "m-1", f"process {os.getpid()} on {socket.gethostname()}"
    with builtin.locked(tmp_path / ".m-1.lock"), pytest.raises(DataError) as caught:
        builtin._made_once(folder, lambda building: None)
    assert str(caught.value) == (
        f"{tmp_path}/.m-1.lock: held by {me} for 0.3 s, expected what it makes to be there by now: end that process"
    )
    assert capsys.readouterr().err == f"waiting for {me}, which makes m-1\n"
    builtin._made_once(folder, lambda building: None)  # the lock went with who held it
    assert folder.is_dir()


@pytest.mark.system
def test_smollm2_splits_numbers_into_digits_as_it_was_trained():
    from transformers import AutoTokenizer

    gguf = builtin._smollm2_file()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    builtin._restore_digit_splitting(tokenizer)
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    assert tokenizer.tokenize("What is 12 + 7?") == ["What", "Ġis", "Ġ", "1", "2", "Ġ+", "Ġ", "7", "?"]
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    assert "<|im_start|>" in tokenizer.chat_template
