"""Stage folders: order of writing, running again, parts, and what is missing, cut or altered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from rlfr_cli.artifacts import folder as folder_module
from rlfr_cli.artifacts import shards
from rlfr_cli.artifacts.folder import ArtifactFolder, StageFolder
from rlfr_cli.errors import ArtifactError, ConfigError, MissingInputError, OutputInUseError, OutputSpaceError

CONFIG = {"temperature": 1.0, "sampling": {"top_p": 1.0, "layers": (1, 2)}}
FACTS = {"kind": "eval", "config": CONFIG, "inputs": {"data": "f00d"}, "seed": 7, "num_units": 3}


def start(path: Path, **options: Any) -> StageFolder:
    return StageFolder.open_for_writing(path, **(FACTS | options))


def table(unit: int) -> pa.Table:
    return pa.table({"x": [unit, unit + 10], "text": ["a", None]})


def complete(path: Path, **options: Any) -> StageFolder:
    stage = start(path, **options)
    for unit in stage.missing_units():
        stage.write_table(unit, table(unit))
    assert stage.finish({"fact": 1})
    return stage


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_round_trip(tmp_path: Path) -> None:
    complete(tmp_path / "out")
    artifact = StageFolder.open_for_reading(tmp_path / "out", "eval")
    assert artifact.num_rows == 6
    assert artifact.extra == {"fact": 1}
    assert artifact.stage["config"] == {"temperature": 1.0, "sampling": {"top_p": 1.0, "layers": [1, 2]}}
    assert [artifact.read_table(unit)["x"].to_pylist() for unit in range(3)] == [[0, 10], [1, 11], [2, 12]]


def test_equal_work_gives_equal_bytes(tmp_path: Path) -> None:
    complete(tmp_path / "one")
    stage = start(tmp_path / "two")
    for unit in (2, 0, 1):
        # The same rows in two chunks, with foreign metadata.
        halves = [table(unit).slice(0, 1), table(unit).slice(1)]
        stage.write_table(unit, pa.concat_tables(halves).replace_schema_metadata({"b": "1", "a": "2"}))
    stage.finish({"fact": 1})
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert set(contents(tmp_path / "one")) == {
        "stage.json",
        "manifest.json",
        *(f"shards/0000{unit}.arrow{record}" for unit in range(3) for record in ("", ".json")),
    }


def test_metadata_is_one_key_with_sorted_json(tmp_path: Path) -> None:
    stage = start(tmp_path)
    stage.write_table(1, table(1), {"zeta": 1, "alpha": 2})
    assert shards.read_table_shard(tmp_path / "shards" / "00001.arrow").schema.metadata == {
        b"rlfr": b'{"alpha": 2, "format_version": 1, "kind": "eval", "unit": 1, "zeta": 1}'
    }


def test_the_manifest_comes_last(tmp_path: Path) -> None:
    stage = start(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    stage.write_table(0, table(0))
    assert not stage.finish()
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(ArtifactError, match="unfinished: 1 of 3 units are done") as caught:
        ArtifactFolder(tmp_path, "eval")
    assert "it continues" in str(caught.value.hint)


def test_the_same_config_continues_and_then_is_complete(tmp_path: Path) -> None:
    start(tmp_path).write_table(1, table(1))
    again = start(tmp_path)
    assert (again.continued, again.complete, again.missing_units()) == (True, False, [0, 2])
    complete(tmp_path)
    done = start(tmp_path)
    assert (done.complete, done.missing_units()) == (True, [])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"config": CONFIG | {"temperature": 0.5}}, "config.temperature: 1.0 there, 0.5 here"),
        ({"inputs": {"data": "beef"}}, 'inputs.data: "f00d" there, "beef" here'),
        ({"seed": 8}, "seed: 7 there, 8 here"),
        ({"num_units": 4}, "num_units: 3 there, 4 here"),
        ({"kind": "scores"}, 'kind: "eval" there, "scores" here'),
        ({"format_version": 2}, "format_version: 1 there, 2 here"),
    ],
)
def test_another_configs_work_is_refused_with_the_ways_out(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    start(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(OutputInUseError) as caught:
        start(tmp_path, **options)
    assert said in caught.value.message
    assert len(caught.value.message.splitlines()) == 2
    assert "--overwrite" in str(caught.value.hint)
    assert "--out" in str(caught.value.hint)
    with pytest.raises(OutputInUseError):
        StageFolder.check_for_writing(tmp_path, **(FACTS | options))
    StageFolder.check_for_writing(tmp_path, **(FACTS | options), overwrite=True)
    StageFolder.check_for_writing(tmp_path, **FACTS)
    StageFolder.check_for_writing(tmp_path / "new", **FACTS)
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_other_package_versions_are_only_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path)
    monkeypatch.setattr(folder_module, "package_versions", lambda: {"torch": "99"})
    assert any(line.startswith("  torch:") for line in start(tmp_path).version_differences)


def test_foreign_folders_and_files_are_refused_even_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputInUseError, match=r"thesis\.tex"):
            start(tmp_path, overwrite=overwrite)
    with pytest.raises(OutputInUseError, match="is a file"):
        start(tmp_path / "thesis.tex")
    assert contents(tmp_path) == {"thesis.tex": b"mine"}
    (tmp_path / "stage.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match=r"stage\.json is altered"):
            start(tmp_path, overwrite=overwrite)
    assert (tmp_path / "stage.json").read_text() == "{}"


def test_overwrite_removes_only_what_is_ours(tmp_path: Path) -> None:
    complete(tmp_path, files=["results.json"])
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "shards" / "readme").write_text("mine")
    (tmp_path / "shards" / ".00009.arrow.aaaa.partial").mkdir()
    (tmp_path / "shards" / ".00009.arrow.aaaa.partial" / ".tmpXYZ").write_text("left over")
    fresh = start(tmp_path, config={"other": 1}, overwrite=True)
    assert (fresh.continued, fresh.missing_units()) == (False, [0, 1, 2])
    assert set(contents(tmp_path)) == {"stage.json", "notes.txt", "shards/readme"}


def test_files_beside_the_shards_are_in_the_manifest(tmp_path: Path) -> None:
    stage = start(tmp_path, num_units=0, kind="flow-fit", files=["last.safetensors", "results.json"])
    (tmp_path / "results.json").write_text("{}")
    assert not stage.complete
    assert stage.finish()
    artifact = ArtifactFolder(tmp_path, "flow-fit")
    artifact.verify()
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"results\.json is altered"):
        ArtifactFolder(tmp_path, "flow-fit").verify()
    (tmp_path / "results.json").write_text("{} ")
    with pytest.raises(ArtifactError, match=r"results\.json is cut"):
        ArtifactFolder(tmp_path, "flow-fit")


def test_parts_are_disjoint_and_cover_everything(tmp_path: Path) -> None:
    stage = start(tmp_path, num_units=7)
    parts = [stage.missing_units((index, 3)) for index in (1, 2, 3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]
    for wrong in ((0, 3), (4, 3)):
        with pytest.raises(ConfigError, match="does not exist"):
            stage.missing_units(wrong)


def test_a_kill_between_shard_and_record_redoes_the_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = start(tmp_path)
    stage.write_table(0, table(0))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "ShardRecord", killed)
        with pytest.raises(KeyboardInterrupt):
            stage.write_table(1, table(1))
    assert (tmp_path / "shards" / "00001.arrow").exists()
    assert start(tmp_path).missing_units() == [1, 2]
    complete(tmp_path)
    complete(tmp_path.with_name("other"))
    assert contents(tmp_path) == contents(tmp_path.with_name("other"))


def test_a_stale_record_never_stands_beside_a_new_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = start(tmp_path)
    stage.write_table(0, table(0))
    shard = tmp_path / "shards" / "00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "sha256_file", killed)
    with pytest.raises(KeyboardInterrupt):
        # Other rows of the same size: the record left from before would fit.
        stage.write_table(0, table(5))
    monkeypatch.undo()
    assert start(tmp_path).missing_units() == [0, 1, 2]


def test_a_cut_shard_is_redone_even_after_the_manifest(tmp_path: Path) -> None:
    complete(tmp_path)
    shard = tmp_path / "shards" / "00001.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    again = start(tmp_path)
    assert (again.complete, again.missing_units()) == (False, [1])
    again.write_table(1, table(1))
    assert not (tmp_path / "manifest.json").exists(), "it spoke of the shard that was cut"
    complete(tmp_path)
    assert shard.read_bytes() == whole


def test_a_full_disk_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = start(tmp_path)
    stage.write_table(0, table(0))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pa, "OSFile", full)
    with pytest.raises(OutputSpaceError, match=r"shards/00001\.arrow"):
        stage.write_table(1, table(1))
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [
        "00000.arrow",
        "00000.arrow.json",
    ]
    assert start(tmp_path).missing_units() == [1, 2]


def test_what_a_killed_writer_left_is_swept_at_the_end(tmp_path: Path) -> None:
    stage = start(tmp_path)
    (tmp_path / "shards" / ".00000.arrow.aaaa.partial").mkdir()
    (tmp_path / "shards" / ".00000.arrow.aaaa.partial" / "00000.arrow").write_text("cut")
    for unit in stage.missing_units():
        stage.write_table(unit, table(unit))
    stage.finish()
    assert [path.name for path in (tmp_path / "shards").glob(".*")] == []


def test_a_cut_shard_is_named_on_opening(tmp_path: Path) -> None:
    complete(tmp_path)
    shard = tmp_path / "shards" / "00002.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"00002\.arrow is cut or altered: \d+ bytes, \d+ expected"):
        ArtifactFolder(tmp_path, "eval")


def test_a_missing_shard_is_named_on_opening(tmp_path: Path) -> None:
    complete(tmp_path)
    (tmp_path / "shards" / "00000.arrow").unlink()
    with pytest.raises(ArtifactError, match=r"00000\.arrow is missing"):
        ArtifactFolder(tmp_path, "eval")


def test_an_unlisted_shard_is_named_on_opening(tmp_path: Path) -> None:
    complete(tmp_path)
    (tmp_path / "shards" / "00007.arrow").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"00007\.arrow is not in the manifest"):
        ArtifactFolder(tmp_path, "eval")


def test_an_altered_byte_is_found_on_the_first_full_read(tmp_path: Path) -> None:
    complete(tmp_path)
    shard = tmp_path / "shards" / "00001.arrow"
    data = bytearray(shard.read_bytes())
    place = data.index((11).to_bytes(8, "little"))
    data[place] ^= 1
    shard.write_bytes(data)
    artifact = ArtifactFolder(tmp_path, "eval")
    artifact.read_table(0)
    assert artifact.read_table(1, verify=False)["x"].to_pylist() == [1, 10]
    with pytest.raises(ArtifactError, match=r"00001\.arrow is altered: SHA-256"):
        artifact.read_table(1)


def test_a_wrong_row_count_is_found_on_opening(tmp_path: Path) -> None:
    complete(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][0]["rows"] = 3
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"00000\.arrow is altered: 2 rows, 3 expected"):
        ArtifactFolder(tmp_path, "eval")


@pytest.mark.parametrize("file", ["stage.json", "manifest.json"])
def test_another_format_version_is_refused(tmp_path: Path, file: str) -> None:
    complete(tmp_path)
    values = json.loads((tmp_path / file).read_text()) | {"format_version": 99}
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=f"{file} has format version 99; .* reads version 1 of eval"):
        ArtifactFolder(tmp_path, "eval")


def test_a_manifest_that_lacks_shards_is_refused(tmp_path: Path) -> None:
    complete(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["shards"][2]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="names 2 shards"):
        ArtifactFolder(tmp_path, "eval")
    del manifest["shards"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"manifest\.json is altered"):
        ArtifactFolder(tmp_path, "eval")


def test_what_is_no_artifact_or_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="does not exist"):
        ArtifactFolder(tmp_path / "gone", "eval")
    with pytest.raises(ArtifactError, match=r"no stage\.json"):
        ArtifactFolder(tmp_path, "eval")
    complete(tmp_path / "out")
    with pytest.raises(ArtifactError, match="holds eval, and rollouts are needed"):
        ArtifactFolder(tmp_path / "out", "rollouts")


def test_the_fingerprint_is_of_content(tmp_path: Path) -> None:
    complete(tmp_path / "a")
    complete(tmp_path / "b", seed=8)
    other = start(tmp_path / "c")
    for unit in range(3):
        other.write_table(unit, table(unit + 1))
    other.finish()
    a, b, c = (ArtifactFolder(tmp_path / name, "eval").fingerprint for name in "abc")
    # The unit's number is the only metadata, so the same rows in the same units are the same content.
    assert a == b
    assert a != c


def test_tensor_shards(tmp_path: Path) -> None:
    stage = start(tmp_path, kind="latents", num_units=1)
    tensors = {"b": torch.zeros(4, 2), "a": torch.ones(2, 2).T, "sequence_ids": torch.tensor([5, 6, 7])}
    record = stage.write_tensors(0, tensors)
    assert record.rows == 3
    other = start(tmp_path / "other", kind="latents", num_units=1)
    other.write_tensors(0, dict(reversed(tensors.items())))
    assert contents(tmp_path / "other" / "shards") == contents(tmp_path / "shards")
    stage.finish()
    artifact = ArtifactFolder(tmp_path, "latents")
    with shards.open_tensors(artifact.tensor_shard(0)) as opened:
        assert opened.get_tensor("sequence_ids").tolist() == [5, 6, 7]
        assert shards.read_metadata(opened.metadata()) == {"format_version": 2, "kind": "latents", "unit": 0}
