"""The course of a learning rate: by hand, and where it begins and ends."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlfr_cli.config.schedules import Schedule
from rlfr_cli.rl.schedule import learning_rate_at


def course(total: int, warmup: float, schedule: Schedule, final: float = 0.1) -> list[float]:
    return [
        learning_rate_at(step, total, 2.0, warmup_fraction=warmup, schedule=schedule, final_fraction=final)
        for step in range(total)
    ]


def test_linear_by_hand() -> None:
    assert course(6, 1 / 3, Schedule.LINEAR, final=0.0) == pytest.approx([1.0, 2.0, 1.5, 1.0, 0.5, 0.0])


def test_cosine_by_hand() -> None:
    """Four steps down from 2 to a tenth of it; half way is the mean of the two."""
    half, quarter = 1.1, math.cos(math.pi / 4) * 0.9
    assert course(4, 0.0, Schedule.COSINE) == pytest.approx([half + quarter, half, half - quarter, 0.2])


def test_constant_stays_after_the_warm_up() -> None:
    assert course(5, 0.4, Schedule.CONSTANT) == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0])


def test_a_part_of_a_warm_up_step_is_a_whole_one() -> None:
    """3 % of 50 steps are 1.5: two."""
    assert course(50, 0.03, Schedule.COSINE)[:3] == pytest.approx([1.0, 2.0, 2.0], rel=0.01)
    assert course(50, 0.03, Schedule.COSINE)[2] < 2.0


def test_a_single_step_has_the_highest_rate_when_it_warms_up() -> None:
    assert course(1, 0.03, Schedule.COSINE) == [2.0]
    assert course(3, 1.0, Schedule.COSINE) == pytest.approx([2 / 3, 4 / 3, 2.0])


@given(st.integers(1, 60), st.floats(0, 1), st.sampled_from([Schedule.COSINE, Schedule.LINEAR]), st.floats(0, 1))
def test_up_to_the_highest_then_down_to_the_last(total: int, warmup: float, schedule: Schedule, final: float) -> None:
    rates = course(total, warmup, schedule, final)
    steps = math.ceil(warmup * total)
    rising, falling = rates[:steps], rates[steps:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0 <= rate <= 2.0 + 1e-12 for rate in rates)
    if rising:
        assert rising[-1] == pytest.approx(2.0)
    if falling:
        assert falling[-1] == pytest.approx(2.0 * final)


def test_steps_beyond_the_last_keep_its_rate() -> None:
    late = learning_rate_at(15, 10, 2.0, warmup_fraction=0.1, schedule=Schedule.COSINE, final_fraction=0.1)
    assert late == pytest.approx(0.2)
