"""What a diagnosis compares, and what its plot says where there is nothing to compare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from rlfr_cli.grading.statistics import problem_areas
from rlfr_cli.report.diagnosis import RESPONSE_CONTROLS, separation_of_responses
from rlfr_cli.report.diagnosis_plots import _separation
from rlfr_cli.report.diagnosis_words import NAMES
from stages.test_diagnose import planted


def test_all_measures_are_compared_on_the_same_responses() -> None:
    """An empty response has an entropy, that of its end, and no score: it counts for neither."""
    responses, tokens = planted(signal=1.0, leak=0.0)
    empty = np.flatnonzero(responses.wrong)[:30]
    kept = ~np.isin(tokens.response, empty)
    entropy = responses.entropy.copy()
    entropy[empty] = -100.0
    columns = {
        name: [value for value, ok in zip(values, kept, strict=True) if ok] if name == "places" else values[kept]
        for name, values in vars(tokens).items()
    }
    found = separation_of_responses(replace(responses, entropy=entropy), replace(tokens, **columns), seed=0)
    rows = {row["measure"]: row for row in found["rows"]}
    others = np.setdiff1d(np.arange(len(responses.wrong)), empty)
    ids = [responses.problem_ids[row] for row in others]
    areas = problem_areas(responses.entropy[others], responses.wrong[others], ids)
    assert rows["entropy"]["within_problems"] == pytest.approx(np.mean(list(areas.values())))
    assert found["compared"] == len(others)
    assert {row["problems"] for row in rows.values()} == {len(areas)}
    best = rows[found["best_control"]]["within_problems"]
    difference = rows["score"]["within_problems"] - max(best, 1 - best)
    assert found["above_best_control"]["value"] == pytest.approx(difference)


def panel_texts(token_rows: list[dict[str, Any]]) -> list[list[str]]:
    names = [*RESPONSE_CONTROLS, "score"]
    row = {"auc": 0.6, "low": 0.5, "high": 0.7, "within_problems": 0.6, "within_low": 0.5, "within_high": 0.7}
    row |= {"problems": 19}
    figure = Figure()
    _separation(
        figure,
        {
            "separation": {"rows": [{"measure": name, **row} for name in names]},
            "first_wrong_token": {"rows": token_rows},
        },
    )
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [NAMES[name] for name in names]
    assert figure.axes[1].get_title() == "Wrong responses, within 19 problems"
    return [[text.get_text() for text in axis.texts] for axis in figure.axes]


def test_a_panel_without_a_number_says_so() -> None:
    assert panel_texts([]) == [[], [], ["nothing to compare"]]
    assert panel_texts([{"measure": "score", "auc": 0.6, "low": 0.5, "high": 0.7}]) == [[], [], []]
