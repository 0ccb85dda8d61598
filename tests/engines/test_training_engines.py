"""Which engine is opened, several processes without DeepSpeed, and the trivial parts of the single-process engine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from engines.deepspeed_script import OPTIMISER, Task
from engines.launching import assert_same_steps, assert_same_update, launch_well, make_reference
from rlfr_cli.config.training_engine import TrainingEngineConfig
from rlfr_cli.engines.ranks import ALONE, Ranks
from rlfr_cli.engines.replicated import ReplicatedEngine
from rlfr_cli.engines.single import SingleProcessEngine
from rlfr_cli.engines.training_engines import open_training_engine
from rlfr_cli.errors import MissingPackageError
from tiny_policies import ModelFolders

SEVERAL = Ranks(0, 2, 0, torch.device("cpu"))


def test_one_process_trains_without_deepspeed(model_folders: ModelFolders) -> None:
    config = TrainingEngineConfig()
    engine = open_training_engine(model_folders.policy(), ALONE, config, OPTIMISER, stored_dtype=torch.float32)
    assert type(engine) is SingleProcessEngine


def test_stage_0_trains_copies(model_folders: ModelFolders) -> None:
    config = TrainingEngineConfig(zero_stage=0)
    engine = open_training_engine(model_folders.policy(), SEVERAL, config, OPTIMISER, stored_dtype=torch.float32)
    assert type(engine) is ReplicatedEngine


def test_a_missing_deepspeed_is_named_with_its_extra(
    model_folders: ModelFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("DS_ACCELERATOR", "")
    monkeypatch.setenv("LOCAL_RANK", "")
    config = TrainingEngineConfig(zero_stage=3)
    with pytest.raises(MissingPackageError, match="need the package deepspeed") as caught:
        open_training_engine(model_folders.policy(), ALONE, config, OPTIMISER, stored_dtype=torch.float32)
    assert caught.value.hint == "pip install 'rlfr-cli[deepspeed]'"


@pytest.mark.slow
def test_two_copies_train_as_one_process(model_folders: ModelFolders, tmp_path: Path) -> None:
    """Also a loss of one rank that is not finite, and a checkpoint of one process taken up by two."""
    model = model_folders.folder("qwen2", tied=True)
    reference = make_reference(model, tmp_path / "reference")
    engine = {"zero_stage": 0}
    saved = tmp_path / "saved"
    tasks = [
        Task(name="trained", model=str(model), engine=engine, save=str(saved), whole_policy=True),
        Task(name="bad", model=str(model), engine=engine, spoil="inf"),
        Task(
            name="loaded",
            model=str(reference.folder / "model"),
            engine=engine,
            load=str(reference.folder / "trainer"),
            steps=(4, 4),
        ),
    ]
    two = launch_well(tmp_path, tasks, 2)
    assert_same_steps(two.told("trained")["steps"], reference.steps)
    assert_same_update(two.weights("trained"), reference.third, reference.first)
    assert_same_update(two.weights("trained", ".after"), reference.fourth, reference.third)
    assert [step["stepped"] for step in two.told("bad")["spoiled"]] == [False]
    assert_same_update(two.weights("bad"), reference.third, reference.first)
    assert_same_update(two.weights("loaded"), reference.fourth, reference.third)
    for name in ("model", "trainer"):
        assert {path.name for path in (saved / name).iterdir()} == {p.name for p in (reference.folder / name).iterdir()}
