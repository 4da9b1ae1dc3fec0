"""The judge's configuration: what cannot run is refused, and what its workers need is worked out."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING

from apportion.conf.defaults import judge_utilization
from apportion.conf.devices import check_dtype, check_heads, check_parallel, vllm_needs_gpu
from apportion.conf.machine import Machine
from apportion.conf.models import check_own_tokenizer, read_limits, read_model
from apportion.conf.schema import Config, JudgeConfig
from apportion.platform.addresses import address_problem
from apportion.platform.errors import ConfigError

if TYPE_CHECKING:
    from apportion.actors.judge import JudgeSpec
    from apportion.actors.judge_client import ModelJudgeSpec

_KINDS = "judge.function=my_module:f, judge.model=FOLDER, or judge.url=http://HOST:PORT/v1 with judge.model=NAME"


def judge_urls(judge: JudgeConfig) -> list[str]:
    """The addresses, none where the judge is of another kind; ConfigError for what is no address."""
    given = [] if judge.url is None else list(judge.url) if isinstance(judge.url, list | tuple) else [judge.url]
    for url in given:
        if problem := address_problem(url):
            raise ConfigError(f"judge.url: got an address {problem}, expected http://HOST:PORT/v1 or a list of such")
    if judge.url is not None and not given:
        raise ConfigError("judge.url: got an empty list, expected at least one address, or null")
    return given


def own_model(judge: JudgeConfig) -> str | None:
    """The model that the run itself has to load, if any."""
    return judge.model if judge.model is not None and judge.url is None else None


def check_judge(config: Config, joined: bool, machine: Machine | None = None) -> None:
    """ConfigError where an algorithm that needs critiques would not get any. `joined`: actors start on a cluster; `machine`
    is None where what it would run on is not known, or was looked at before."""
    judge = config.judge
    urls = judge_urls(judge)
    name = config.algorithm.name
    if judge.function is None and judge.model is None and not urls:
        raise ConfigError(f"judge: got none with algorithm {name}, which needs critiques, expected {_KINDS}")
    if judge.function is not None and (judge.model is not None or urls):
        other = "judge.url" if urls else "judge.model"
        raise ConfigError(f"judge: got judge.function and {other}, expected one of {_KINDS}")
    if urls and judge.model is None:
        raise ConfigError(
            "judge.model: got null with judge.url, expected the name of the model that the address serves"
        )
    if judge.api_key_env is not None and not urls:
        raise ConfigError("judge.api_key_env: got a name without judge.url, expected null, or an address to send it to")
    if judge.api_key_env is not None and not joined and not os.environ.get(judge.api_key_env):
        raise ConfigError(f"judge.api_key_env: got {judge.api_key_env}, which is not set, expected the key in it")
    if judge.function is None and judge.temperature == 0 and _critiques(config) > 1:
        raise ConfigError(
            "judge.temperature: got 0 with several critiques of a response, which would all be the same, "
            "expected above 0, or judge.critiques=1"
        )
    if judge.batch_timeout_seconds >= config.cluster.call_timeout_seconds:
        raise ConfigError(
            f"judge.batch_timeout_seconds: got {judge.batch_timeout_seconds:g}, expected less than "
            f"cluster.call_timeout_seconds={config.cluster.call_timeout_seconds:g}, which stops the run"
        )
    if urls and judge.outage_seconds and judge.outage_seconds + judge.timeout_seconds > judge.batch_timeout_seconds:
        raise ConfigError(
            f"judge.outage_seconds: got {judge.outage_seconds:g}, expected at most "
            f"{max(0.0, judge.batch_timeout_seconds - judge.timeout_seconds):g} = judge.batch_timeout_seconds - "
            "judge.timeout_seconds, or the time for a batch ends the wait"
        )
    if judge.function is not None:
        _check_function(judge.function)
    if own_model(judge) is not None:
        _check_own_model(config, judge, machine)


def _critiques(config: Config) -> int:
    """Of each response."""
    if config.judge.critiques is not None:
        return config.judge.critiques
    from apportion.algorithms.interface import judged_method
    from apportion.algorithms.registry import build

    try:
        return judged_method(build("credit", config.algorithm.credit)).critiques
    except ValueError as error:
        raise ConfigError(f"algorithm.credit: {error}") from error


def _check_function(spec: str) -> None:
    """The function is imported here once more than in its actor."""
    from apportion.data.errors import DataError
    from apportion.data.functions import load_function

    try:
        function = load_function(spec)
        inspect.signature(function).bind_partial(question="", steps=[], answer=None)
    except DataError as error:
        raise ConfigError(f"judge.function: {error}") from error
    except TypeError as error:
        raise ConfigError(
            f"judge.function: got {spec} ({error}), expected f(question, steps, answer, **columns)"
        ) from error
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ConfigError(
            f"judge.function: got {spec}, whose import fails ({type(error).__name__}: {error})"
        ) from error


def _check_own_model(config: Config, judge: JudgeConfig, machine: Machine | None) -> None:
    parallel, gpus = judge.tensor_parallel_size, config.cluster.gpus_per_judge
    if parallel > 1 and (judge.engine != "vllm" or gpus < parallel):
        raise ConfigError(
            f"judge.tensor_parallel_size: got {parallel} with judge.engine={judge.engine} and "
            f"cluster.gpus_per_judge={gpus:g}, expected engine vllm and a GPU for each part"
        )
    check_parallel("judge", parallel, gpus, "judge.workers")
    check_heads("judge", parallel, read_model(str(judge.model), "judge.model"))
    if machine is not None:
        check_dtype("judge.dtype", judge.dtype, gpus, machine)
    if judge.engine == "vllm" and gpus == 0 and vllm_needs_gpu():
        raise ConfigError(
            "cluster.gpus_per_judge: got 0 with a vLLM that was built for CUDA, expected at least 1, or "
            "judge.engine=transformers"
        )
    check_own_tokenizer(str(judge.model), "judge.model")
    context = read_limits(str(judge.model), "judge.model").context
    if context is not None and judge.context_tokens > context:
        raise ConfigError(
            f"judge.context_tokens: got {judge.context_tokens}, expected at most {context}, the context of "
            f"{judge.model} (and judge.max_tokens below it)"
        )


def judge_spec(config: Config, tokenizer: str, run_folder: Path, threads: int) -> JudgeSpec:
    """What each of the judge's workers starts from. `tokenizer` is the policy's model."""
    from apportion.actors.judge import JudgeSpec
    from apportion.actors.judge_client import ServiceJudgeSpec

    judge = config.judge
    urls = judge_urls(judge)
    service = None
    if urls:
        service = ServiceJudgeSpec(
            urls, str(judge.model), judge.api_key_env, judge.temperature, judge.max_tokens, judge.context_tokens,
            judge.timeout_seconds, judge.retries, judge.concurrency, judge.outage_seconds,
        )  # fmt: skip
    return JudgeSpec(
        credit=dict(config.algorithm.credit),
        tokenizer=tokenizer,
        trust_remote_code=config.model.trust_remote_code,
        delimiter=judge.delimiter,
        answer_column=judge.answer_column,
        critiques=judge.critiques,
        timeout_seconds=judge.timeout_seconds,
        batch_timeout_seconds=judge.batch_timeout_seconds,
        cache_folder=str(Path(judge.cache_folder or run_folder / "critiques").expanduser().absolute()),
        function=judge.function,
        model=_model_spec(config, threads) if own_model(judge) is not None else None,
        service=service,
    )


def _model_spec(config: Config, threads: int) -> ModelJudgeSpec:
    from apportion.actors.engines import EngineSpec
    from apportion.actors.judge_client import ModelJudgeSpec
    from apportion.data.builtin import resolve_model

    judge = config.judge
    engine = EngineSpec(
        model=resolve_model(str(judge.model)),
        dtype=judge.dtype,
        seed=config.seed,
        max_model_len=judge.context_tokens,
        max_sequences=judge.concurrency,
        tensor_parallel_size=judge.tensor_parallel_size,
        gpu_memory_utilization=judge_utilization(judge, config.cluster.gpus_per_judge),
        kv_cache_gib=judge.kv_cache_gib,
        compile=config.cluster.gpus_per_judge > 0,
        prefix_caching=True,
        trust_remote_code=config.model.trust_remote_code,
        threads=threads,
        first_thread=0,
        seeded=config.train.deterministic,
    )
    return ModelJudgeSpec(judge.engine, engine, judge.temperature, judge.max_tokens)
