"""Checkpoints: whole or not there, whatever interrupts the writing or touches the files."""

import errno
import json
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from apportion.loop.resume import progress_of
from apportion.platform.checkpoint import CheckpointStore, RunState
from apportion.platform.errors import CheckpointError
from apportion.platform.random_states import load_random_states, save_random_states


def write(store, step, content=b"weights"):
    with store.writing(step) as folder:
        (folder / "policy").mkdir()
        (folder / "policy" / "model.bin").write_bytes(content)
        RunState(step=step, policy_version=step, data={"position": step * 8}).save(folder)


def newest(store):
    found = store.latest()
    assert found is not None
    return found


def names(root):
    return sorted(entry.name for entry in root.iterdir())


def test_a_written_checkpoint_is_found_and_read(tmp_path):
    store = CheckpointStore(tmp_path)
    write(store, 10, b"abc")
    found = newest(store)
    assert found.step == 10
    assert found.path == tmp_path / "step-000010"
    assert (found.path / "policy" / "model.bin").read_bytes() == b"abc"
    assert found.state == RunState(step=10, policy_version=10, data={"position": 80})
    assert (tmp_path / "latest").read_text() == "step-000010\n"


def test_the_manifest_lists_every_file_with_size_and_blake2b(tmp_path):
    store = CheckpointStore(tmp_path)
    with store.writing(1) as folder:
        (folder / "empty").write_bytes(b"")
    manifest = json.loads((tmp_path / "step-000001" / "manifest.json").read_text())
    assert manifest["files"] == {
        # blake2b with 32 bytes of nothing
        "empty": {"size": 0, "blake2b": "0e5751c026e543b2e8ab2eb06099daa1d1e5df47778f7787faab45cdf12fe3a8"}
    }


def test_only_the_newest_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        write(store, step)
    assert names(tmp_path) == ["latest", "step-000003", "step-000004"]
    assert store.steps() == [3, 4]


def test_nothing_has_the_name_while_it_is_written(tmp_path):
    store = CheckpointStore(tmp_path)
    with store.writing(5) as folder:
        assert folder.name.startswith(".step-000005.partial-")
        assert store.latest() is None
        assert store.problems() == [f"{folder.name}: half-written"]
        RunState(step=5, policy_version=5, data={}).save(folder)
    assert newest(store).step == 5
    assert store.problems() == []


@pytest.mark.parametrize("interruption", [RuntimeError("rank 1 died"), KeyboardInterrupt()])
def test_an_interrupted_one_leaves_nothing_and_the_earlier_stays(tmp_path, interruption):
    store = CheckpointStore(tmp_path)
    write(store, 1)
    with pytest.raises(type(interruption)), store.writing(2) as folder:
        (folder / "half").write_bytes(b"x")
        raise interruption
    assert names(tmp_path) == ["latest", "step-000001"]
    assert newest(store).step == 1


def test_what_a_killed_writer_left_is_never_picked_up_and_goes_with_the_next_write(tmp_path):
    store = CheckpointStore(tmp_path)
    write(store, 1)
    left = tmp_path / ".step-000002.partial-0a1b2c3d"
    shutil.copytree(tmp_path / "step-000001", left)
    assert newest(store).step == 1
    write(store, 3)
    assert names(tmp_path) == ["latest", "step-000001", "step-000003"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "policy/model.bin").write_bytes(b"weightz"), "policy/model.bin: its content is not what was"),
        (lambda f: (f / "policy/model.bin").write_bytes(b"wei"), "policy/model.bin: got 3 bytes, expected 7"),
        (lambda f: (f / "policy/model.bin").unlink(), "policy/model.bin: missing"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json: missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: cannot be read"),
    ],
)
def test_a_damaged_one_is_passed_over_and_its_file_named(tmp_path, damage, message):
    store = CheckpointStore(tmp_path)
    write(store, 1)
    write(store, 2)
    damage(tmp_path / "step-000002")
    assert newest(store).step == 1
    with pytest.raises(CheckpointError, match=message):
        store.open(tmp_path / "step-000002")
    assert len(store.problems()) == 1
    assert store.problems()[0].startswith(f"step-000002: {message}")


