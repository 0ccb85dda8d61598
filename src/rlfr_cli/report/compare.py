"""Evaluations side by side: ``python -m rlfr_cli.report.compare base=EVAL rlvr=EVAL …``.

Reads results of ``rlfr eval`` on the same problems; prints a table of accuracies with 95 % intervals, and what each
differs from the first and from the one before, paired by problem. It says of a difference whether its interval excludes
zero, and no more.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfr_cli import console
from rlfr_cli.artifacts.files import read_json
from rlfr_cli.artifacts.reading import ArtifactFolder
from rlfr_cli.errors import MismatchError, RlfrError
from rlfr_cli.grading.statistics import Estimate, mean_with_interval, paired_difference
from rlfr_cli.report.tables import text_table


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: its name, folder, and share of correct responses by problem."""

    name: str
    path: Path
    accuracy_by_problem: dict[str, float]
    num_samples: int

    @property
    def accuracy(self) -> Estimate:
        return mean_with_interval([[value] for value in self.accuracy_by_problem.values()])


def read_evaluation(name: str, path: Path) -> Evaluation:
    """The results of ``rlfr eval``, whole and unaltered.

    Raises:
        RlfrError: the folder holds no finished evaluation.
    """
    folder = ArtifactFolder(path, "eval")
    folder.verify()
    results = read_json(path / "results.json")
    count = results["samples"]
    shares = {problem: entry["correct"] / count for problem, entry in results["by_problem"].items()}
    return Evaluation(name, path, shares, count)


def compare(evaluations: list[Evaluation]) -> dict[str, Any]:
    """Accuracies, and paired differences of each from the first and of each pair after it.

    Raises:
        MismatchError: evaluations on different problems.
    """
    first = evaluations[0]
    for other in evaluations[1:]:
        if other.accuracy_by_problem.keys() != first.accuracy_by_problem.keys():
            raise MismatchError(f"{first.path} and {other.path} are evaluations of different problems")
    accuracies = [
        {
            "policy": evaluation.name,
            f"avg@{evaluation.num_samples}": _percent(evaluation.accuracy.value),
            "95 % interval": _interval(evaluation.accuracy),
            "results": str(evaluation.path),
        }
        for evaluation in evaluations
    ]
    pairs = [(a, b) for index, a in enumerate(evaluations) for b in evaluations[index + 1 :]]
    differences = []
    for a, b in pairs:
        ids = list(a.accuracy_by_problem)
        estimate = paired_difference(
            [[b.accuracy_by_problem[i]] for i in ids], [[a.accuracy_by_problem[i]] for i in ids]
        )
        differences.append(
            {
                "difference": f"{b.name} - {a.name}",
                "points": _percent(estimate.value, sign=True),
                "95 % interval": _interval(estimate, sign=True),
                "this run shows": _meaning(estimate),
            }
        )
    return {"accuracies": accuracies, "differences": differences}


def _percent(value: float | None, *, sign: bool = False) -> str:
    return "-" if value is None else f"{100 * value:{'+' if sign else ''}.1f}"


def _interval(estimate: Estimate, *, sign: bool = False) -> str:
    return f"{_percent(estimate.low, sign=sign)} to {_percent(estimate.high, sign=sign)}"


def _meaning(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None or estimate.low <= 0 <= estimate.high:
        return "no difference"
    return "a gain" if estimate.low > 0 else "a loss"


def main() -> int:
    """Read ``NAME=FOLDER`` arguments and print the comparison."""
    parser = argparse.ArgumentParser(prog="python -m rlfr_cli.report.compare", description=__doc__.splitlines()[0])
    parser.add_argument("evaluations", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    try:
        named = [text.partition("=") for text in arguments.evaluations]
        result = compare([read_evaluation(name, Path(path or name)) for name, _, path in named])
    except RlfrError as error:
        console.error(error.message, hint=error.hint)
        return error.exit_code
    if arguments.json:
        console.emit_json(result)
        return 0
    print("\n".join(text_table(result["accuracies"])))
    if result["differences"]:
        print("\nPoints of accuracy, paired by problem; the interval covers the choice of problems and samples, not of")
        print("the training seed.\n")
        print("\n".join(text_table(result["differences"])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
