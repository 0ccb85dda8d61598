"""Plots of a diagnosis: three PNG files from the numbers of ``diagnosis.json``. Matplotlib is imported inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from rlfr_cli.artifacts.files import write_atomically
from rlfr_cli.report.diagnosis_words import NAMES

VELOCITY, SEPARATION, SCORE = PLOTS = ("velocity_error.png", "separation.png", "score.png")
BLUE, GREY, RED = "#2563a8", "#8a8a8a", "#b3372f"


def draw_plots(folder: Path, results: Mapping[str, Any]) -> None:
    """Write all plots of a diagnosis into a folder; equal numbers give equal files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    settings: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    with matplotlib.rc_context(settings):
        for name, draw in ((VELOCITY, _velocity), (SEPARATION, _separation), (SCORE, _score)):
            figure = Figure(layout="constrained", dpi=130)
            draw(figure, results)
            png = BytesIO()
            figure.savefig(png, format="png", metadata={"Software": None})
            write_atomically(folder / name, png.getvalue())


def _velocity(figure: Any, results: Mapping[str, Any]) -> None:
    """Left: errors by timestep. Right: the share of the Gaussian's error that the flow removes."""
    figure.set_size_inches(9, 3.8)
    errors, shares = figure.subplots(1, 2)
    by_layer: dict[int, list[Mapping[str, Any]]] = {}
    for row in results["velocity_error"]["rows"]:
        by_layer.setdefault(row["layer"], []).append(row)
    for number, (layer, rows) in enumerate(by_layer.items()):
        times = [row["timestep"] for row in rows]
        colour = f"C{number}"
        errors.plot(times, [row["flow"] for row in rows], color=colour, marker="o", ms=3, label=f"flow, block {layer}")
        errors.plot(times, [row["gaussian"] for row in rows], color=colour, ls="--", lw=1)
        errors.plot(times, [row["zero"] for row in rows], color=colour, ls=":", lw=1)
        removed = [row["share_of_gaussian_removed"] for row in rows]
        shares.plot(times, removed, color=colour, marker="o", ms=3, label=f"block {layer}")
    errors.set(title="Velocity error (mean over channels)", xlabel="timestep t")
    # Latents that are not normalised have a zero-velocity error far above the others.
    lowest, highest = (choose(line.get_ydata().min() for line in errors.lines) for choose in (min, max))
    if highest > 20 * lowest:
        errors.set_yscale("log")
    else:
        errors.set_ylim(bottom=0)
    shares.axhline(0, color=RED, lw=1)
    shares.set(title="Share of the Gaussian's error removed (below 0: worse)", xlabel="timestep t")
    for time in results["settings"]["timesteps"]:
        shares.axvline(time, color=GREY, lw=0.8, ls="--")
        shares.text(time, 0.02, "rewarded ", transform=shares.get_xaxis_transform(), ha="right", color=GREY)
    errors.plot([], [], color=GREY, ls="--", lw=1, label="per-channel Gaussian")
    errors.plot([], [], color=GREY, ls=":", lw=1, label="zero velocity")
    errors.legend(frameon=False)
    shares.legend(frameon=False)


def _separation(figure: Any, results: Mapping[str, Any]) -> None:
    """Areas under the curve with intervals: responses overall, within problems, and first wrong tokens."""
    figure.set_size_inches(11, 3.8)
    responses, tokens = results["separation"]["rows"], results["first_wrong_token"]["rows"]
    problems = next(row["problems"] for row in responses if row["measure"] == "score")
    panels = (
        ("Wrong responses, overall", responses, ("auc", "low", "high")),
        (f"Wrong responses, within {problems} problems", responses, ("within_problems", "within_low", "within_high")),
        ("First wrong tokens, same place", tokens, ("auc", "low", "high")),
    )
    names = [row["measure"] for row in responses]
    axes = figure.subplots(1, len(panels), sharey=True, sharex=True)
    for axis, (title, rows, keys) in zip(axes, panels, strict=True):
        known = {row["measure"]: [row[key] for key in keys] for row in rows}
        values = [known.get(name, [None] * 3) for name in names]
        _intervals(axis, [NAMES[name] for name in names], values, [name.startswith("score") for name in names])
        axis.set_title(title)
        axis.set_xlabel("area under the curve, 95 % interval\n(above 0.5: larger where wrong)")
        if all(value is None for value, *_ in values):
            axis.text(0.5, 0.5, "nothing to compare", transform=axis.transAxes, ha="center", color=GREY)
        else:
            axis.axvline(0.5, color=RED, lw=1)


def _score(figure: Any, results: Mapping[str, Any]) -> None:
    """What the token score goes with, how far noise draws agree, and how far a few channels make it."""
    figure.set_size_inches(11, 3.4)
    ranks, noise, channels = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    rows = results["correlations"]
    names = [row["with"] for row in rows]
    _intervals(ranks, names, [[row["spearman"], row["low"], row["high"]] for row in rows], [True] * len(rows))
    ranks.axvline(0, color=RED, lw=1)
    identity = results["token_identity"]["cross_validated"]
    ranks.set_title("Rank correlation of the token score")
    ranks.set_xlabel("" if identity is None else f"token identity explains {max(0.0, identity):.0%} of its variance")
    ranks.set_xlim(-1, 1)

    agreement = results["noise_agreement"]["rows"]
    draws = [row["draws"] for row in agreement]
    for key, label, colour in (
        ("spearman", "scores, rank correlation", BLUE),
        ("jaccard_of_rewarded", "rewarded tokens, Jaccard", GREY),
    ):
        values = [float("nan") if row[key] is None else row[key] for row in agreement]
        noise.plot(draws, values, marker="o", ms=4, color=colour, label=label)
    noise.axhline(0.95, color=RED, lw=1)
    noise.set(title="Agreement of two noise draws", xlabel="draws averaged", xscale="log", ylim=(0, 1.02))
    noise.set_xticks(draws, [str(num) for num in draws])
    noise.minorticks_off()
    noise.legend(frameon=False, loc="lower right", title="of a response's tokens")

    layers = [f"block {row['layer']}" for row in results["top_channels"]]
    at = range(len(layers))
    for shift, key, label, colour in (
        (-0.2, "share_of_deviation", "deviation", BLUE),
        (0.2, "share_of_squared_norm", "squared norm", GREY),
    ):
        channels.bar(
            [x + shift for x in at], [row[key] for row in results["top_channels"]], 0.4, color=colour, label=label
        )
    channels.axhline(results["top_channels"][0]["share_if_even"], color=RED, lw=1, label="if channels were equal")
    top = results["top_channels"][0]
    channels.set_title(f"Share of the top {top['channels']} of {top['of']} channels")
    channels.set_xticks(list(at), layers)
    # Room for the legend above the bars.
    channels.set_ylim(0, 1.45 * channels.get_ylim()[1])
    channels.legend(frameon=False, loc="upper left")


def _intervals(axis: Any, names: Sequence[str], values: Sequence[Sequence[float | None]], bold: Sequence[bool]) -> None:
    """One line a name, the first on top; what is not known is left empty."""
    for place, ((value, low, high), is_bold) in enumerate(zip(values, bold, strict=True)):
        colour = BLUE if is_bold else GREY
        if value is not None:
            axis.plot([value], [-place], "o", color=colour, ms=5)
        if low is not None and high is not None:
            axis.plot([low, high], [-place, -place], color=colour, lw=2)
    axis.set_yticks([-place for place in range(len(names))], names)
    axis.set_ylim(-len(names) + 0.5, 0.5)
