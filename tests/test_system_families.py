"""A mixture of experts is really synced: every kind of parameter reaches the engine, and every byte is proved."""

import pytest

from benchmarks.families import BOUND, FAMILIES, Result, measured_apart

pytestmark = pytest.mark.system


def test_changed_experts_reach_the_engine_and_every_byte_is_proved():
    result = measured_apart("qwen3_moe")
    assert isinstance(result, Result), result
    assert (result.tensors, result.kinds) == (25, 14)
    assert result.proved_bytes == result.sent_bytes > 0
    assert result.worst_gap <= BOUND, result.worst_kind


def test_each_mixture_that_a_run_may_have_is_among_the_measured_families():
    from apportion.conf.families import PROVED_MIXTURES

    assert {f"{family.name}ForCausalLM" for family in FAMILIES.values()} >= set(PROVED_MIXTURES)
