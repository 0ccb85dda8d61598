"""Quickstarts of several seeds in one table: ``python -m rlfr_cli.report.seeds RUN_OF_SEED_0 RUN_OF_SEED_1 …``.

Reads the ``eval-*`` folders of each run; prints every seed's accuracy, and the mean over seeds of the gain over
the base policy with its 95 % t interval. The seeds are the unit here: the interval covers the luck of training.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rlfr_cli import console
from rlfr_cli.errors import InputError, RlfrError
from rlfr_cli.grading.statistics import student_t_quantile
from rlfr_cli.report.compare import read_evaluation
from rlfr_cli.report.tables import text_table

BASE = "base"


def read_runs(runs: list[Path]) -> dict[str, list[float]]:
    """Accuracy of every evaluation by its name, one number a run, in the order given.

    Raises:
        InputError: a run without evaluations, or runs with different ones.
    """
    accuracies: dict[str, list[float]] = {}
    for run in runs:
        folders = sorted(run.glob("eval-*"))
        if not folders:
            raise InputError(f"{run} holds no eval-* folders", hint="run pipelines/quickstart.sh there first")
        for folder in folders:
            evaluation = read_evaluation(folder.name.removeprefix("eval-"), folder)
            value = evaluation.accuracy.value
            assert value is not None
            accuracies.setdefault(evaluation.name, []).append(value)
    uneven = [name for name, values in accuracies.items() if len(values) != len(runs)]
    if uneven or BASE not in accuracies:
        raise InputError(f"the runs do not hold the same evaluations: {', '.join(uneven) or 'no eval-base'}")
    return accuracies


def seeds_table(accuracies: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row a policy: each seed's accuracy, their mean, and the mean gain over the base with its interval."""
    names = [BASE, *(name for name in accuracies if name != BASE)]
    rows = []
    for name in names:
        values = accuracies[name]
        gains = [value - base for value, base in zip(values, accuracies[BASE], strict=True)]
        rows.append(
            {
                "policy": name,
                **{f"run {index + 1}": f"{100 * value:.1f}" for index, value in enumerate(values)},
                "mean": f"{100 * mean(values):.1f}",
                "gain": "-" if name == BASE else f"{100 * mean(gains):+.1f}",
                "95 % interval": "-" if name == BASE else _interval(gains),
            }
        )
    return rows


def _interval(gains: list[float]) -> str:
    if len(gains) < 2:
        return "-"
    half = student_t_quantile(len(gains) - 1) * stdev(gains) / math.sqrt(len(gains))
    return f"{100 * (mean(gains) - half):+.1f} to {100 * (mean(gains) + half):+.1f}"


def main() -> int:
    """Read run folders and print the table."""
    parser = argparse.ArgumentParser(prog="python -m rlfr_cli.report.seeds", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    try:
        rows = seeds_table(read_runs(parser.parse_args().runs))
    except RlfrError as error:
        console.error(error.message, hint=error.hint)
        return error.exit_code
    print("\n".join(text_table(rows)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
