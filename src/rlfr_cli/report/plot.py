"""Training runs side by side: small multiples of what ``metrics.jsonl`` holds, one colour a run or a group of runs.

Reads run folders; writes one PNG or SVG. Runs given the same name form a group: the line is their mean and the band
goes from the smallest to the largest, at the steps that all of them have.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfr_cli.artifacts.files import write_atomically
from rlfr_cli.artifacts.run_folder import RunFolder
from rlfr_cli.errors import ConfigError, InputError

# Okabe and Ito's colours, told apart by the colour-blind; then again with dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
COLUMNS = 3
PANEL_WIDTH, PANEL_HEIGHT, HEAD_HEIGHT = 3.9, 2.4, 0.6  # inches

Series = dict[int, float]


@dataclass(frozen=True)
class Panel:
    """One small plot.

    Attributes:
        key: of ``metrics.jsonl``.
        interval: keys of the lower and upper end of its interval.
        level: a value that means nothing happened, drawn as a thin line.
    """

    key: str
    title: str
    interval: tuple[str, str] | None = None
    level: float | None = None


PANELS = (
    Panel("rollout/accuracy", "Accuracy, training problems"),
    Panel("eval/accuracy", "Accuracy, held-out problems", interval=("eval/accuracy_low", "eval/accuracy_high")),
    Panel("rollout/reward", "Outcome reward"),
    Panel("policy/entropy", "Entropy, nats a token"),
    Panel("rollout/response_tokens", "Response length, tokens"),
    Panel("rollout/cut_off_fraction", "Share of responses cut off"),
    Panel("rollout/zero_variance_group_fraction", "Share of groups with equal rewards"),
    Panel("flow/auc", "AUC of deviation, wrong over correct", level=0.5),
    Panel("flow/loss", "Flow loss, online"),
    Panel("flow/rewarded_fraction", "Share of tokens with a flow reward"),
    Panel("advantage/negative_fraction", "Share of tokens with a negative advantage", level=0.5),
    Panel("policy/gradient_norm", "Gradient norm of the policy"),
    Panel("policy/clip_fraction", "Share of ratios clipped"),
    Panel("engine/kl_to_trainer", "KL, sampling to trainer"),
    Panel("time/step_s", "Seconds a step"),
)


@dataclass(frozen=True)
class Group:
    """Runs of one name and colour, each as its lines of metrics."""

    name: str
    runs: Sequence[Sequence[Mapping[str, Any]]]

    @property
    def label(self) -> str:
        return self.name if len(self.runs) == 1 else f"{self.name}, {len(self.runs)} runs"


def plot(runs: Sequence[str], out: Path, *, metrics: Sequence[str] = (), smooth: int = 1) -> dict[str, Any]:
    """Draw runs side by side; returns what was drawn.

    Args:
        runs: folders of ``rlfr train-rl``, each ``PATH`` or ``NAME=PATH``.
        out: a .png or .svg file.
        metrics: keys of ``metrics.jsonl`` to draw in place of the usual ones.
        smooth: each point is the mean of this many steps, the last of which is its own; 1 draws what was measured.

    Raises:
        RlfrError: a path that is no run, a run without steps, a name of no metric, another file type.
    """
    if out.suffix.lower() not in (".png", ".svg") or out.is_dir():
        raise ConfigError(f"--out must be a file whose name ends with .png or .svg, got {str(out)!r}")
    groups = read_groups(runs)
    panels = _panels(metrics, groups)
    _draw(groups, panels, out, smooth)
    return {
        "out": str(out),
        "groups": {group.name: len(group.runs) for group in groups},
        "panels": [panel.key for panel in panels],
    }


def read_groups(runs: Sequence[str]) -> list[Group]:
    """Runs by name, in the order in which the names first come up.

    A path without a name is a group of its own, called by its folder, or by its whole path where two folders share
    a name.
    """
    split = [_split(text) for text in runs]
    folders = Counter(path.absolute().name for name, path in split if name is None)
    named: dict[str, list[Path]] = {}
    for name, path in split:
        folder = path.absolute().name
        named.setdefault(name or (folder if folders[folder] == 1 else str(path)), []).append(path)
    return [Group(name, [_read(path) for path in paths]) for name, paths in named.items()]


def _split(text: str) -> tuple[str | None, Path]:
    name, equals, path = text.partition("=")
    return (name, Path(path)) if equals and name and not Path(text).exists() else (None, Path(text))


def _read(path: Path) -> list[dict[str, Any]]:
    metrics = RunFolder.open(path).read_metrics()
    if not metrics:
        raise InputError(f"{path} has no step in its metrics.jsonl yet")
    return metrics


def series(run: Sequence[Mapping[str, Any]], key: str) -> Series:
    """A metric's numbers by step, without the steps where it has none."""
    found = {line["step"]: line.get(key) for line in run}
    return {
        step: float(value)
        for step, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def smoothed(values: Series, window: int) -> Series:
    """The mean over each logged step and those before it, ``window`` of them, or as many as there are."""
    numbers = list(values.values())
    result = {}
    for place, step in enumerate(values):
        last = numbers[max(0, place + 1 - window) : place + 1]
        result[step] = sum(last) / len(last)
    return result


def band(runs: Sequence[Series]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps that all runs have, with mean, smallest and largest; runs without any number do not count."""
    known = [values for values in runs if values]
    steps = sorted(set.intersection(*(set(values) for values in known))) if known else []
    columns = [[values[step] for values in known] for step in steps]
    return steps, [sum(c) / len(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def _panels(metrics: Sequence[str], groups: Sequence[Group]) -> list[Panel]:
    """The usual panels that have data, or those that were asked for."""
    runs = [run for group in groups for run in group.runs]
    usual = {panel.key: panel for panel in PANELS}
    asked = [usual.get(key, Panel(key, key)) for key in metrics] if metrics else list(PANELS)
    panels = [panel for panel in asked if any(series(run, panel.key) for run in runs)]
    missing = [panel.key for panel in asked if panel not in panels]
    if not panels or (metrics and missing):
        known = {key for run in runs for line in run for key in line if series(run, key)}
        raise InputError(
            f"none of the runs has numbers of {', '.join(missing)}", hint=f"there are {', '.join(sorted(known))}"
        )
    return panels


def _draw(groups: Sequence[Group], panels: Sequence[Panel], out: Path, smooth: int) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    style: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "text.parse_math": False,  # a name with dollar signs is a name
        "svg.hashsalt": "rlfr",
    }
    with matplotlib.rc_context(style):
        figure = Figure(
            figsize=(columns * PANEL_WIDTH, rows * PANEL_HEIGHT + HEAD_HEIGHT), layout="constrained", dpi=130
        )
        FigureCanvasAgg(figure)
        for place, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, place + 1)
            for index, group in enumerate(groups):
                _draw_group(axes, panel, group, _look(index), smooth, shift=index - (len(groups) - 1) / 2)
            if panel.level is not None:
                axes.axhline(panel.level, color="0.5", linewidth=0.8, linestyle=":", zorder=0)
            if axes.dataLim.y0 == axes.dataLim.y1 == 0:
                axes.set_ylim(-0.05, 1)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
            axes.set_title(panel.title, fontsize=9, loc="left")
            if place + columns >= len(panels):
                axes.set_xlabel("step")
        handles = [Line2D([], [], **_look(index)) for index in range(len(groups))]
        # Matplotlib leaves out what begins with an underscore.
        names = [group.label if not group.label.startswith("_") else " " + group.label for group in groups]
        figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False)
        figure.supxlabel("; ".join(_notes(groups, panels, smooth)), x=0.01, horizontalalignment="left", fontsize=8)
        kind = out.suffix.lower().removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        write_atomically(out, lambda partial: figure.savefig(partial, format=kind, metadata=metadata))


def _draw_group(axes: Any, panel: Panel, group: Group, look: dict[str, Any], smooth: int, shift: float) -> None:
    # Held-out accuracy is measured now and then, so each point is marked, and none is averaged with another.
    measured = panel.interval is not None
    found = [series(run, panel.key) for run in group.runs]
    runs = found if measured else [smoothed(values, smooth) for values in found]
    steps, means, lows, highs = band(runs)
    if not steps:
        return
    axes.plot(steps, means, marker="o" if measured or len(steps) == 1 else None, markersize=3, **look)
    if len(group.runs) > 1:
        axes.fill_between(steps, lows, highs, color=look["color"], alpha=0.18, linewidth=0)
    elif panel.interval is not None:
        ends = [series(group.runs[0], key) for key in panel.interval]
        both = [step for step in steps if step in ends[0] and step in ends[1]]
        # Beside each other, since runs are measured at the same steps.
        places = [step + 0.012 * shift * (steps[-1] - steps[0]) for step in both]
        axes.vlines(places, *([of_end[step] for step in both] for of_end in ends), color=look["color"], linewidth=0.9)


def _look(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        # What is drawn first is broader, so that it shows beneath another that is the same.
        "linewidth": (2.4, 1.8, 1.3)[min(index, 2)],
    }


def _notes(groups: Sequence[Group], panels: Sequence[Panel], smooth: int) -> list[str]:
    """What bands, bars and lines stand for, where it is not plain."""
    sizes = [len(group.runs) for group in groups]
    notes = []
    if max(sizes) > 1:
        notes.append("band: from the smallest to the largest run, line: their mean")
    if min(sizes) == 1 and any(panel.interval for panel in panels):
        notes.append("bars: 95 % interval")
    if smooth > 1:
        notes.append(f"mean of the last {smooth} steps")
    return notes
