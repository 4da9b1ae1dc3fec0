"""Sections about what a step learns from: prompts, samples, environments, rewards, critiques."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from apportion.conf.checks import (
    COLDEST,
    HOTTEST,
    LARGEST,
    LARGEST_COUNT,
    LARGEST_GIB,
    LONGEST_SECONDS,
    MISSING,
    MOST_ACTORS,
    MOST_RETRIES,
    MOST_THREADS,
    SHORTEST_SECONDS,
    SMALLEST,
    above_zero,
    at_least,
    between,
    from_zero,
    one_of,
)
from apportion.platform.errors import ConfigError


@dataclass
class DataConfig:
    """Where prompts come from. A source is a path, `hf:NAME[:SPLIT]`, `gym:TASK`, or a mapping with `source`,
    `weight` and the source's own parameters; a list mixes sources by weight."""

    train: Any = MISSING
    eval: Any = None
    prompt_column: str = "prompt"
    system_prompt: str | None = None
    chat: bool = True  # render a text prompt as one user message through the chat template
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_prompt_tokens: int = 512
    tools_column: str | None = "tools"  # what the chat template is given as tools, where a row has it; null: nothing
    on_bad_row: str = "error"
    shuffle: bool = True
    limit: int | None = None  # rows of each training source
    eval_limit: int | None = None

    def __post_init__(self) -> None:
        one_of("data.on_bad_row", self.on_bad_row, ("error", "skip"))
        at_least("data.max_prompt_tokens", self.max_prompt_tokens, 1)
        at_least("data.limit", self.limit, 1)
        at_least("data.eval_limit", self.eval_limit, 1)


@dataclass
class RolloutConfig:
    """Sampling. Behaviour log-probs are those of the distribution after temperature, top-p and top-k."""

    engine: str = "vllm"
    responses_per_prompt: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    max_response_tokens: int = 256
    response_column: str | None = None  # with a distillation: learn from the data's responses (hh: chosen), sample none
    stop: list[str] = field(default_factory=list)
    tensor_parallel_size: int = 1
    max_sequences: int | None = None  # decoded side by side in one engine; null: 256 on a GPU, 64 on CPUs
    # Share of each of its GPUs that an engine takes; null: 0.9, or 0.8 of a part of one
    gpu_memory_utilization: float | None = None
    kv_cache_gib: float = 1.0  # on CPU
    compile: bool | None = None  # vLLM's compiled graphs: faster decoding, slower start; null: on a GPU
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        one_of("rollout.engine", self.engine, ("vllm", "transformers"))
        at_least("rollout.responses_per_prompt", self.responses_per_prompt, 1, 1_000_000)
        at_least("rollout.max_response_tokens", self.max_response_tokens, 1)
        at_least("rollout.tensor_parallel_size", self.tensor_parallel_size, 1, 1024)
        at_least("rollout.max_sequences", self.max_sequences, 1, 1_000_000)
        at_least("rollout.top_k", self.top_k, 0)
        if "" in self.stop:
            raise ConfigError(f"rollout.stop: got {self.stop}, expected texts that are not empty, or []")
        between("rollout.top_p", self.top_p, 1e-6, 1.0)
        above_zero("rollout.kv_cache_gib", self.kv_cache_gib, 0.001, LARGEST_GIB)
        between("rollout.gpu_memory_utilization", self.gpu_memory_utilization, 0.05, 0.98)
        above_zero("rollout.temperature", self.temperature, COLDEST, HOTTEST, " (greedy has no policy gradient)")


@dataclass
class EnvironmentConfig:
    """What the policy acts in, turn by turn; without `cls`, a response is one turn. `cls` is microwave, gymnasium,
    textarena or a dotted path of a class of one's own; rollout.max_response_tokens bounds all turns and observations
    of an episode together."""

    cls: str | None = None
    params: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the class
    workers: int = 1  # actors, each with many environments
    threads: int = 16  # synchronous steps under way at once in one actor
    max_turns: int = 8
    max_turn_tokens: int | None = None  # of one action; null: what is left of the response
    step_timeout_seconds: float = 10.0
    observation_role: str = "user"  # in the chat template

    def __post_init__(self) -> None:
        at_least("environment.workers", self.workers, 1, MOST_ACTORS)
        at_least("environment.threads", self.threads, 1, MOST_THREADS)
        for name in ("max_turns", "max_turn_tokens"):
            at_least(f"environment.{name}", getattr(self, name), 1)
        above_zero("environment.step_timeout_seconds", self.step_timeout_seconds, SHORTEST_SECONDS, LONGEST_SECONDS)


