"""Parts of the work in one folder: real processes that start, write, die and finish at the same moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rlfr_cli.artifacts import files, shards
from rlfr_cli.artifacts.folder import ArtifactFolder, StageFolder
from rlfr_cli.errors import OutputInUseError, WorkError

FACTS: dict[str, Any] = {
    "kind": "eval",
    "config": {"temperature": 1.0},
    "inputs": {"data": "f00d"},
    "seed": 7,
    "num_units": 7,
    "extra": {"num_problems": 7},
}
FORK = multiprocessing.get_context("fork")


def start(path: Path, **options: Any) -> StageFolder:
    return StageFolder.open_for_writing(path, **(FACTS | options))


def table(unit: int, *, length: int = 2) -> pa.Table:
    return pa.table({"x": [unit] * length})


def do_part(path: Path, part: tuple[int, int] | None) -> StageFolder:
    stage = start(path)
    if part is not None:
        stage.mark_part(part)
    for unit in stage.missing_units(part):
        stage.write_table(unit, table(unit))
    return stage


def contents(path: Path) -> dict[str, bytes]:
    """Every file and every folder, hidden ones too."""
    return {str(entry.relative_to(path)): entry.read_bytes() if entry.is_file() else b"" for entry in path.rglob("*")}


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """What one process writes."""
    assert do_part(tmp_path / "whole", None).finish()
    return contents(tmp_path / "whole")


def run_at_once(*works: Callable[[Any], object]) -> list[Any]:
    """Results of some work in as many processes; each is given a barrier that they all share."""
    barrier, results = FORK.Barrier(len(works)), FORK.Queue()

    def run(index: int) -> None:
        try:
            result = works[index](barrier)
        except Exception as error:  # shown by the test that did not expect it
            result = f"{type(error).__name__}: {error}"
        results.put((index, result))

    processes = [FORK.Process(target=run, args=(index,)) for index in range(len(works))]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in works)
    for process in processes:
        process.join()
    return [found[index] for index in range(len(works))]


@pytest.mark.parametrize("attempt", range(5))
def test_parts_that_start_at_the_same_moment_equal_one_process(
    tmp_path: Path, whole: dict[str, bytes], attempt: int
) -> None:
    def work(part: tuple[int, int]) -> Callable[[Any], object]:
        def run(barrier: Any) -> object:
            barrier.wait()
            return do_part(tmp_path / "parts", part).finish()

        return run

    finished = run_at_once(*(work((index, 4)) for index in (1, 2, 3, 4)))
    assert set(finished) <= {True, False}, finished
    assert True in finished, "the last one in completes the folder"
    assert contents(tmp_path / "parts") == whole


@pytest.mark.parametrize("attempt", range(5))
def test_the_last_two_may_finish_together(tmp_path: Path, whole: dict[str, bytes], attempt: int) -> None:
    def work(part: tuple[int, int]) -> Callable[[Any], object]:
        def run(barrier: Any) -> object:
            stage = do_part(tmp_path / "parts", part)
            barrier.wait()
            return stage.finish()

        return run

    do_part(tmp_path / "parts", (2, 3)).finish()
    assert run_at_once(work((1, 3)), work((3, 3))) == [True, True]
    assert contents(tmp_path / "parts") == whole


def test_of_two_configs_that_start_at_once_one_is_refused(tmp_path: Path) -> None:
    def work(seed: int) -> Callable[[Any], object]:
        def run(barrier: Any) -> object:
            barrier.wait()
            try:
                stage = start(tmp_path / "out", seed=seed)
            except OutputInUseError:
                return "refused"
            for unit in stage.missing_units():
                stage.write_table(unit, table(seed))
            return stage.finish()

        return run

    results = run_at_once(work(1), work(2))
    assert sorted(map(str, results)) == ["True", "refused"]
    artifact = ArtifactFolder(tmp_path / "out", "eval")
    seed = artifact.stage["seed"]
    assert results[seed - 1] is True
    assert {value for unit in range(7) for value in artifact.read_table(unit)["x"].to_pylist()} == {seed}


def test_a_config_that_comes_between_looking_and_writing_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.flush_to_disk

    def other_is_quicker(path: Path) -> None:
        monkeypatch.setattr(files, "flush_to_disk", real)
        start(tmp_path, seed=1)
        real(path)

    monkeypatch.setattr(files, "flush_to_disk", other_is_quicker)
    with pytest.raises(OutputInUseError, match="seed: 1 there, 2 here"):
        start(tmp_path, seed=2)
    assert start(tmp_path, seed=1).continued


@pytest.mark.parametrize("killed_while", ["writing a shard", "writing a record", "beginning"])
def test_a_killed_part_is_run_again_alone_and_leaves_no_trace(
    tmp_path: Path, whole: dict[str, bytes], killed_while: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    out = tmp_path / "parts"
    # Flushing comes when the bytes are written and the file has not its name yet: stage.json, then shard and record.
    real, flushes = files.flush_to_disk, []
    dies_at = {"beginning": 1, "writing a shard": 4, "writing a record": 5}[killed_while]

    def flush(path: Path) -> None:
        flushes.append(path)
        real(path) if len(flushes) < dies_at else die()

    with monkeypatch.context() as patch:
        patch.setattr(files, "flush_to_disk", flush)
        process = FORK.Process(target=do_part, args=(out, (1, 3)))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(out.rglob(".*.partial/*"))) == 1, "it was killed in the middle of a file"
    do_part(out, (2, 3)).finish()
    unfinished = do_part(out, (3, 3))
    assert not unfinished.finish()
    assert unfinished.missing == ([0, 3, 6] if killed_while == "beginning" else [3, 6])
    assert unfinished.num_parts() == 3
    assert do_part(out, (1, 3)).finish()
    assert contents(out) == whole


def test_a_unit_that_is_done_is_not_written_again(tmp_path: Path) -> None:
    first, second = start(tmp_path), start(tmp_path)
    record = first.write_table(3, table(3))
    assert second.write_table(3, table(4, length=5)) == record
    assert first.read_table(3)["x"].to_pylist() == [3, 3]


def test_two_shards_of_one_unit_at_once_leave_a_record_of_the_one_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part given up too early, with vLLM: other tokens of the same unit come between shard and record."""
    late, early = start(tmp_path, num_units=1), start(tmp_path, num_units=1)
    real = shards.sha256_file

    def other_part_writes(path: Path) -> str:
        digest = real(path)
        monkeypatch.setattr(shards, "sha256_file", real)
        early.write_table(0, table(8))
        return digest

    monkeypatch.setattr(shards, "sha256_file", other_part_writes)
    late.write_table(0, table(9))
    assert late.finish()
    artifact = ArtifactFolder(tmp_path, "eval")
    artifact.verify()
    assert artifact.read_table(0)["x"].to_pylist() == [8, 8]


