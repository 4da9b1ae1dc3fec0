"""Learning rates by hand."""

from dataclasses import dataclass

import pytest

from apportion.platform.schedule import learning_rate_at


@dataclass
class Settings:
    learning_rate: float = 2.0
    schedule: str = "constant"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0


def rates(total: int, **settings) -> list[float]:
    return [learning_rate_at(step, total, Settings(**settings)) for step in range(total)]


def test_constant_is_the_peak_from_the_first_step():
    assert rates(3) == [2.0, 2.0, 2.0]


def test_warm_up_rises_linearly_and_reaches_the_peak_at_its_last_step():
    assert rates(5, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_linear_falls_to_the_smallest_ratio_at_the_last_step():
    assert rates(5, schedule="linear") == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])
    assert rates(5, schedule="linear", min_lr_ratio=0.5) == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0])


def test_cosine_is_half_way_down_in_the_middle():
    assert rates(5, schedule="cosine") == pytest.approx([2.0, 1.70710678, 1.0, 0.29289322, 0.0], abs=1e-8)


def test_decay_starts_where_warm_up_ends():
    assert rates(6, schedule="linear", warmup_steps=2) == pytest.approx([1.0, 2.0, 2.0, 4 / 3, 2 / 3, 0.0])


def test_a_step_past_the_end_keeps_the_last_rate():
    assert learning_rate_at(9, 5, Settings(schedule="linear", min_lr_ratio=0.1)) == pytest.approx(0.2)


def test_a_single_step_has_the_peak():
    assert rates(1, schedule="cosine") == [2.0]
    assert rates(1, schedule="linear", warmup_steps=1) == [2.0]