@dataclass
class RewardConfig:
    """Rewards are the weighted sum of `functions`. One entry is a dotted path, `file.py:function`, a ready-made
    verifier's name, or a mapping with `function`, `weight`, `timeout_seconds`, `params` and `columns`; `model:PATH` is a
    reward model and `http://...` (or a list of addresses under `urls`) a service. With an environment, whose rewards are
    added with weight 1, `functions` may be null."""

    functions: Any = MISSING
    workers: int = 1
    timeout_seconds: float = 60.0  # of one call, unless the entry says otherwise
    outage_seconds: float = 600.0  # a service that is away is waited for so long; 0: its samples fail at once
    max_failed_share: float = 0.1
    clip: float | None = None  # rewards are clamped to [-clip, clip]
    step_delimiter: str = "\n\n"  # what separates two steps, where a reward is a list with one number a step

    def __post_init__(self) -> None:
        at_least("reward.workers", self.workers, 1, MOST_ACTORS)
        between("reward.max_failed_share", self.max_failed_share, 0.0, 1.0)
        from_zero("reward.clip", self.clip, SMALLEST, LARGEST)
        at_least("reward.outage_seconds", self.outage_seconds, 0, LONGEST_SECONDS)
        above_zero("reward.timeout_seconds", self.timeout_seconds, SHORTEST_SECONDS, LONGEST_SECONDS)
        if not self.step_delimiter:
            raise ConfigError("reward.step_delimiter: got an empty text, expected what separates two steps")


@dataclass
class JudgeConfig:
    """Who says which steps of a response are wrong; started only when the algorithm needs critiques. One of three:
    `function` alone, a dotted path or `file.py:function`; `model` alone, a model on an engine of the run's own; `url`
    (one OpenAI-compatible address or a list, up to /v1) with `model`, the name it serves."""

    function: str | None = None
    model: str | None = None
    url: Any = None
    api_key_env: str | None = None  # name of the environment variable that holds the address's key
    critiques: int | None = None  # of each response; null: as many as the credit method asks for
    delimiter: str = "\n\n"  # what separates two steps
    answer_column: str | None = "answer"  # the reference answer that the judge is shown, where a row has it; null: none
    temperature: float = 0.7
    max_tokens: int = 1024  # of one critique
    context_tokens: int = 8192  # a longer prompt and critique is not asked and counted as too_long
    timeout_seconds: float = 120.0  # of one critique
    batch_timeout_seconds: float = 900.0  # of all critiques of a batch; what is late has failed
    outage_seconds: float = 600.0  # an address that is away is waited for so long; 0: its critiques fail at once
    retries: int = 2  # of an address
    concurrency: int = 16  # critiques under way at a time, in each worker
    workers: int = 1
    # An engine's prompts of a step are sampled in so many parts, and a part is judged while the next is sampled; null: each
    # of two decoding rounds (`apportion plan`)
    parts: int | None = None
    cache_folder: str | None = None  # null: `critiques` in the run's folder
    max_failed_share: float = 0.5  # of a step's critiques; above it the run stops; 1 goes on without any
    engine: str = "vllm"
    dtype: str = "bfloat16"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None  # as rollout's
    kv_cache_gib: float = 1.0  # on CPU

    def __post_init__(self) -> None:
        one_of("judge.engine", self.engine, ("vllm", "transformers"))
        one_of("judge.dtype", self.dtype, ("bfloat16", "float32", "float16"))
        for name, most in (
            ("critiques", 10_000),
            ("max_tokens", LARGEST_COUNT),
            ("concurrency", MOST_THREADS),
            ("workers", MOST_ACTORS),
            ("parts", 1_000_000),
            ("tensor_parallel_size", 1024),
        ):
            at_least(f"judge.{name}", getattr(self, name), 1, most)
        from_zero("judge.temperature", self.temperature, COLDEST, HOTTEST)
        at_least("judge.retries", self.retries, 0, MOST_RETRIES)
        at_least("judge.context_tokens", self.context_tokens, 1)
        at_least("judge.outage_seconds", self.outage_seconds, 0, LONGEST_SECONDS)
        between("judge.max_failed_share", self.max_failed_share, 0.0, 1.0)
        between("judge.gpu_memory_utilization", self.gpu_memory_utilization, 0.05, 0.98)
        for name in ("timeout_seconds", "batch_timeout_seconds"):
            above_zero(f"judge.{name}", getattr(self, name), SHORTEST_SECONDS, LONGEST_SECONDS)
        above_zero("judge.kv_cache_gib", self.kv_cache_gib, 0.001, LARGEST_GIB)
        if not self.delimiter:
            raise ConfigError("judge.delimiter: got an empty text, expected what separates two steps")
        if self.context_tokens <= self.max_tokens:
            raise ConfigError(
                f"judge.context_tokens: got {self.context_tokens}, expected more than judge.max_tokens={self.max_tokens}"
            )
