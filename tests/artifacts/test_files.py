"""Single files: whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from rlfr_cli.artifacts import files
from rlfr_cli.artifacts.shards import save_tensors
from rlfr_cli.errors import ArtifactError, MissingInputError, OutputSpaceError


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_write_atomically_writes_and_leaves_nothing_else(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "new" / "a.json", b"one")
    files.write_atomically(tmp_path / "new" / "a.json", lambda partial: partial.write_bytes(b"two"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]
    assert (tmp_path / "new" / "a.json").read_bytes() == b"two"


def test_a_failed_write_keeps_the_earlier_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"whole")

    def fail(partial: Path) -> None:
        partial.write_bytes(b"cu")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        files.write_atomically(tmp_path / "a", fail)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"whole")]


def test_exclusive_write_never_replaces(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "a", b"first", exclusive=True)
    with pytest.raises(FileExistsError):
        files.write_atomically(tmp_path / "a", b"second", exclusive=True)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"first")]


def test_exclusive_write_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    files.write_atomically(tmp_path / "a", b"first", exclusive=True)
    with pytest.raises(FileExistsError):
        files.write_atomically(tmp_path / "a", b"second", exclusive=True)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"first")]


def test_full_disk_is_said_and_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OutputSpaceError, match=r"no space left while writing .*a\.bin") as caught:
        files.write_atomically(tmp_path / "a.bin", b"data")
    assert "free some space" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_in_the_words_of_safetensors_is_said(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OutputSpaceError, match=r"a\.safetensors"):
        files.write_atomically(tmp_path / "a.safetensors", fail)
    assert list(tmp_path.iterdir()) == []


def test_those_who_may_read_the_folder_may_read_the_file(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "open" / "a", lambda partial: save_tensors(partial, {"a": torch.zeros(2)}, {}))
    expected = (tmp_path / "open").stat().st_mode & 0o666
    assert (tmp_path / "open" / "a").stat().st_mode & 0o777 == expected


def test_other_failures_stay_what_they_are() -> None:
    with pytest.raises(PermissionError), files.reporting_full_disk("x"):
        raise PermissionError(errno.EACCES, "denied")


def test_check_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000))
    files.check_free_space(tmp_path / "not" / "there", 5_000_000)
    with pytest.raises(OutputSpaceError, match=r"needs about 7\.0 MB, and 5\.0 MB are free") as caught:
        files.check_free_space(tmp_path / "not" / "there", 7_000_000)
    assert caught.value.hint


def test_canonical_json_is_independent_of_order_and_refuses_nan() -> None:
    assert files.canonical_json({"b": 1, "a": "é"}) == '{"a": "é", "b": 1}'.encode()
    with pytest.raises(ValueError):
        files.canonical_json({"a": float("nan")})


def test_read_json_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"gone\.json"):
        files.read_json(tmp_path / "gone.json")
    (tmp_path / "cut.json").write_text('{"a": ')
    with pytest.raises(ArtifactError, match=r"cut\.json is cut"):
        files.read_json(tmp_path / "cut.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ArtifactError, match="a JSON list, not an object"):
        files.read_json(tmp_path / "list.json")


def test_differing_keys() -> None:
    there = {"a": 1, "group": {"x": [1, 2], "y": "same"}}
    here = {"a": 1, "group": {"x": (1, 3), "y": "same"}, "new": True}
    assert files.differing_keys(there, here) == {"group.x": ([1, 2], [1, 3]), "new": (None, True)}


def test_human_bytes() -> None:
    assert [files.human_bytes(n) for n in (0, 999, 1000, 3_200_000_000)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "3.2 GB",
    ]
