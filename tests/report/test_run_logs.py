"""Metrics of a run reach every log that was asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlfr_cli.artifacts.run_folder import RunFolder
from rlfr_cli.config.common import ProblemsConfig
from rlfr_cli.config.train_rl import RunConfig, TrainRlConfig
from rlfr_cli.errors import MissingPackageError
from rlfr_cli.report.run_logs import RunLogs


def config(**run: object) -> TrainRlConfig:
    return TrainRlConfig(model="m", problems=ProblemsConfig(data="d"), run=RunConfig(**run))


def test_metrics_go_to_the_file_and_to_tensorboard(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", config={}, inputs={})
    with RunLogs(config(), folder.path, 0) as logs:
        logs.add(folder, 1, {"rollout/reward": 0.5, "flow/auc": None})
    assert folder.read_metrics() == [{"step": 1, "rollout/reward": 0.5, "flow/auc": None}]
    assert list((folder.path / "tensorboard").glob("events*"))


def test_tensorboard_can_be_left_out(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", config={}, inputs={})
    with RunLogs(config(tensorboard=False), folder.path, 0) as logs:
        logs.add(folder, 1, {"rollout/reward": 0.5})
    assert not (folder.path / "tensorboard").exists()


def test_a_missing_wandb_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match="pip install"):
        RunLogs(config(tensorboard=False, wandb="project"), tmp_path, 0)
