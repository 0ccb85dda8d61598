"""The gap between engine and trainer: measured with the right sign, cut where it should be."""

from __future__ import annotations

import math

import pytest
import torch

from rlfr_cli.errors import WorkError
from rlfr_cli.rl.choices import Correction, RatioLevel
from rlfr_cli.rl.correction import (
    CorrectionOptions,
    check_engine,
    correction_weights,
    gap_metrics,
    importance_ratios,
)

LOG = math.log
TRAINER = torch.tensor([LOG(0.5), LOG(0.2), LOG(0.1), LOG(0.8), LOG(0.05)])
ENGINE = torch.tensor([LOG(0.5), LOG(0.1), LOG(0.4), LOG(0.2), LOG(0.1)])
OFFSETS = torch.tensor([0, 3, 5])


def test_ratios_are_of_trainer_to_engine() -> None:
    assert importance_ratios(TRAINER, ENGINE, OFFSETS).tolist() == pytest.approx([1, 2, 0.25, 4, 0.5])


def test_a_responses_ratio_is_the_product_of_its_tokens() -> None:
    ratios = importance_ratios(TRAINER, ENGINE, OFFSETS, RatioLevel.SEQUENCE)
    assert ratios.tolist() == pytest.approx([0.5, 0.5, 0.5, 2, 2])


@pytest.mark.parametrize(
    ("correction", "weights"),
    [
        (Correction.TRUNCATE, [1, 2, 0.25, 3, 0.5]),
        (Correction.MASK, [1, 2, 0, 0, 0.5]),
        (Correction.NONE, [1, 1, 1, 1, 1]),
    ],
)
def test_weights_by_hand(correction: Correction, weights: list[float]) -> None:
    ratios = importance_ratios(TRAINER, ENGINE, OFFSETS)
    options = CorrectionOptions(correction=correction, cap=3.0)
    assert correction_weights(ratios, options).tolist() == pytest.approx(weights)


def test_truncated_weights_make_the_engines_mean_the_trainers() -> None:
    """Over tokens drawn by the engine, the weighted mean of any value is the trainer's mean, if nothing is cut."""
    engine, trainer = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    value = torch.tensor([1.0, -2.0, 5.0])
    weights = correction_weights(
        importance_ratios(trainer.log(), engine.log(), torch.tensor([0, 3])), CorrectionOptions(cap=2.0)
    )
    assert float((engine * weights * value).sum()) == pytest.approx(float((trainer * value).sum()))


def test_metrics_of_a_gap_by_hand() -> None:
    options = CorrectionOptions(correction=Correction.TRUNCATE, cap=3.0)
    metrics = gap_metrics(TRAINER, ENGINE, OFFSETS, (0.8, 1.2), options)
    gaps = [0, LOG(2), LOG(0.25), LOG(4), LOG(0.5)]
    assert metrics["engine/kl_to_trainer"] == pytest.approx(sum(math.exp(g) - 1 - g for g in gaps) / 5)
    assert metrics["engine/logprob_gap_max"] == pytest.approx(LOG(4))
    assert metrics["engine/ratio_max"] == pytest.approx(4)
    assert metrics["engine/outside_clip_fraction"] == pytest.approx(4 / 5)
    # Only the ratio of 4, cut at 3, is left outside.
    assert metrics["engine/outside_clip_fraction_corrected"] == pytest.approx(1 / 5)
    assert metrics["engine/cut_fraction"] == pytest.approx(1 / 5)
    assert metrics["engine/weight_mean"] == pytest.approx((1 + 2 + 0.25 + 3 + 0.5) / 5)


def test_an_engine_that_shares_weights_has_no_gap() -> None:
    metrics = gap_metrics(TRAINER, TRAINER, OFFSETS, (0.8, 1.2), CorrectionOptions())
    assert metrics["engine/kl_to_trainer"] == metrics["engine/cut_fraction"] == 0
    assert metrics["engine/weight_mean"] == 1


def test_an_engine_near_the_trainers_weights_passes_and_is_measured() -> None:
    """Differences of 0.1 nats: KL 0.005."""
    now = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])]
    engine = [torch.tensor([-1.1, -1.9]), torch.tensor([-3.1])]
    assert check_engine(engine, now, None, 0.05) == pytest.approx(0.005)
    assert check_engine(engine, now, [row + 0.05 for row in now], 0.05) == pytest.approx(0.005)


@pytest.mark.parametrize("wrong", [1.0, math.nan])
def test_an_engine_with_wrong_weights_stops_the_run(wrong: float) -> None:
    now = [torch.tensor([-1.0, -2.0])]
    with pytest.raises(WorkError, match="are not the trainer's"):
        check_engine([now[0] + wrong], now, None, 0.05)


def test_an_engine_that_kept_the_old_weights_stops_the_run_however_small_the_step() -> None:
    before = [torch.tensor([-1.0, -2.0, -3.0])]
    now = [before[0] + torch.tensor([0.01, -0.01, 0.01])]
    noise = torch.tensor([0.001, 0.001, -0.001])
    assert check_engine([now[0] + noise], now, before, 0.05) < 1e-5
    with pytest.raises(WorkError, match="did not take the trainer's new weights"):
        check_engine([before[0] + noise], now, before, 0.05)
