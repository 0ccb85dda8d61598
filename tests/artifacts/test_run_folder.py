"""Run folders: metrics, rollouts and checkpoints, stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlfr_cli.artifacts import run_folder
from rlfr_cli.artifacts.checkpoints import read_manifest
from rlfr_cli.artifacts.rollouts import RolloutRow, rollout_table
from rlfr_cli.artifacts.run_folder import RunFolder
from rlfr_cli.errors import ArtifactError, MissingInputError, OutputInUseError, OutputSpaceError

CONFIG = {"seed": 1, "rollout": {"steps": 10}, "optimiser": {"learning_rate": 1e-6}}
INPUTS = {"model": {"weights_sha256": "ab"}}


def create(path: Path, config: dict[str, Any] = CONFIG, **options: Any) -> RunFolder:
    return RunFolder.create(path, config=config, inputs=INPUTS, **options)


def save(run: RunFolder, step: int, keep: int | None = None) -> None:
    with run.checkpoint(step, keep=keep, extra={"note": step}) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(f'{{"step": {step}}}')
        (folder / "flow.safetensors").write_text("flow")


def rollouts(step: int) -> Any:
    row = RolloutRow(
        problem_id=str(step),
        sample_index=0,
        problem="?",
        answer=[],
        prompt_token_ids=[1],
        response_token_ids=[2],
        response_logprobs=[-1.0],
        response="x",
        finish_reason="stop",
    )
    return rollout_table([row], run=True)


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_run_lies_as_described(tmp_path: Path) -> None:
    run = create(tmp_path / "run")
    run.log_metrics(1, {"reward/mean": 0.5, "policy/loss": float("nan")})
    run.write_rollouts(1, rollouts(1))
    save(run, 1)
    assert names(tmp_path / "run") == ["checkpoints", "config.json", "latest", "metrics.jsonl", "rollouts"]
    assert names(tmp_path / "run" / "rollouts") == ["step-000001"]
    assert names(tmp_path / "run" / "checkpoints" / "step-000001") == [
        "flow.safetensors",
        "manifest.json",
        "model",
    ]
    assert (tmp_path / "run" / "latest").read_text() == "step-000001\n"
    line = '{"policy/loss": null, "reward/mean": 0.5, "step": 1}\n'
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == line
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"] == CONFIG
    assert RunFolder.open(tmp_path / "run").latest_checkpoint() == run.latest_checkpoint()


def test_a_used_folder_is_refused_with_three_ways_out(tmp_path: Path) -> None:
    create(tmp_path / "run")
    with pytest.raises(OutputInUseError, match="already holds a run") as caught:
        create(tmp_path / "run")
    assert all(way in str(caught.value.hint) for way in ("--resume", "--overwrite", "--out"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputInUseError, match="mine"):
            create(tmp_path / "other", **options)
        with pytest.raises(OutputInUseError, match="mine"):
            RunFolder.check_for_writing(tmp_path / "other", config=CONFIG, inputs=INPUTS, **options)


def test_checking_writes_nothing(tmp_path: Path) -> None:
    RunFolder.check_for_writing(tmp_path / "new", config=CONFIG, inputs=INPUTS)
    assert names(tmp_path) == []
    create(tmp_path).log_metrics(1, {})
    for options in ({"overwrite": True}, {"resume": True}):
        RunFolder.check_for_writing(tmp_path, config=CONFIG, inputs=INPUTS, **options)
    with pytest.raises(OutputInUseError, match="already holds a run"):
        RunFolder.check_for_writing(tmp_path, config=CONFIG, inputs=INPUTS)
    assert len(RunFolder.open(tmp_path).read_metrics()) == 1


def test_resuming_removes_what_lies_past_the_checkpoint(tmp_path: Path) -> None:
    run = create(tmp_path)
    for step in range(1, 6):
        run.log_metrics(step, {"x": step})
        run.write_rollouts(step, rollouts(step))
        if step == 3:
            save(run, step)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "x"')
    (tmp_path / "checkpoints" / ".step-000005.partial").mkdir()
    again = create(tmp_path, resume=True)
    assert again.resumed
    assert again.latest_step() == 3
    assert [line["step"] for line in again.read_metrics()] == [1, 2, 3]
    assert names(tmp_path / "rollouts") == ["step-000001", "step-000002", "step-000003"]
    assert names(tmp_path / "checkpoints") == ["step-000003"]
    again.log_metrics(4, {"x": 4})
    assert [line["step"] for line in again.read_metrics()] == [1, 2, 3, 4]


def test_resuming_without_a_checkpoint_starts_from_nothing(tmp_path: Path) -> None:
    assert not create(tmp_path, resume=True).resumed
    run = create(tmp_path, resume=True)
    run.log_metrics(1, {})
    run.write_rollouts(1, rollouts(1))
    again = create(tmp_path, resume=True)
    assert (again.latest_step(), again.latest_checkpoint(), again.read_metrics()) == (0, None, [])
    assert not list((tmp_path).glob("rollouts/step-*"))


def test_resuming_with_another_config_names_the_keys(tmp_path: Path) -> None:
    create(tmp_path)
    longer = CONFIG | {"rollout": {"steps": 20}}
    assert create(tmp_path, longer, resume=True).config["config"]["rollout"]["steps"] == 20
    assert RunFolder.open(tmp_path).config["config"]["rollout"]["steps"] == 20
    with pytest.raises(OutputInUseError) as caught:
        create(tmp_path, longer | {"optimiser": {"learning_rate": 1e-5}}, resume=True)
    assert "config.optimiser.learning_rate: 1e-06 there, 1e-05 here" in caught.value.message
    assert "rollout" not in caught.value.message
    with pytest.raises(OutputInUseError, match=r"inputs\.data"):
        RunFolder.create(tmp_path, config=longer, inputs=INPUTS | {"data": "x"}, resume=True)


def test_the_last_whole_checkpoint_is_found(tmp_path: Path) -> None:
    run = create(tmp_path)
    for step in (1, 2, 3):
        save(run, step)
    (tmp_path / "checkpoints" / "step-000003" / "model" / "config.json").write_text("cut")
    (tmp_path / "checkpoints" / "step-000002" / "flow.safetensors").unlink()
    assert run.checkpoint_steps() == [1]
    again = create(tmp_path, resume=True)
    assert again.latest_checkpoint() == tmp_path / "checkpoints" / "step-000001"
    assert names(tmp_path / "checkpoints") == ["step-000001"]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run = create(tmp_path)
    for step in (1, 2, 3, 4):
        save(run, step, keep=2)
    assert names(tmp_path / "checkpoints") == ["step-000003", "step-000004"]
    assert (tmp_path / "latest").read_text() == "step-000004\n"


def test_a_failed_checkpoint_leaves_nothing_and_latest_stays(tmp_path: Path) -> None:
    run = create(tmp_path)
    save(run, 1)

    def fail(error: BaseException) -> None:
        with run.checkpoint(2) as folder:
            (folder / "half").write_text("half")
            raise error

    for error, expected in (
        (OSError(28, "full"), OutputSpaceError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        with pytest.raises(expected):
            fail(error)
        assert names(tmp_path / "checkpoints") == ["step-000001"]
    assert (tmp_path / "latest").read_text() == "step-000001\n"


def test_a_kill_before_the_rename_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(run, 1)
    monkeypatch.undo()
    assert run.checkpoint_steps() == []
    assert not (tmp_path / "latest").exists()


def test_saving_a_step_again_replaces_it_and_keeps_foreign_files(tmp_path: Path) -> None:
    run = create(tmp_path)
    save(run, 1)
    (tmp_path / "checkpoints" / "step-000001" / "model" / "mine.txt").write_text("mine")
    save(run, 1)
    kept = list((tmp_path / "checkpoints").glob("step-000001.kept-*"))
    assert [path.read_text() for path in kept[0].rglob("*.txt")] == ["mine"]
    assert run.checkpoint_steps() == [1]


def test_overwrite_removes_only_what_is_ours(tmp_path: Path) -> None:
    run = create(tmp_path)
    run.log_metrics(1, {})
    run.write_rollouts(1, rollouts(1))
    save(run, 1)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints" / "step-000001" / "mine.txt").write_text("mine")
    fresh = create(tmp_path, {"seed": 2}, overwrite=True)
    assert not fresh.resumed
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["checkpoints/step-000001/mine.txt", "config.json", "notes.txt"]


def test_an_altered_checkpoint_is_found_by_its_digests(tmp_path: Path) -> None:
    run = create(tmp_path)
    save(run, 1)
    folder = tmp_path / "checkpoints" / "step-000001"
    assert read_manifest(folder, verify=True)["extra"] == {"note": 1}
    (folder / "flow.safetensors").write_text("flew")
    read_manifest(folder)
    with pytest.raises(ArtifactError, match=r"flow\.safetensors is altered"):
        read_manifest(folder, verify=True)


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        RunFolder.open(tmp_path / "gone")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ArtifactError, match="not a run folder"):
        RunFolder.open(tmp_path)
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputInUseError, match="as a model folder does"):
            create(tmp_path, **options)
    assert names(tmp_path) == ["config.json"]
