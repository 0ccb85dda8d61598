"""What `rlfr plot` draws without being asked: numbers that a run really logs, the five that matter first among them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from report.test_plot import draw
from rlfr_cli.artifacts.run_folder import RunFolder
from rlfr_cli.report.plot import PANELS, plot
from stages.test_train_rl import EVALUATION_KEYS, FLOW_KEYS, ONLINE_KEYS, ROLLOUT_KEYS

MAIN = ["rollout/accuracy", "rollout/reward", "policy/entropy", "rollout/response_tokens", "flow/auc"]


def make_runs(folder: Path, count: int) -> list[str]:
    drawn = random.Random(0)
    for number in range(count):
        run = RunFolder.create(folder / f"seed-{number}", config={"seed": number}, inputs={})
        for step in range(1, 9):
            run.log_metrics(step, {key: drawn.random() for key in MAIN})
    return [str(folder / f"seed-{number}") for number in range(count)]


def test_every_panel_is_a_number_that_training_logs() -> None:
    """The keys are those that the tests of `train-rl` hold against a run's own metrics."""
    logged = ROLLOUT_KEYS | FLOW_KEYS | ONLINE_KEYS | EVALUATION_KEYS
    drawn = [key for panel in PANELS for key in (panel.key, *(panel.interval or ()))]
    assert set(MAIN) | {"eval/accuracy"} < set(drawn)
    assert set(drawn) <= logged
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("kind", ["png", "svg"])
@pytest.mark.parametrize("count", [1, 3])
def test_accuracy_reward_entropy_length_and_auc_of_one_or_several_runs(tmp_path: Path, kind: str, count: int) -> None:
    runs = [f"RLFR={path}" for path in make_runs(tmp_path, count)]
    drawn = plot(runs, tmp_path / f"plot.{kind}")
    assert drawn["panels"] == MAIN
    assert drawn["groups"] == {"RLFR": count}
    whole = (tmp_path / f"plot.{kind}").read_bytes()
    # Bands are the one thing that seeds add; without them the same lines would give a smaller file.
    plot(runs[:1], tmp_path / f"one.{kind}")
    assert (len(whole) > len((tmp_path / f"one.{kind}").read_bytes())) == (count > 1)
    if kind == "svg":
        assert (whole.count(b"FillBetweenPolyCollection") >= len(MAIN)) == (count > 1)


@pytest.mark.parametrize("key", MAIN)
def test_the_spread_of_seeds_is_drawn_for_each(key: str) -> None:
    panel = next(panel for panel in PANELS if panel.key == key)
    runs = [[{"step": step, key: offset + step} for step in (1, 2)] for offset in (0.0, 0.5, 4.0)]
    drawn = draw(panel, runs)
    assert drawn["line"] == ([1, 2], [2.5, 3.5])
    assert drawn["band"] == ([1, 2], [1.0, 2.0], [5.0, 6.0])
