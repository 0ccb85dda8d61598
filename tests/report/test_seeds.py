"""Several seeds in one table, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlfr_cli.errors import InputError
from rlfr_cli.report.seeds import read_runs, seeds_table


def test_gain_is_the_mean_of_paired_differences_with_the_t_interval() -> None:
    rows = seeds_table({"base": [0.3, 0.3, 0.3], "rlvr": [0.4, 0.5, 0.6]})
    assert rows[0]["policy"] == "base"
    assert rows[1]["gain"] == "+20.0"
    # s = 0.1, t(0.975, 2) = 4.303: half = 4.303 * 0.1 / sqrt(3) = 0.248
    assert rows[1]["95 % interval"] == "-4.8 to +44.8"
    assert [rows[1][f"run {i}"] for i in (1, 2, 3)] == ["40.0", "50.0", "60.0"]


def test_a_folder_without_evaluations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no eval-"):
        read_runs([tmp_path])
