"""The command line: compose one typed Config, hand it to what runs it, turn every error into one line and an exit code.

Exit codes: 0 done, 1 the run failed, 2 the configuration or the command is wrong, 130 interrupted. Nothing heavy is
imported before a configuration has been found sound.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apportion import __version__
from apportion.conf.switches import split as switches_of
from apportion.edges import system_errors, tell, unsaved_sweeps
from apportion.platform.errors import ApportionError, ConfigError, nearest
from apportion.platform.known_secrets import learned
from apportion.platform.messages import mask_secrets, say
from apportion.platform.process import working_folder_last
from apportion.platform.teardown import leave
from apportion.saved import (
    SavedRun,
    evaluated,
    no_such_run,
    open_saved,
    refuse_redacted,
    resumed,
    saved_config,
    value_of,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from apportion.conf.preference_schema import PreferenceConfig
    from apportion.conf.schema import Config

FAILED, USAGE, INTERRUPTED = 1, 2, 130

Run = Callable[[Any, dict[str, Any]], int]  # (the typed configuration, the same as a plain dict) -> exit code


@dataclass(frozen=True)
class Command:
    """One word of the command line: what it is for, and what runs the words after it."""

    summary: str
    run: Callable[[list[str]], int]


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    return leave(_main(arguments))


def _main(arguments: list[str] | None) -> int:
    words = mask_secrets(sys.argv[1:] if arguments is None else arguments)
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            say(_usage())
            return 0
        if words[0] in ("-V", "--version"):
            say(f"apportion {__version__}")
            return 0
        working_folder_last()
        command = COMMANDS.get(words[0])
        if command is None:
            known = ", ".join(COMMANDS) + nearest(words[0], COMMANDS)
            raise ConfigError(f"command: got {words[0]!r}, expected one of {known}")
        with system_errors():
            return command.run(words[1:])
    except ApportionError as error:
        return _report(error)
    except KeyboardInterrupt:
        say("interrupted", sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone (| head): this keeps the last flush quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _usage() -> str:
    lines = ["apportion: reinforcement learning of language models with credit for every token", "", "commands:"]
    lines += [f"  {name:<12} {command.summary}" for name, command in COMMANDS.items()]
    lines += [
        "\nexamples:",
        "  apportion train experiment=quickstart",
        "  apportion train experiment=quickstart algorithm=rloo rollout.responses_per_prompt=16",
        "  apportion train experiment=quickstart -m algorithm=grpo,rloo seed=0,1",
        "  apportion plan experiment=quickstart cluster.policy_ranks=2",
        "  apportion plan experiment=gsm8k --gpus 2x8x80   (a machine you do not have: nodes x GPUs x GB)",
        "  apportion evaluate runs/NAME evaluation.samples=8 evaluation.k=[1,8]",
        "  apportion show NAME",
        "  apportion dpo model.path=MODEL data.train=pairs.jsonl.gz data.eval_share=0.05 dpo.beta=0.1",
        "",
        "apportion train --help lists every value; --cfg job prints the composed configuration",
    ]
    return "\n".join(lines)


def _report(error: ApportionError) -> int:
    tell(error)
    return USAGE if isinstance(error, ConfigError) else FAILED


# --- commands ---


def _train(words: list[str]) -> int:
    def run(config: Config, resolved: dict[str, Any]) -> int:
        from apportion.before import run_before
        from apportion.conf.devices import check_free
        from apportion.plan import make_plan

        check_free(config, make_plan(config).gpus)  # what cannot run is refused before anything heavy is imported
        _check_stages(config)
        run_before(config)
        from apportion.build import train

        return train(config, resolved)

    return _with_hydra("train", words, run, base=resumed(words))


def _plan(words: list[str]) -> int:
    from apportion.conf.machine import take_described

    machine, words = take_described(words)

    def run(config: Config, resolved: dict[str, Any]) -> int:
        from apportion.plan import make_plan

        plan = make_plan(config, machine)
        _check_stages(config)
        say(plan.render())
        return 0

    return _with_hydra("plan", words, run, base=resumed(words))


def _check_stages(config: Config) -> None:
    """A misspelt key of a stage in `before` is found now, not when the stages before it have been trained. A resumed
    run runs none of them."""
    from apportion.conf.before import stages

    if config.resume is not None:
        return
    for stage in stages(config):
        switches, overrides = switches_of(stage.words[0], stage.words[1:])
        if switches:  # --config-dir and the like are for the stage's own process
            continue
        try:
            to_config(compose_config(overrides, stage=stage.words[0].replace("-", "_")))
        except ConfigError as error:
            raise ConfigError(f"before: {stage.run_name}: {error}") from error


def _evaluate(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        say("usage: apportion evaluate CHECKPOINT_OR_RUN [KEY=VALUE ...]")
        return 0
    if not words or words[0].startswith("-") or ("=" in words[0] and not Path(words[0]).exists()):
        got = repr(words[0]) if words else "nothing"
        raise ConfigError(f"evaluate: got {got}, expected apportion evaluate CHECKPOINT_OR_RUN [KEY=VALUE ...]")
    checkpoint, overrides = words[0], words[1:]
    base = evaluated(checkpoint, overrides)

    def run(config: Config, resolved: dict[str, Any]) -> int:
        from apportion.build import evaluate

        return evaluate(config, checkpoint)

    return _with_hydra("evaluate", overrides, run, base)


def _show(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        say("usage: apportion show RUN [runs_folder=FOLDER]")
        return 0
    names = [word for word in words if not word.startswith(("-", "runs_folder="))]
    if len(names) != 1 or len(words) > 2:
        raise ConfigError(f"show: got {' '.join(words) or 'nothing'}, expected apportion show RUN [runs_folder=FOLDER]")
    runs = value_of("runs_folder", words) or "runs"
    saved = saved_config(names[0], runs)
    if saved is None:
        raise no_such_run("show", names[0], runs)
    from apportion.platform.token_page import write_token_page

    say(str(write_token_page(saved.parent)))
    return 0


def _doctor(words: list[str]) -> int:
    if words:
        raise ConfigError(f"doctor: got {words[0]!r}, expected nothing after it")
    from apportion.doctor import examine, render

    findings = examine()
    say(render(findings))
    return FAILED if any(finding.level == "fail" for finding in findings) else 0


def _stage(stage: str) -> Callable[[list[str]], int]:
    """The command of a preference stage (a key of conf.preference_schema.STAGES)."""

    def command(words: list[str]) -> int:
        def run(config: PreferenceConfig, resolved: dict[str, Any]) -> int:
            from apportion.conf.preference_schema import check

            check(config)
            from apportion.preference_build import train

            return train(config, resolved)

        return _with_hydra(stage.replace("_", "-"), words, run, base=resumed(words, stage), stage=stage)

    return command


COMMANDS: dict[str, Command] = {
    "train": Command("train a model", _train),
    "evaluate": Command("measure a checkpoint or a run on held-out prompts", _evaluate),
    "plan": Command("print batch sizes, placement and memory of a run without starting it", _plan),
    "show": Command("write a page of a run's samples with each token's credit", _show),
    "sft": Command("fine-tune a model on demonstrations", _stage("sft")),
    "reward-model": Command("train a reward model on pairs of answers", _stage("reward_model")),
    "dpo": Command("train a model on pairs of answers directly", _stage("dpo")),
    "doctor": Command("check this machine and say how to fix what is wrong", _doctor),
}


# --- hydra ---


def to_config(composed: DictConfig) -> tuple[Any, dict[str, Any]]:
    """The typed configuration and the same as a plain dict. ConfigError for what the schema refuses."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from apportion.conf import explain
    from apportion.conf.checks import check_finite
    from apportion.conf.schema import Config
    from apportion.conf.shapes import check_shape

    try:
        explain.check_keys(composed)
        resolved: Any = learned(OmegaConf.to_container(composed, resolve=True))
        check_shape(resolved, OmegaConf.get_type(composed) or Config)
        explain.missing_values(composed)
        config: Any = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise explain.explain(error, OmegaConf.get_type(composed) or Config) from error
    check_finite(config)
    refuse_redacted(config)
    return config, resolved


