"""Rows of `rlfr plan`: units, and what was assumed."""

from __future__ import annotations

import pytest

from planning.small_settings import QWEN_7B, make_setting
from rlfr_cli.planning.memory import PARTS, Phase
from rlfr_cli.planning.stages import StagePlan
from rlfr_cli.planning.work import Work
from rlfr_cli.report.plan_tables import assumptions, generation_utilisation, tables


def test_rows_are_in_gigabytes_petaflop_and_hours() -> None:
    phase = Phase("update", {"weights": 2e9, "logits": 5e8})
    work = Work(3e6, 2, generation=989e12 * 3600, other={"flow": 989e12 * 3600})
    made = tables(
        [StagePlan("train-rl", (phase,), {"rollouts": 7e9}, work)], make_setting(QWEN_7B, generation_utilisation=0.5)
    )
    assert made["gpu_memory_gb"] == [
        {"stage": "train-rl", "phase": "update", **dict.fromkeys(PARTS, 0), "weights": 2.0, "logits": 0.5, "total": 2.5}
    ]
    assert made["disk_gb"] == [{"stage": "train-rl", "artifact": "rollouts", "gb": 7.0}]
    (row,) = made["work"]
    assert row["million_tokens"] == 3.0
    assert row["generation_pflop"] == row["flow_pflop"] == pytest.approx(989 * 3.6)
    assert (row["reading_pflop"], row["training_pflop"], row["gpus"]) == (0, 0, 2)
    assert row["hours"] == pytest.approx((1 / 0.5 + 1 / 0.4) / 2)


def test_stages_that_draw_nothing_have_no_share_for_drawing() -> None:
    setting = make_setting(QWEN_7B)
    assert generation_utilisation(setting, "fit-flow") == 1.0
    assert generation_utilisation(setting, "eval") == 0.01
    assert generation_utilisation(make_setting(QWEN_7B, engine="auto"), "eval") == 0.1


def test_guesses_and_what_was_not_measured_are_said() -> None:
    alone = " ".join(row["assumption"] for row in assumptions(make_setting(QWEN_7B, response_tokens=99), 0))
    assert "10,000 problems" in alone
    assert "responses of 99" in alone
    assert "(a guess)" in alone
    assert "DeepSpeed" not in alone
    assert "vLLM" not in alone
    several = " ".join(row["assumption"] for row in assumptions(make_setting(QWEN_7B, engine="vllm"), 3))
    assert "ZeRO stage 3" in several
    assert "vLLM: its weights" in several