def test_a_part_does_not_write_into_a_folder_that_was_begun_anew(tmp_path: Path) -> None:
    old = start(tmp_path)
    old.write_table(0, table(0))
    new = start(tmp_path, seed=8, overwrite=True)
    for work in (lambda: old.write_table(1, table(1)), old.finish):
        with pytest.raises(WorkError, match="begun anew by another command"):
            work()
    assert new.missing_units() == list(range(7))


def test_a_part_does_not_bring_a_removed_folder_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stage = start(out)
    for entry in (out / "stage.json", out / "shards"):
        entry.unlink() if entry.is_file() else entry.rmdir()
    out.rmdir()
    with pytest.raises(WorkError, match="was removed"):
        stage.write_table(0, table(0))
    assert not out.exists()


def test_an_old_view_of_the_folder_does_not_undo_a_complete_one(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system may list, for some seconds, files as they were."""
    out = tmp_path / "whole"
    real = shards.read_records
    with monkeypatch.context() as patch:
        patch.setattr(shards, "read_records", lambda path: {0: real(path)[0]})
        part = do_part(out, (2, 2))
        assert not part.finish()
    assert part.missing == [1, 2, 3, 4, 5, 6]
    assert do_part(out, None).complete
    assert {name: data for name, data in contents(out).items() if ".part-" not in name} == whole


def test_any_process_can_complete_with_the_facts_of_the_first(tmp_path: Path) -> None:
    do_part(tmp_path, (1, 1))
    assert StageFolder(tmp_path, start(tmp_path).stage, continued=True).finish({"late": 2})
    assert ArtifactFolder(tmp_path, "eval").extra == {"num_problems": 7, "late": 2}


def test_the_number_of_parts_is_known_until_all_is_done(tmp_path: Path) -> None:
    stage = start(tmp_path)
    assert stage.num_parts() is None
    stage.mark_part((2, 16))
    stage.mark_part((2, 3))
    assert stage.num_parts() == 16
    with pytest.raises(OutputInUseError):
        start(tmp_path, seed=8)
    assert do_part(tmp_path, None).finish()
    assert stage.num_parts() is None
