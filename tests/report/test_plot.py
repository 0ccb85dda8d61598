"""Runs side by side: which numbers are drawn for a run and for a group of runs, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlfr_cli.artifacts.run_folder import RunFolder
from rlfr_cli.cli import app
from rlfr_cli.errors import ArtifactError, ConfigError, InputError, MissingInputError
from rlfr_cli.report import plot as plot_module
from rlfr_cli.report.plot import Group, Panel, band, plot, read_groups, series, smoothed


def make_run(path: Path, accuracies: list[float | None], **metrics: float) -> str:
    run = RunFolder.create(path, config={"seed": 0}, inputs={})
    for step, accuracy in enumerate(accuracies, start=1):
        run.log_metrics(step, {"rollout/accuracy": accuracy, **metrics})
    return str(path)


class Axes:
    """Takes down what is drawn."""

    def __init__(self) -> None:
        self.drawn: dict[str, tuple[Any, ...]] = {}

    def plot(self, *values: Any, **look: Any) -> None:
        self.drawn["line"] = values

    def fill_between(self, *values: Any, **look: Any) -> None:
        self.drawn["band"] = values

    def vlines(self, *values: Any, **look: Any) -> None:
        self.drawn["bars"] = values


def draw(panel: Panel, runs: list[list[dict[str, Any]]], smooth: int = 1, shift: float = 0.0) -> dict[str, Any]:
    axes = Axes()
    plot_module._draw_group(axes, panel, Group("g", runs), {"color": "red"}, smooth, shift)
    return axes.drawn


def test_a_line_is_what_was_measured() -> None:
    run = [{"step": 1, "a": 0.5}, {"step": 2, "a": None}, {"step": 3}, {"step": 4, "a": 1}]
    assert series(run, "a") == {1: 0.5, 4: 1.0}
    assert draw(Panel("a", "A"), [run]) == {"line": ([1, 4], [0.5, 1.0])}
    assert draw(Panel("b", "B"), [run]) == {}


def test_smoothing_is_the_mean_of_the_last_steps() -> None:
    values = {1: 1.0, 2: 3.0, 4: 8.0, 5: 1.0}
    assert smoothed(values, 1) == values
    assert smoothed(values, 3) == {1: 1.0, 2: 2.0, 4: 4.0, 5: 4.0}
    run = [{"step": step, "a": value} for step, value in values.items()]
    assert draw(Panel("a", "A"), [run], smooth=3)["line"] == ([1, 2, 4, 5], [1.0, 2.0, 4.0, 4.0])


def test_a_group_is_its_mean_between_smallest_and_largest_where_all_have_steps() -> None:
    runs = [{1: 0.0, 2: 0.25, 3: 1.0}, {1: 1.0, 2: 0.75}, {}]
    assert band(runs) == ([1, 2], [0.5, 0.5], [0.0, 0.25], [1.0, 0.75])
    lines = [[{"step": step, "a": value} for step, value in run.items()] for run in runs]
    drawn = draw(Panel("a", "A"), lines)
    assert drawn["line"] == ([1, 2], [0.5, 0.5])
    assert drawn["band"] == ([1, 2], [0.0, 0.25], [1.0, 0.75])
    assert "bars" not in drawn


def test_heldout_accuracy_has_its_interval_and_is_never_smoothed() -> None:
    panel = Panel("a", "A", interval=("low", "high"))
    run = [{"step": 0, "a": 0.2, "low": 0.1, "high": 0.4}, {"step": 1}, {"step": 10, "a": 0.6, "low": 0.5, "high": 0.9}]
    drawn = draw(panel, [run], smooth=5, shift=-0.5)
    assert drawn["line"] == ([0, 10], [0.2, 0.6])
    places, lows, highs = drawn["bars"]
    assert (lows, highs) == ([0.1, 0.5], [0.4, 0.9])
    assert places == pytest.approx([-0.06, 9.94])
    # Of several runs the band is of the runs, not of the problems.
    assert "bars" not in draw(panel, [run, run])


def test_equal_names_form_a_group_and_paths_alone_do_not(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "0" / "rlfr", [0.1]), make_run(tmp_path / "1" / "rlfr", [0.2])
    c = make_run(tmp_path / "x=y", [0.3])
    groups = read_groups([f"RLFR={a}", c, f"RLFR={b}"])
    assert [(group.name, len(group.runs)) for group in groups] == [("RLFR", 2), ("x=y", 1)]
    assert [group.label for group in groups] == ["RLFR, 2 runs", "x=y"]
    assert [group.name for group in read_groups([a, b])] == [a, b]
    assert [group.name for group in read_groups([a, c])] == ["rlfr", "x=y"]


def test_a_plot_holds_the_panels_that_have_data(tmp_path: Path) -> None:
    rlvr = make_run(tmp_path / "rlvr", [0.1, 0.2], **{"policy/entropy": 0.5})
    rlfr = make_run(tmp_path / "rlfr", [0.1, 0.3], **{"flow/auc": 0.6})
    drawn = plot([f"RLVR={rlvr}", f"_$RLFR={rlfr}"], tmp_path / "out" / "plot.png")
    assert drawn["panels"] == ["rollout/accuracy", "policy/entropy", "flow/auc"]
    assert drawn["groups"] == {"RLVR": 1, "_$RLFR": 1}
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")
    asked = plot([rlvr], tmp_path / "plot.svg", metrics=["policy/entropy"], smooth=2)
    assert asked["panels"] == ["policy/entropy"]
    first = (tmp_path / "plot.svg").read_bytes()
    assert b"<svg" in first
    plot([rlvr], tmp_path / "plot.svg", metrics=["policy/entropy"], smooth=2)
    assert (tmp_path / "plot.svg").read_bytes() == first


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [0.1])
    empty = make_run(tmp_path / "empty", [])
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        plot([run], tmp_path / "plot.pdf")
    with pytest.raises(InputError, match="policy/entropie") as caught:
        plot([run], tmp_path / "plot.png", metrics=["rollout/accuracy", "policy/entropie"])
    assert "rollout/accuracy" in str(caught.value.hint)
    with pytest.raises(InputError, match="no step"):
        plot([empty], tmp_path / "plot.png")
    with pytest.raises(MissingInputError):
        plot([f"a={tmp_path / 'gone'}"], tmp_path / "plot.png")
    with pytest.raises(ArtifactError, match="not a run folder"):
        plot([str(tmp_path)], tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_the_command_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", [0.1, 0.4])
    result = CliRunner().invoke(app, ["plot", "run", "--metric", "rollout/accuracy", "--smooth", "2", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"out": "plot.png", "groups": {"run": 1}, "panels": ["rollout/accuracy"]}
    assert Path("plot.png").exists()
    assert CliRunner().invoke(app, ["plot", "gone"]).exit_code == 2
