"""How the loop and its evaluation are set."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

from apportion.actors.engines import Sampling
from apportion.assembly.needs import Needs
from apportion.assembly.serving import rollout_spec
from apportion.conf.defaults import rollout_settings
from apportion.conf.layout import layout_of
from apportion.conf.models import read_limits
from apportion.conf.schema import Config
from apportion.loop.evaluation import EvaluationSettings
from apportion.loop.state import Actors, LoopSettings
from apportion.loop.sync_check import SyncCheck, text_tokens


def loop_settings(config: Config, needs: Needs) -> LoopSettings:
    r, t = config.rollout, config.train
    return LoopSettings(
        steps=t.steps,
        prompts_per_step=t.prompts_per_step,
        responses_per_prompt=r.responses_per_prompt,
        sampling=Sampling(r.temperature, r.top_p, r.top_k, r.max_response_tokens, list(r.stop), r.response_column),
        minibatches=config.algorithm.updates_per_batch,
        policy_signals=needs.policy_signals,
        selects=bool(config.algorithm.selection),
        max_failed_share=config.reward.max_failed_share,
        sync_check=t.sync_check,
        sync_unproved=list(t.sync_unproved),
        call_timeout_seconds=config.cluster.call_timeout_seconds,
        critic_only_steps=config.critic.warmup_steps_without_policy if needs.critic else 0,
        samples_shown=config.tracking.samples_per_step,
        max_minutes=t.max_minutes,
        checkpoint_every=config.checkpoint.every_steps,
        checkpoint_minutes=config.checkpoint.every_minutes,
        checkpoint_final=config.checkpoint.final,
        seeds={"run": config.seed},
        ranks=layout_of(config, needs.critic),
        max_failed_critiques=config.judge.max_failed_share,
        parts=_parts(config) if needs.judge else 1,
    )


def _parts(config: Config) -> int:
    """If nothing is said, so many that each has two decoding rounds: at the end of a part places stand empty."""
    responses = (
        ceil(config.train.prompts_per_step / config.cluster.rollout_engines) * config.rollout.responses_per_prompt
    )
    side_by_side = rollout_settings(config.rollout, config.cluster.gpus_per_rollout_engine).max_sequences
    return config.judge.parts or max(1, responses // (2 * side_by_side))


def sync_check(config: Config, actors: Actors, tokenizer: Any, model: str, warn: Callable[[str], None]) -> SyncCheck:
    """The check that engines compute with the trainer's weights, for a run that starts from the files of `model`."""
    train = config.train
    if not train.sync_check:
        return SyncCheck.off(actors)
    # vLLM scores a text only as a prompt, and wants room for one more token behind it.
    most = min(rollout_spec(config, model, 0).engine_spec.max_model_len - 1, config.policy.micro_batch_tokens)
    check = SyncCheck(
        actors, text_tokens(tokenizer, most, read_limits(model).vocabulary), train.max_sync_gap,
        config.cluster.call_timeout_seconds, warn,
    )  # fmt: skip
    if check.is_off:
        warn(
            f"train.sync_check: sequences of at most {most + 1} tokens leave no room to score a text, so that sync/gap is not "
            "measured; checksums still prove the weights"
        )
    return check


def evaluation_settings(config: Config) -> EvaluationSettings:
    e = config.evaluation
    tokens = e.max_response_tokens or config.rollout.max_response_tokens
    return EvaluationSettings(
        e.every_steps, e.before, e.after, e.greedy, e.samples, list(e.k), e.temperature, tokens, e.correct_at, e.show,
        config.reward.max_failed_share,
    )  # fmt: skip
