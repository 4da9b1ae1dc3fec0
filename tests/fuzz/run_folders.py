"""Run folders with one or two kinds of damage, and commands that take them up, without Ray."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from apportion.cli import compose_config, to_config
from apportion.conf.layout import check_layout, layout_of
from apportion.edges import refusals
from apportion.loop.resume import check_steps_left, kept, progress_of
from apportion.loop.state import Progress
from apportion.platform.checkpoint import Checkpoint, CheckpointStore, RunState
from apportion.platform.run_lock import held
from apportion.platform.runs import RunFolder, find_checkpoint, named_run, run_of
from apportion.platform.tracking import JsonlTracker
from apportion.preference_trainer import cautions, check_position, total_steps

COMMANDS = (
    ["show", "given"], ["plan", "resume=given"], ["train", "resume=given"], ["evaluate", "given"],
    ["evaluate", "runs/given/checkpoints/step-000002"], ["train", "resume=runs/given/checkpoints/step-000004"],
    ["plan", "resume=given", "trust_run=true"], ["train", "resume=given", "trust_run=true"], ["evaluate", "given", "trust_run=true"],
)  # fmt: skip
STAGE = "sft run_name=given model.path=builtin:tiny data.train=pairs.jsonl"  # as a recipe's `before` has it
STAGE_COMMANDS = (
    ["show", "given"], ["sft", "resume=given"], ["sft", "resume=given", "train.epochs=2"], ["sft", "resume=given", "trust_run=true"], ["train", "resume=given"],
    ["train", "experiment=tiny_grpo", f"before=['{STAGE}']"],
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 1e308, 10**400, float("nan"), float("inf"), "", "x", "../../x", "\x1b]0;owned\x07", "\u202e", "\ud83d",
    "\0", "y" * 5000, [], {}, [[]], [None], {"a": 1}, {"": {}}, 2**63, 2**70, "${seed}", "1e5", "~nobody_here", "/etc/passwd",
)  # fmt: skip
YAML_TEXTS = (
    "", "null\n", "[]\n", "a: b: c\n", "\t", "%", "*a", "&a [*a]\n", "a: &a {b: *a}\n", "<<: 1\n", "? [a]\n: b\n", "- " * 3000,
    "[" * 3000 + "]" * 3000, "{a: " * 3000, "a: !!python/object/apply:os.system ['true']\n", "a: !!binary '*'\n", "1: 2\n",
    "a: 2024-13-45\n", "a: " + "9" * 5000 + "\n", "seed: 0x\n", "seed: 1\nseed: 2\n", "\ufeffseed: 1\n", "seed: 1\n---\nseed: 2\n",
    "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{','.join(['*a' + str(i - 1)] * 10)}]\n" for i in range(1, 6)),
    "b0: &b0 {x: 1}\n" + "".join(f"b{i}: &b{i}\n  <<: [{','.join(['*b' + str(i - 1)] * 10)}]\n" for i in range(1, 9)),
    "recipe: \"\\e]0;owned\\a\"\n", "train: 5\n", "before: [{}]\n", "model: {path: [a]}\n", "x: 1\n", "? ~\n: 1\n", "a: =\n",
)  # fmt: skip


def make_run(folder: Path) -> None:
    """A whole run with two checkpoints. The working folder is where `runs` is."""
    resolved = to_config(compose_config(["experiment=tiny_grpo", "train.steps=9"]))[1]
    data = {"seed": 0, "shuffle": True, "sources": 1, "0.drawn": 8, "0.epoch": 0, "0.place": 8, "0.rows": 100}
    extras = [
        kept(Progress(step=step, answers_before=[{"prompt": "p"}], stage_seconds={"rollout": 1.0})) for step in STEPS
    ]
    _write_run(folder, resolved, data, extras)
    sample = {
        "step": 1, "prompt": "1+1?", "response": "ab", "reward": 1.0, "finish_reason": "stop", "policy_version": 0,
        "tokens": ["a", "b"], "advantages": [0.5, -1.0], "wrong_steps": [0], "critiques": [{"failure": "", "answer": "no"}],
    }  # fmt: skip
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample | {"step": step}) + "\n" for step in (1, 2, 3)))
    (folder / "tokens.html").write_text("<p>of an earlier show</p>")


def make_stage_run(folder: Path) -> None:
    """A whole run of a preference stage that a recipe has started before itself."""
    words = STAGE.split()[1:]
    resolved = to_config(compose_config(words, stage="sft"))[1]
    extras = [{"examples": 8, "before": {"eval/loss": 2.0}, "metrics": {"train/loss": 1.0}} for _ in STEPS]
    _write_run(folder, resolved, POSITION | {"digest": 5}, extras)
    (folder / "before.json").write_text(json.dumps({"words": STAGE.split()}))


STEPS = (2, 4)  # of the checkpoints
POSITION = {"examples": 40, "batch_size": 8, "seed": 0, "shuffle": True}


def _write_run(folder: Path, resolved: Any, data: dict[str, Any], extras: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    run = RunFolder(folder)
    run.save_config(resolved)
    run.write_summary({"steps": 9})
    for step, extra in zip(STEPS, extras, strict=True):
        with CheckpointStore(run.checkpoints).writing(step) as inner:
            (inner / "policy").mkdir()
            (inner / "policy" / "model.bin").write_bytes(b"weights" * 9)
            RunState(
                step, step, data, {"sampling": 1}, {"jsonl": {}}, {"coefficient": 0.1}, extra, {"policy": {"ranks": 1}}
            ).save(inner)
    lines = [{"step": step, "time": 1.5, "reward/mean": 0.5, "warnings": ["w"]} for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "logs").mkdir()
    (folder / "logs" / "policy-0.log").write_text("started\n")
    with held(folder):  # leaves its file
        pass


def damaged(whole: Path, folder: Path, seed: int) -> list[str]:
    """Copy the run `given` or `stage` in `whole` and damage it as case `seed` says; the command that takes it up."""
    draw = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    stage = draw.random() < 0.3
    shutil.copytree(whole / ("stage" if stage else "given"), folder)
    for _ in range(draw.choice((1, 1, 2))):
        files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
        favored = [file for file in files if file.suffix in (".yaml", ".json", ".jsonl")]
        file = draw.choice(favored * 3 + files)
        _damage(draw, file)
        if draw.random() < 0.7 and file.name == "state.json":
            _write_digest(file)
    return draw.choice(STAGE_COMMANDS if stage else COMMANDS)


def _damage(draw: random.Random, file: Path) -> None:
    if file.suffix in (".json", ".jsonl") and draw.random() < 0.6:
        _change_json(draw, file)
    elif file.suffix == ".yaml" and draw.random() < 0.75:
        _change_yaml(draw, file)
    else:
        draw.choice(_DAMAGES)(draw, file)


def _change_json(draw: random.Random, file: Path) -> None:
    lines = (
        file.read_text(errors="replace").splitlines() if file.suffix == ".jsonl" else [file.read_text(errors="replace")]
    )
    at = draw.randrange(len(lines)) if lines else 0
    with contextlib.suppress(ValueError, IndexError):
        value = json.loads(lines[at])
        lines[at] = json.dumps(draw.choice(ODD) if draw.random() < 0.15 else _changed(draw, value))
        file.write_text("\n".join(lines) + "\n")


def _change_yaml(draw: random.Random, file: Path) -> None:
    import yaml

    text = file.read_text(errors="replace")
    if draw.random() < 0.5:
        file.write_text(draw.choice(YAML_TEXTS) if draw.random() < 0.5 else text + draw.choice(YAML_TEXTS))
        return
    with contextlib.suppress(yaml.YAMLError, ValueError):
        file.write_text(yaml.safe_dump(_changed(draw, yaml.safe_load(text))))


def _changed(draw: random.Random, value: Any) -> Any:
    """The value with one part of it replaced, removed, added or repeated."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.15:
            return {key: inner for key, inner in value.items() if key != name}
        if kind < 0.25:
            return value | {draw.choice(("x", "", "step", "0.place", "format")): draw.choice(ODD)}
        return value | {name: _changed(draw, value[name])}
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return draw.choice((value[:at], value + value, [*value[:at], _changed(draw, value[at]), *value[at + 1 :]]))
    return draw.choice(ODD)