def compose_config(overrides: list[str], base: Path | None = None, stage: str | None = None) -> DictConfig:
    """The composed configuration, without Hydra's command line. `base` is a run's own configuration to start from;
    `stage` a preference stage's name, None for training. Whoever acts on a run's own asks `SavedRun.refuse_foreign`."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    from apportion.conf.arguments import rewritten
    from apportion.conf.overrides import whole_mappings

    words = rewritten(overrides, _schema(stage))
    outer = GlobalHydra.instance().hydra  # of a command that is running: Hydra composes only where none is set up
    GlobalHydra.instance().clear()
    try:
        with _explained(stage), whole_mappings(), initialize_config_module("apportion.conf", version_base="1.3"):
            return compose(_register(open_saved(base) if base else None, stage), overrides=words)
    finally:
        GlobalHydra.instance().hydra = outer


def _schema(stage: str | None) -> type:
    from apportion.conf.schema import Config

    if stage is None:
        return Config
    from apportion.conf.preference_schema import STAGES

    return STAGES[stage]


@functools.cache
def _register_schema(stage: str | None) -> None:
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=f"schema_of_{stage}" if stage else "schema", node=_schema(stage))


def _register(base: SavedRun | None, stage: str | None) -> str:
    """Make the schema (and a run's own configuration) known to Hydra; the name of the primary configuration to use."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    # A whole number of something's share, at least 1: ${share:${rollout.max_response_tokens},0.2}
    OmegaConf.register_new_resolver("share", lambda whole, part: max(1, int(whole * part)), replace=True)
    _register_schema(stage)
    if base is None:
        return f"preference/{stage}" if stage else "config"
    ConfigStore.instance().store(name="saved_run", node=OmegaConf.create(base.values), package="_global_")
    return f"preference/saved_{stage}" if stage else "saved"


@contextlib.contextmanager
def _explained(stage: str | None = None) -> Iterator[None]:
    """Hydra's and omegaconf's exceptions as one-line ConfigErrors; Hydra's own reporting of them off."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from apportion.conf.explain import explain

    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, _schema(stage)) from error
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def _with_hydra(command: str, words: list[str], run: Run, base: Path | None = None, stage: str | None = None) -> int:
    """Hydra's command line (--cfg, --help, --multirun, --config-dir) around `run`; the worst exit code of its jobs.

    In a sweep a job that fails is reported and the next one starts; an interruption ends the sweep.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from apportion.conf.arguments import rewritten
    from apportion.conf.overrides import whole_mappings

    switches, overrides = switches_of(command, words)
    overrides = rewritten(overrides, _schema(stage), sweep="--multirun" in switches)
    codes: list[int] = []
    saved = open_saved(base) if base else None

    def task(composed: DictConfig) -> None:
        try:
            with system_errors():
                config, resolved = to_config(composed)
                if saved is not None:
                    saved.refuse_foreign(resolved, words, command != "evaluate" and resolved["resume"] is None)
                codes.append(run(config, resolved))
        except ApportionError as error:
            codes.append(_report(error))

    argv = sys.argv
    sys.argv = [f"apportion {command}", *switches, *overrides]
    try:
        with _explained(stage), whole_mappings(), unsaved_sweeps():
            hydra.main(version_base="1.3", config_path="conf", config_name=_register(saved, stage))(task)()
    except SystemExit as stop:  # how argparse and --help end
        codes.append(stop.code if isinstance(stop.code, int) else FAILED)
    finally:
        sys.argv = argv
        GlobalHydra.instance().clear()
    return max(codes, default=0)