def test_a_damaged_one_does_not_push_out_a_whole_one(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    write(store, 1)
    write(store, 2)
    (tmp_path / "step-000002" / "policy" / "model.bin").write_bytes(b"")
    write(store, 3)
    assert store.steps() == [1, 3]


def test_a_run_that_went_back_goes_on_from_what_it_wrote_last(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    write(store, 5)
    write(store, 10)
    write(store, 7)
    assert newest(store).step == 7
    assert store.steps() == [7, 10]


def test_a_kill_before_latest_is_replaced_loses_nothing(tmp_path):
    store = CheckpointStore(tmp_path)
    write(store, 5)
    write(store, 10)
    (tmp_path / "latest").write_text("step-000005\n")
    assert newest(store).step == 10


def test_of_two_written_at_the_same_time_latest_names_the_newest(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1e9)
    store = CheckpointStore(tmp_path)
    write(store, 10)
    write(store, 7)
    assert newest(store).step == 7


def rewrite(folder, change):
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(files=[]), r"got no such values as this version writes for files"),
        (lambda m: m.pop("step"), r"got no such values as this version writes for step"),
        (lambda m: m["files"]["state.json"].pop("blake2b"), r"got no such values .* for state.json"),
        (lambda m: m["files"]["state.json"].update(size="1"), r"got no such values .* for state.json"),
    ],
)
def test_an_odd_manifest_is_a_named_problem_beside_whole_checkpoints(tmp_path, change, message):
    store = CheckpointStore(tmp_path, keep=2)
    write(store, 1)
    write(store, 2)
    rewrite(tmp_path / "step-000002", change)
    assert newest(store).step == 1
    [problem] = store.problems()
    assert problem.startswith("step-000002: manifest.json: cannot be read (") and re.search(message, problem)
    with pytest.raises(CheckpointError, match=message):
        store.open(tmp_path / "step-000002")
    write(store, 3)
    assert newest(store).step == 3


def test_a_checkpoint_of_another_versions_format_is_neither_passed_over_nor_removed(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    write(store, 9)
    rewrite(tmp_path / "step-000009", lambda m: m.update(format=2, files=[]))
    assert "got format 2, expected format 1: take it up with the version that wrote it" in store.problems()[0]
    assert store.latest() is None
    write(store, 3)
    with pytest.raises(CheckpointError, match=r"step-000009: of another version's format, and later than step-000003"):
        store.latest()
    assert store.open(tmp_path / "step-000003").step == 3
    write(store, 4)
    assert store.steps() == [4, 9]


def test_a_clock_that_goes_back_does_not_make_an_older_checkpoint_the_newest(tmp_path, monkeypatch):
    """As of a run that another node, whose clock is five minutes behind, goes on with from step 5."""
    store = CheckpointStore(tmp_path, keep=9)
    write(store, 5)
    write(store, 10)
    monkeypatch.setattr("apportion.platform.checkpoint.time.time", lambda: newest(store).written_at - 300)
    write(store, 7)
    assert newest(store).step == 7


def test_progress_that_a_later_version_added_is_refused_by_name():
    with pytest.raises(CheckpointError) as caught:
        progress_of(RunState(step=1, policy_version=1, data={}, extra={"samples": 8, "tempo": 2}))
    assert str(caught.value).startswith("state.json: got extra values tempo, expected at most accuracy_before, ")
    assert progress_of(RunState(step=1, policy_version=1, data={}, extra={"samples": 8})).samples == 8


def test_a_step_written_again_replaces_the_earlier_one(tmp_path):
    store = CheckpointStore(tmp_path)
    write(store, 5, b"old")
    write(store, 5, b"new")
    assert (newest(store).path / "policy" / "model.bin").read_bytes() == b"new"
    assert names(tmp_path) == ["latest", "step-000005"]


def test_a_step_written_again_is_never_missing_on_the_way(tmp_path, monkeypatch):
    store, seen = CheckpointStore(tmp_path), []
    write(store, 5, b"old")
    monkeypatch.setattr("apportion.platform.checkpoint.sync_to_disk", lambda path: seen.append(newest(store).step))
    monkeypatch.setattr("pathlib.Path.rename", lambda *paths: pytest.fail("two renames where one exchange would do"))
    write(store, 5, b"new")
    assert set(seen) == {5} and (newest(store).path / "policy" / "model.bin").read_bytes() == b"new"


def test_where_names_cannot_be_exchanged_a_step_written_again_replaces_the_earlier_one_too(tmp_path, monkeypatch):
    monkeypatch.setattr("apportion.platform.checkpoint.exchange", lambda first, second: False)
    store = CheckpointStore(tmp_path)
    write(store, 5, b"old")
    write(store, 5, b"new")
    assert (newest(store).path / "policy" / "model.bin").read_bytes() == b"new"
    assert names(tmp_path) == ["latest", "step-000005"]


def test_the_store_knows_which_step_this_process_wrote_last(tmp_path):
    write(CheckpointStore(tmp_path), 8)
    store = CheckpointStore(tmp_path)
    assert store.current is None
    write(store, 3)
    with pytest.raises(RuntimeError), store.writing(4):
        raise RuntimeError("rank 1 died")
    assert store.current == 3


def test_a_full_disk_is_one_line_and_the_earlier_checkpoint_stays(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    write(store, 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(CheckpointError) as caught, store.writing(2) as folder:
        (folder / "model.bin").write_bytes(b"x" * 100)
        # The device answers every write as a full disk does.
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")
    message = str(caught.value)
    taken = sum(file.stat().st_size for file in (tmp_path / "step-000001").rglob("*") if file.is_file())
    assert message.startswith(
        f"checkpoint of step 2: the disk of {tmp_path} is full: needed {taken} bytes, free 10 bytes"
    )
    assert "\n" not in message
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC
    assert names(tmp_path) == ["latest", "step-000001"]
    assert newest(store).step == 1


def test_a_disk_that_fills_while_the_manifest_is_written_is_explained_too(tmp_path, monkeypatch):
    def full(file, text):
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2))
        raise OSError(errno.ENOSPC, "No space left on device")

    store = CheckpointStore(tmp_path)
    monkeypatch.setattr("apportion.platform.checkpoint.write_text_atomically", full)
    with pytest.raises(CheckpointError, match="needed more than 3 bytes"), store.writing(1) as folder:
        (folder / "model.bin").write_bytes(b"abc")
    assert names(tmp_path) == []


def test_a_disk_that_another_process_found_full_is_explained_too(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="the disk of"), store.writing(1):
        raise RuntimeError("rank 0: SafetensorError: I/O error: No space left on device (os error 28)")


def test_a_writer_that_meets_a_full_disk_and_speaks_of_something_else_is_explained_too(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="needed more than 100 bytes, free 100 bytes"), store.writing(1) as folder:
        (folder / "half").write_bytes(b"half")
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
        raise RuntimeError("unexpected pos 576 vs 534")
    assert names(tmp_path) == []


def test_a_disk_too_small_is_found_before_anything_is_written(tmp_path):
    store = CheckpointStore(tmp_path)
    entered = []
    with pytest.raises(CheckpointError, match=f"needed {2**60} bytes, free"), store.writing(1, needed_bytes=2**60):
        entered.append(True)
    assert entered == []
    assert names(tmp_path) == []


def test_a_root_that_is_not_there_has_no_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path / "none")
    assert store.latest() is None
    assert store.problems() == [] and store.steps() == []