def _cut(draw: random.Random, file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: draw.randrange(len(data) + 1)])


def _flip(draw: random.Random, file: Path) -> None:
    data = bytearray(file.read_bytes() or b"x")
    for _ in range(draw.choice((1, 3, 30))):
        data[draw.randrange(len(data))] = draw.randrange(256)
    file.write_bytes(data)


def _replace(draw: random.Random, file: Path) -> None:
    nested = "[" * 100_000 + "]" * 100_000
    file.write_bytes(
        draw.choice((b"", b"\0" * 50, b"\xff\xfe", b"null", b"[]", b'"x"', b"9" * 5000, nested.encode(), b"{}\n{}"))
    )


def _remove(draw: random.Random, file: Path) -> None:
    file.unlink()


def _folder(draw: random.Random, file: Path) -> None:
    file.unlink()
    file.mkdir()


def _pipe(draw: random.Random, file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _link(draw: random.Random, file: Path) -> None:
    target = draw.choice(("nowhere", file.name, "/dev/zero", "/dev/null", "/etc/hostname", "..", "summary.json"))
    file.unlink()
    file.symlink_to(target)


def _other_step(draw: random.Random, file: Path) -> None:
    for checkpoint in sorted(_given(file).glob("checkpoints/step-*"))[:1]:
        checkpoint.rename(
            checkpoint.with_name(draw.choice(("step-000099", "step-999999999999", ".step-000002.partial-00")))
        )


def _link_in_place(draw: random.Random, file: Path) -> None:
    """Where a run would write: what is there is replaced by a link to a file of somebody's."""
    run = _given(file)
    names = (
        "tokens.html",
        "metrics.jsonl",
        "samples.jsonl",
        ".lock",
        "checkpoints/latest",
        "summary.json",
        "config.yaml",
    )
    name = draw.choice(names)
    (run / name).unlink(missing_ok=True)
    if (run / name).parent.is_dir():
        (run / name).symlink_to(run.parent.parent / "precious.txt")


def _given(file: Path) -> Path:
    return next(folder for folder in file.parents if folder.name == "given")


def _write_digest(state: Path) -> None:
    """Make the manifest fit a changed state: who made the folder could."""
    manifest = state.parent / "manifest.json"
    if not (state.is_file() and manifest.is_file()) or manifest.is_symlink():
        return
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        read = json.loads(manifest.read_text())
        data = state.read_bytes()
        read["files"]["state.json"] = {"size": len(data), "blake2b": hashlib.blake2b(data, digest_size=32).hexdigest()}
        manifest.write_text(json.dumps(read))


_DAMAGES: tuple[Callable[[random.Random, Path], None], ...] = (
    _cut, _flip, _replace, _remove, _folder, _pipe, _link, _other_step, _link_in_place,
)  # fmt: skip


def take_up(config: Any, resolved: Any) -> int:
    """What `train` does with the folder that it resumes before anything is started, and what it writes at the end."""
    if config.resume is None:
        return 0
    with refusals(), held(named_run(config.resume, config.runs_folder)):
        checkpoint = find_checkpoint(config.resume, config.runs_folder)
        check_layout(checkpoint.path, layout_of(config))
        check_steps_left(checkpoint.state, config.train.steps, run_of(checkpoint).path)
        _go_on(checkpoint, progress_of(checkpoint.state).step, resolved)
    return 0


def take_up_stage(config: Any, resolved: Any) -> int:
    """The same of a preference stage, whose examples are those of `make_stage_run`."""
    if config.resume is None:
        return 0
    settings: Any = SimpleNamespace(batch_size=8, steps=9, seed=0, shuffle=True)
    examples: Any = Examples()
    with refusals(), held(named_run(config.resume, config.runs_folder)):
        checkpoint = find_checkpoint(config.resume, config.runs_folder)
        check_layout(checkpoint.path, layout_of(config))
        check_position(settings, examples, checkpoint.state)
        check_steps_left(checkpoint.state, total_steps(settings, len(examples)), run_of(checkpoint).path)
        cautions(checkpoint.state)
        _go_on(checkpoint, checkpoint.step, resolved)
    return 0


class Examples:
    digest = 5

    def __len__(self) -> int:
        return int(POSITION["examples"])


def _go_on(checkpoint: Checkpoint, step: int, resolved: Any) -> None:
    folder = run_of(checkpoint)
    tracker = JsonlTracker(folder.path, checkpoint.step)
    tracker.log(step + 1, {"reward/mean": 0.5})
    tracker.warn("late")
    tracker.close()
    folder.save_config(resolved)
    folder.write_summary({"steps": step})
    with CheckpointStore(folder.checkpoints).writing(step + 1) as inner:
        checkpoint.state.save(inner)


def evaluate(config: Any, argument: str) -> int:
    with refusals():
        progress_of(find_checkpoint(argument, config.runs_folder).state)
    return 0
