"""Shaping: worked by hand, against a plain loop, and its properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlfr_cli.flow.choices import Normalise
from rlfr_cli.flow.shaping import ShapingOptions, shape_scores

PLAIN = {"threshold": 0.0, "top_k": 0}


def shape_one(scores: list[float], **options) -> tuple[list[float], list[float]]:
    packed = torch.tensor(scores)
    valid = torch.ones(len(scores), dtype=torch.bool)
    shaped = shape_scores(packed, valid, torch.tensor([0, len(scores)]), ShapingOptions(**options))
    return shaped.shaped_K.tolist(), shaped.flow_reward_K.tolist()


def test_published_shaping_by_hand() -> None:
    """2..12 to 0..1; 0.6 itself is not above the threshold; the two largest stay; -0.01 each."""
    shaped, reward = shape_one([2.0, 12.0, 8.0, 9.0, 10.0], top_k=2)
    assert shaped == pytest.approx([0, 1, 0, 0, 0.8])
    assert reward == pytest.approx([0, -0.01, 0, 0, -0.008])


def test_a_value_at_the_threshold_is_dropped() -> None:
    assert shape_one([0.0, 4.0, 5.0, 8.0], threshold=0.5)[0] == pytest.approx([0, 0, 0.625, 1])


def test_signed_by_hand() -> None:
    """0..10 to -1..1; |x| above 0.3; the floor(5 / 2) = 2 most positive and most negative."""
    scores = [0.0, 10.0, 9.0, 8.0, 5.0, 6.0, 1.0, 2.0]
    shaped, reward = shape_one(scores, normalise=Normalise.MINMAX_SIGNED, threshold=0.3, top_k=5)
    assert shaped == pytest.approx([-1, 1, 0.8, 0, 0, 0, -0.8, 0])
    assert reward[0] == pytest.approx(0.01)


def test_signed_never_fills_up_from_the_other_side() -> None:
    scores = [0.0, 9.0, 9.5, 10.0]
    shaped, _ = shape_one(scores, normalise=Normalise.MINMAX_SIGNED, threshold=0.0, top_k=4)
    assert shaped == pytest.approx([-1, 0, 0.9, 1])


def test_power_keeps_the_sign() -> None:
    signed = {"normalise": Normalise.MINMAX_SIGNED, **PLAIN}
    assert shape_one([0.0, 3.0, 4.0], power=2.0, **signed)[0] == pytest.approx([-1, 0.25, 1])
    assert shape_one([0.0, 1.0, 4.0], power=0.5, **signed)[0] == pytest.approx([-1, -math.sqrt(0.5), 1])


@pytest.mark.parametrize("normalise", [Normalise.MINMAX, Normalise.MINMAX_SIGNED])
@pytest.mark.parametrize("scores", [[], [3.0], [2.5, 2.5, 2.5]])
def test_a_constant_response_gives_zeros(scores: list[float], normalise: Normalise) -> None:
    shaped, reward = shape_one(scores, normalise=normalise, centre=True, **PLAIN)
    assert shaped == [0.0] * len(scores)
    assert reward == [0.0] * len(scores)


def test_of_equal_scores_the_earlier_stay() -> None:
    assert shape_one([0.0, 4.0, 4.0, 4.0], top_k=2)[0] == [0, 1, 1, 0]


def test_centring_by_hand() -> None:
    """Shaped 0, 1, 0.8 with coefficient 0.03: rewards 0, -0.03, -0.024, less their mean -0.018."""
    _, reward = shape_one([0.0, 10.0, 8.0], coefficient=0.03, centre=True)
    assert reward == pytest.approx([0.018, -0.012, -0.006])


def test_tokens_that_are_not_valid_are_never_read() -> None:
    """NaN and a huge score at them change nothing; their reward is 0, centred or not."""
    scores = torch.tensor([2.0, torch.nan, 12.0, 10.0, 1e9, 3.0, 5.0])
    valid = torch.tensor([True, False, True, True, False, True, True])
    offsets = torch.tensor([0, 5, 5, 7])
    shaped = shape_scores(scores, valid, offsets, ShapingOptions(coefficient=1.0, centre=True))
    assert shaped.shaped_K.tolist() == pytest.approx([0, 0, 1, 0.8, 0, 0, 1])
    assert shaped.flow_reward_K.tolist() == pytest.approx([0.6, 0, -0.4, -0.2, 0, 0.5, -0.5])


def shape_by_loop(scores: list[float], options: ShapingOptions) -> list[float]:
    if not scores:
        return []
    signed = options.normalise is Normalise.MINMAX_SIGNED
    lowest, span = min(scores), max(scores) - min(scores)
    values = [(score - lowest) / span if span > 0 else 0.0 for score in scores]
    if signed:
        values = [2 * value - 1 if span > 0 else 0.0 for value in values]
    size = abs if signed else float
    kept = [value if options.threshold <= 0 or size(value) > options.threshold else 0.0 for value in values]
    if options.top_k > 0:
        down = sorted(range(len(kept)), key=lambda k: -kept[k])
        chosen = set(down[: options.top_k])
        if signed:
            up = sorted(range(len(kept)), key=lambda k: kept[k])
            half = options.top_k // 2
            chosen = {k for k in down[:half] if kept[k] > 0} | {k for k in up[:half] if kept[k] < 0}
        kept = [value if k in chosen else 0.0 for k, value in enumerate(kept)]
    return kept


responses = st.lists(st.lists(st.integers(0, 8).map(float), max_size=9), min_size=1, max_size=4)
settings = st.builds(
    ShapingOptions,
    normalise=st.sampled_from([Normalise.MINMAX, Normalise.MINMAX_SIGNED]),
    threshold=st.sampled_from([0.0, 0.25, 0.5]),
    top_k=st.integers(0, 6),
    centre=st.booleans(),
)


@given(responses, settings)
def test_against_a_loop(scores: list[list[float]], options: ShapingOptions) -> None:
    lengths = [len(response) for response in scores]
    packed = torch.tensor([score for response in scores for score in response])
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    shaped = shape_scores(packed, torch.ones(len(packed), dtype=torch.bool), offsets, options)
    wanted = [value for response in scores for value in shape_by_loop(response, options)]
    assert shaped.shaped_K.tolist() == pytest.approx(wanted, abs=1e-6)
    for values, rewards in zip(shaped.shaped_K.split(lengths), shaped.flow_reward_K.split(lengths), strict=True):
        if options.centre:
            assert float(rewards.sum()) == pytest.approx(0, abs=1e-6)
        else:
            assert rewards.tolist() == pytest.approx((-0.01 * values).tolist())


@given(st.lists(st.integers(0, 100).map(float), min_size=2, max_size=20), st.floats(0.5, 5), st.floats(-9, 9))
def test_scale_and_shift_of_scores_do_not_matter(scores: list[float], scale: float, shift: float) -> None:
    moved = [scale * score + shift for score in scores]
    plain, _ = shape_one(scores, **PLAIN)
    assert shape_one(moved, **PLAIN)[0] == pytest.approx(plain, abs=1e-4)
    assert min(plain) >= 0
    assert max(plain) in (0, 1)