def test_the_state_of_another_format_is_refused(tmp_path):
    RunState(step=1, policy_version=1, data={}).save(tmp_path)
    read = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**read, "format": 99}))
    with pytest.raises(CheckpointError, match="got format 99"):
        RunState.load(tmp_path)
    del read["seeds"]
    (tmp_path / "state.json").write_text(json.dumps(read))
    with pytest.raises(CheckpointError, match=r"fields that differ: seeds"):
        RunState.load(tmp_path)


def test_a_number_that_is_not_known_is_null_in_the_state_and_read_as_none(tmp_path):
    extra = {"accuracy": float("nan"), "answers": [{"reward": float("nan")}, {"reward": 1.0}], "best": float("inf")}
    RunState(step=1, policy_version=1, data={}, extra=extra).save(tmp_path)
    read = RunState.load(tmp_path).extra
    assert read == {"accuracy": None, "answers": [{"reward": None}, {"reward": 1.0}], "best": None}


def test_the_state_keeps_every_field(tmp_path):
    state = RunState(
        step=3,
        policy_version=4,
        data={"epoch": 1, "order": [2, 0, 1]},
        seeds={"sampling": 2**63 + 1},
        trackers={"wandb": {"run_id": "ab12"}},
        kl={"coefficient": 0.05},
        extra={"note": "x"},
        ranks={"policy": {"ranks": 2, "lora": None}},
    )
    state.save(tmp_path)
    assert RunState.load(tmp_path) == state


def test_the_state_of_a_version_that_did_not_say_its_ranks_is_read(tmp_path):
    RunState(step=3, policy_version=4, data={}).save(tmp_path)
    read = json.loads((tmp_path / "state.json").read_text())
    del read["ranks"]
    (tmp_path / "state.json").write_text(json.dumps(read))
    assert RunState.load(tmp_path) == RunState(step=3, policy_version=4, data={}, ranks={})


def test_random_states_go_on_where_they_were(tmp_path):
    own = np.random.default_rng(5)
    random.gauss(0, 1)  # leaves a second value waiting inside the generator
    np.random.normal()
    file = save_random_states(tmp_path, "policy-rank-0", {"order": own})

    def draw():
        return random.gauss(0, 1), random.random(), np.random.normal(), torch.rand(2).tolist(), own.random()

    expected = draw()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    other = draw()
    assert other != expected
    load_random_states(tmp_path, "policy-rank-0", {"order": own})
    assert draw() == expected
    with np.load(file, allow_pickle=False) as arrays:
        assert all(arrays[key].dtype != object for key in arrays.files)


def test_random_states_with_other_generators_are_refused(tmp_path):
    save_random_states(tmp_path, "driver", {"order": np.random.default_rng(0)})
    with pytest.raises(CheckpointError, match=r"generators differ \(order\)"):
        load_random_states(tmp_path, "driver")
    with pytest.raises(CheckpointError, match="expected the random states of rank-9"):
        load_random_states(tmp_path, "rank-9")
