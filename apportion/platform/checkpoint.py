"""Checkpoint folders: whole or not there. Their layout is in docs/checkpoints.md; what the ranks put in is theirs.

A checkpoint is written into a hidden folder, its files are forced to disk, a manifest with the size and blake2b of each
is added, and only then the folder gets its name. Nothing here is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.platform.errors import CheckpointError
from apportion.platform.files import exchange, sync_to_disk, write_text_atomically
from apportion.platform.foreign import read_json, read_text
from apportion.platform.run_state import FORMAT, STATE_FILE, RunState, is_count, is_number

__all__ = ["Checkpoint", "CheckpointStore", "RunState", "problem_of"]

MANIFEST_FILE = "manifest.json"
LATEST_FILE = "latest"
FOLDER_PATTERN = re.compile(r"step-(\d{6,})")
_LEFTOVER = re.compile(r"\.step-\d+\.(partial|replaced)-[0-9a-f]+")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    path: Path
    step: int
    written_at: float  # Unix seconds

    @property
    def state(self) -> RunState:
        return RunState.load(self.path)


class CheckpointStore:
    """The checkpoints of one run, in `root`; `keep` newest ones stay.

    "Newest" is by when they were written: a run resumed from step 5 whose folder still holds step 10 of its earlier
    life goes on from what it wrote last. On several nodes `root` must be a folder that all of them share.
    `current` is the step of the checkpoint that this process wrote last, or that its user has taken up (None: neither).
    """

    def __init__(self, root: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise CheckpointError(f"checkpoint.keep: got {keep}, expected at least 1")
        self.root = Path(root)
        self.keep = keep
        self.current: int | None = None
        self.skipped: list[str] = []  # by the last search: each later checkpoint that is not whole, and why

    @contextlib.contextmanager
    def writing(self, step: int, needed_bytes: int | None = None) -> Iterator[Path]:
        """A folder to fill; when the block ends it becomes `step-NNNNNN`, and `latest`. If it raises, nothing stays.

        With `needed_bytes` a disk that is too small is found before anything is written. A full disk, wherever the
        writing met it, is a CheckpointError with needed and free bytes; earlier checkpoints are untouched.
        """
        with self._disk_full_explained(step, needed_bytes, None):
            self.root.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            if needed_bytes is not None and shutil.disk_usage(self.root).free < needed_bytes:
                raise OSError(errno.ENOSPC, "No space left on device")
            partial = self.root / f".step-{step:06d}.partial-{secrets.token_hex(4)}"
            partial.mkdir()
        try:
            with self._disk_full_explained(step, needed_bytes, partial):
                yield partial
                # A clock that goes back, or another node's, must not make an older checkpoint the newest.
                _write_manifest(
                    partial, step, max([_written_at(f) for f in self._folders_newest_first()[:1]], default=0.0)
                )
                self._publish(partial, step)
        finally:
            # Published, it is gone under this name, or an earlier checkpoint of the same step stands here.
            shutil.rmtree(partial, ignore_errors=True)
        self.current = step
        self._retain(step)

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None. Broken ones are skipped: `skipped` and `problems` say which and why."""
        folder = self._newest(problem_of)
        if folder is None:
            return None
        self._refuse_later_format(folder)
        return _checkpoint(folder)

    def newest_by_size(self) -> Path | None:
        """As `latest`, but files are only counted and measured."""
        return self._newest(_size_problem)

    def _newest(self, problem: Callable[[Path], str | None]) -> Path | None:
        self.skipped = []
        folders = self._folders_newest_first()
        for index, folder in enumerate(folders):
            found = problem(folder)
            if found is None:
                # One without a readable manifest has no time, and comes last whatever its step is.
                later = [f for f in folders[index + 1 :] if _step_of(f) > _step_of(folder)]
                self.skipped += [f"{f.name}: {found}" for f in later if (found := _size_problem(f)) is not None]
                return folder
            self.skipped.append(f"{folder.name}: {found}")
        return None

    def _refuse_later_format(self, chosen: Path) -> None:
        """A later checkpoint that this version cannot read is not passed over: the run would go on from long before it."""
        later = [f for f in self._folders_newest_first() if _of_another_format(f) and _step_of(f) > _step_of(chosen)]
        if later:
            raise CheckpointError(
                f"{later[0]}: of another version's format, and later than {chosen.name}, the last that this version reads; "
                f"resume with the version that wrote it, or name {chosen} to go back to it"
            )

    def open(self, path: str | Path) -> Checkpoint:
        """The checkpoint at `path`, checked byte by byte; CheckpointError names a file that is not as written."""
        folder = Path(path)
        problem = problem_of(folder)
        if problem:
            raise CheckpointError(f"{folder}: {problem}; expected a whole checkpoint: take another one")
        return _checkpoint(folder)

    def problems(self) -> list[str]:
        """One line for everything in `root` that looks like a checkpoint and is not a whole one."""
        if not self.root.is_dir():
            return []
        found = [
            f"{entry.name}: half-written" for entry in sorted(self.root.iterdir()) if _LEFTOVER.fullmatch(entry.name)
        ]
        checked = ((folder, problem_of(folder)) for folder in self._folders_newest_first())
        return found + [f"{folder.name}: {problem}" for folder, problem in checked if problem]

    def steps(self) -> list[int]:
        """Steps that have a folder, rising; not checked for being whole."""
        return sorted(_step_of(folder) for folder in self._folders_newest_first())

    def _folders_newest_first(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        folders = [entry for entry in self.root.iterdir() if FOLDER_PATTERN.fullmatch(entry.name) and entry.is_dir()]
        # A kill may come between a checkpoint and `latest`, so that what it names only decides between equal times.
        pointed = self._pointed()
        return sorted(folders, key=lambda f: (_written_at(f), f.name == pointed, _step_of(f)), reverse=True)

    def _pointed(self) -> str | None:
        with contextlib.suppress(OSError, ValueError):  # it only decides between equal times
            return read_text(self.root / LATEST_FILE, 1024).strip()
        return None

    def _publish(self, partial: Path, step: int) -> None:
        final = self.root / f"step-{step:06d}"
        if not (final.exists() and exchange(partial, final)):
            if final.exists():
                final.rename(self.root / f".{final.name}.replaced-{secrets.token_hex(4)}")
            partial.rename(final)
        sync_to_disk(self.root)
        write_text_atomically(self.root / LATEST_FILE, final.name + "\n")

    def _retain(self, step: int) -> None:
        self._remove_leftovers()
        newest = f"step-{step:06d}"
        others = [folder for folder in self._folders_newest_first() if folder.name != newest]
        # Another version's are not known to be broken: not ours to remove.
        others = [folder for folder in others if not _of_another_format(folder)]
        # A broken folder must not take a place that a whole one could have.
        whole = [folder for folder in others if _size_problem(folder) is None]
        for folder in others:
            if folder not in whole[: self.keep - 1]:
                _remove(folder)

    def _remove_leftovers(self) -> None:
        for entry in self.root.iterdir():
            if _LEFTOVER.fullmatch(entry.name):
                _remove(entry)

    @contextlib.contextmanager
    def _disk_full_explained(self, step: int, needed: int | None, partial: Path | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not (_is_disk_full(error) or self._nothing_free()):
                raise
            written = _bytes_in(partial) if partial is not None else 0
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(self._disk_full_message(step, needed, written)) from error

    def _nothing_free(self) -> bool:
        """Some writers (torch.save) meet a full disk and speak of something else."""
        return self.root.exists() and shutil.disk_usage(self.root).free < 65536

    def _disk_full_message(self, step: int, needed: int | None, written: int) -> str:
        if needed is None:
            needed = max((_bytes_in(folder) for folder in self._folders_newest_first()[:1]), default=0)
        where = self.root if self.root.exists() else self.root.parent
        free = shutil.disk_usage(where).free
        # An earlier checkpoint's size is a guess at this one's; what did not fit is a better one.
        wanted = f"{needed} bytes" if needed > max(written, free) else f"more than {max(written, free)} bytes"
        return (
            f"checkpoint of step {step}: the disk of {where} is full: needed {wanted}, free {free} bytes; "
            "earlier checkpoints are untouched: free some space, lower checkpoint.keep or choose another runs_folder"
        )


def problem_of(folder: Path) -> str | None:
    """Why `folder` is not a whole checkpoint, naming the file; None if it is one. Reads every byte."""
    problem = _size_problem(folder)
    if problem:
        return problem
    listed = _read_manifest(folder)["files"]
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(lambda name: _digest(folder / name), listed))
    for (name, entry), digest in zip(listed.items(), digests, strict=True):
        if digest != entry["blake2b"]:
            return f"{name}: its content is not what was written (blake2b differs)"
    return None


def _size_problem(folder: Path) -> str | None:
    """The quick part of `problem_of`: names and sizes."""
    if not folder.is_dir():
        return "not a folder"
    try:
        listed = _read_manifest(folder)["files"]
    except FileNotFoundError:
        return f"{MANIFEST_FILE}: missing"
    except (OSError, ValueError) as error:
        return f"{MANIFEST_FILE}: cannot be read ({error})"
    for name, entry in listed.items():
        file = folder / name
        if not file.is_file():
            return f"{name}: missing"
        if file.stat().st_size != entry["size"]:
            return f"{name}: got {file.stat().st_size} bytes, expected {entry['size']}"
    return None


def _write_manifest(folder: Path, step: int, after: float) -> None:
    """`after`: Unix seconds, of the newest checkpoint that there is."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(_digest, files))
    listed = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "blake2b": digest}
        for file, digest in zip(files, digests, strict=True)
    }
    for file in files:
        sync_to_disk(file)
    manifest = {"format": FORMAT, "step": step, "written_at": max(time.time(), after + 1e-3), "files": listed}
    write_text_atomically(folder / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")
    for inner in [entry for entry in folder.rglob("*") if entry.is_dir()]:
        sync_to_disk(inner)
    sync_to_disk(folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """ValueError for one that this version does not read."""
    manifest = read_json(folder / MANIFEST_FILE)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise ValueError(f"got format {found}, expected format {FORMAT}: take it up with the version that wrote it")
    fits = {
        "step": is_count(manifest.get("step")),
        "written_at": is_number(manifest.get("written_at")),
        "files": isinstance(manifest.get("files"), dict),
    }
    odd = [key for key, fit in fits.items() if not fit]
    if not odd:
        odd = [name for name, entry in manifest["files"].items() if not _is_entry(name, entry)]
    if odd:
        raise ValueError(f"got no such values as this version writes for {', '.join(odd)}")
    if STATE_FILE not in manifest["files"]:
        raise ValueError(f"it lists {len(manifest['files'])} files and no {STATE_FILE} among them")
    if manifest["step"] != _step_of(folder):
        raise ValueError(f"it is of step {manifest['step']}, and the folder of step {_step_of(folder)}")
    return manifest


def _is_entry(name: str, entry: Any) -> bool:
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name
    return inside and isinstance(entry, dict) and is_count(entry.get("size")) and isinstance(entry.get("blake2b"), str)


def _remove(folder: Path) -> None:
    if folder.is_symlink():  # what it leads to is not ours to remove
        folder.unlink()
    else:
        shutil.rmtree(folder)


def _of_another_format(folder: Path) -> bool:
    try:
        manifest = read_json(folder / MANIFEST_FILE)
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") != FORMAT


def _checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder, _read_manifest(folder)["step"], _written_at(folder))


def _written_at(folder: Path) -> float:
    try:
        return float(_read_manifest(folder)["written_at"])
    except (OSError, ValueError):
        return 0.0  # broken: after every whole one; `problem_of` says what is wrong with it


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _is_disk_full(error: BaseException | None) -> bool:
    """Also where a library or another process has wrapped it: by cause, or by the operating system's words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
