"""Reading a finished artifact: a folder with ``stage.json``, ``shards/`` and ``manifest.json``.

Opening is cheap and strict; what is missing, cut, altered or unfinished is an error that names the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlfr_cli.artifacts import shards as shard_files
from rlfr_cli.artifacts.files import read_json, sha256_file
from rlfr_cli.artifacts.shards import RUN_AGAIN_HINT, ShardRecord
from rlfr_cli.errors import ArtifactError, MissingInputError

FORMAT_VERSIONS = {"rollouts": 1, "latents": 2, "scores": 1, "diagnosis": 1, "eval": 1, "flow-fit": 1, "run": 1}
OLDER_VERSIONS = {"latents": (1,)}  # that are still read: version 1 of latents has none in 8 bits
STAGE_KEYS = ("kind", "format_version", "config", "inputs", "seed", "num_units", "versions", "files")


class ArtifactFolder:
    """A finished artifact, open for reading.

    Opening checks kind, format version, the names and sizes of the files and the rows of the shards. A digest
    is checked on the first full read of a shard.

    Attributes:
        path: the folder.
        stage: the contents of ``stage.json``.
        shards: one record a shard, in order.
        num_rows: rows of all shards.
        num_bytes: bytes of all shards.
        files: size and digest of the files beside the shards, by name.
        extra: facts of the kind.

    Raises:
        MissingInputError: there is no such folder.
        ArtifactError: something is missing, cut, altered or unfinished, or of another kind or format version.
    """

    def __init__(self, path: str | Path, kind: str) -> None:
        self.path = Path(path)
        self.stage = read_stage(self.path)
        if self.stage["kind"] != kind:
            raise ArtifactError(
                f"{path} holds {self.stage['kind']}, and {kind} are needed",
                hint=f"`rlfr show {path}` says what it is",
            )
        check_format_version(self.path / "stage.json", self.stage, kind)
        if not (self.path / "manifest.json").is_file():
            done = len(shard_files.read_records(self.path / "shards"))
            raise ArtifactError(
                f"{path} is unfinished: {done} of {self.stage['num_units']} units are done, "
                "and manifest.json is not written",
                hint="run the command that began it again, with the same options: it continues",
            )
        manifest = read_json(self.path / "manifest.json")
        check_format_version(self.path / "manifest.json", manifest, kind)
        try:
            self.shards = [ShardRecord(**entry) for entry in manifest["shards"]]
            self.num_rows = int(manifest["num_rows"])
            self.num_bytes = int(manifest["num_bytes"])
            self.extra: dict[str, Any] = manifest["extra"]
            self.files: dict[str, dict[str, Any]] = manifest["files"]
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{self.path / 'manifest.json'} is altered ({error!r})", hint=RUN_AGAIN_HINT) from None
        self._verified: set[int] = set()
        self._check_files()

    def _check_files(self) -> None:
        if len(self.shards) != self.stage["num_units"]:
            raise ArtifactError(
                f"{self.path / 'manifest.json'} is altered: it names {len(self.shards)} shards, and "
                f"stage.json {self.stage['num_units']} units",
                hint=RUN_AGAIN_HINT,
            )
        for record in self.shards:
            shard_files.check_shard(self.path / "shards" / record.name, record)
        known = {record.name for record in self.shards}
        for path in sorted((self.path / "shards").glob("*")):
            # A glob over the shards, as other tools use, would read it too.
            if shard_files.SHARD_NAME.fullmatch(path.name) and path.name not in known:
                raise ArtifactError(f"{path} is not in the manifest", hint="move it out of the folder")
        for name, entry in self.files.items():
            file = self.path / name
            if not file.is_file():
                raise ArtifactError(f"{file} is missing", hint=RUN_AGAIN_HINT)
            if file.stat().st_size != entry["bytes"]:
                raise ArtifactError(
                    f"{file} is cut or altered: {file.stat().st_size} bytes, {entry['bytes']} expected",
                    hint=RUN_AGAIN_HINT,
                )

    @property
    def fingerprint(self) -> str:
        """Digest of the content: of the shards' digests, in order."""
        return hashlib.sha256("\n".join(record.sha256 for record in self.shards).encode()).hexdigest()

    def read_table(self, unit: int, *, verify: bool = True) -> pa.Table:
        """An Arrow shard, mapped into memory; its digest is checked the first time, unless told not to."""
        return shard_files.read_table_shard(self._shard_path(unit, verify=verify))

    def tensor_shard(self, unit: int, *, verify: bool = True) -> Path:
        """The path of a safetensors shard; its digest is checked the first time, unless told not to."""
        return self._shard_path(unit, verify=verify)

    def _shard_path(self, unit: int, *, verify: bool) -> Path:
        record = self.shards[unit]
        path = self.path / "shards" / record.name
        if verify and unit not in self._verified:
            shard_files.check_digest(path, record)
            self._verified.add(unit)
        return path

    def verify(self) -> None:
        """Check the digest of every file.

        Raises:
            ArtifactError: naming the first file that was altered.
        """
        for unit in range(len(self.shards)):
            self._shard_path(unit, verify=True)
        for name, entry in self.files.items():
            if sha256_file(self.path / name) != entry["sha256"]:
                raise ArtifactError(f"{self.path / name} is altered", hint=RUN_AGAIN_HINT)


def read_stage(path: str | Path) -> dict[str, Any]:
    """The contents of a folder's ``stage.json``.

    Raises:
        MissingInputError: there is no such folder.
        ArtifactError: it is no artifact of this project.
    """
    path = Path(path)
    if not path.exists():
        raise MissingInputError(f"{path} does not exist", hint="check the path, or run the stage before it")
    if not (path / "stage.json").is_file():
        raise ArtifactError(
            f"{path} is not an artifact of rlfr: it has no stage.json",
            hint=f"`rlfr show {path}` says what it is",
        )
    stage = read_json(path / "stage.json")
    missing = [key for key in STAGE_KEYS if key not in stage]
    if missing:
        raise ArtifactError(f"{path / 'stage.json'} is altered: it lacks {', '.join(missing)}")
    return stage


def check_format_version(file: Path, contents: Mapping[str, Any], kind: str) -> None:
    """Refuse a file that another format version of its kind wrote.

    Raises:
        ArtifactError: naming both versions.
    """
    found, known = contents.get("format_version"), FORMAT_VERSIONS[kind]
    if found != known and found not in OLDER_VERSIONS.get(kind, ()):
        raise ArtifactError(
            f"{file} has format version {found}; this version of rlfr reads version {known} of {kind}",
            hint="read it with the version of rlfr named in its stage.json, or write it again",
        )
