"""One shard: a unit of work as a file, and a small record beside it that says what the file must be.

``shards/00003.arrow`` (rows: responses) or ``shards/00003.safetensors`` (rows: sequences), and
``shards/00003.arrow.json`` with its rows, bytes and SHA-256, written after it: a shard without a record was
never finished. Arrow shards are Arrow IPC files, which ``datasets.load_dataset("arrow", data_files=...)``,
Polars and R open; the metadata of both kinds is one key, ``rlfr``, holding JSON with sorted keys.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rlfr_cli.artifacts.files import (
    PARTIAL_SUFFIX,
    canonical_json,
    read_json,
    sha256_file,
    write_atomically,
)
from rlfr_cli.errors import ArtifactError

METADATA_KEY = "rlfr"
SHARD_NAME = re.compile(r"(\d{5,})\.(arrow|safetensors)")
RECORD_NAME = re.compile(r"(\d{5,})\.(arrow|safetensors)\.json")
RUN_AGAIN_HINT = "run the command that wrote it again with --overwrite, or copy the folder again"


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What a shard must be.

    Attributes:
        name: file name in ``shards/``.
        rows: responses of an Arrow shard, sequences of a safetensors shard.
        bytes: size of the file.
        sha256: digest of the file.
    """

    name: str
    rows: int
    bytes: int
    sha256: str

    @property
    def unit(self) -> int:
        return int(self.name.split(".")[0])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def write_table_shard(path: Path, table: pa.Table, metadata: Mapping[str, Any]) -> ShardRecord:
    """Write a table as an Arrow IPC file of one record batch, then its record."""
    # One batch and no schema metadata but ours: equal content gives equal bytes.
    table = table.combine_chunks().replace_schema_metadata({METADATA_KEY: canonical_json(dict(metadata))})

    def write(partial: Path) -> None:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)

    return _write_shard(path, write)


def write_tensor_shard(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> ShardRecord:
    """Write tensors as a safetensors file, then its record; a row is an entry of ``sequence_ids``."""

    def write(partial: Path) -> None:
        save_tensors(partial, tensors, metadata)

    return _write_shard(path, write)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file whose metadata is the one key ``rlfr``."""
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(dense, path, metadata={METADATA_KEY: canonical_json(dict(metadata)).decode()})


def _write_shard(path: Path, write: Any) -> ShardRecord:
    # A record of an earlier shard must never stand beside the new one, were this process killed in between.
    _record_path(path).unlink(missing_ok=True)
    write_atomically(path, write)
    while True:
        measured = path.stat()
        record = ShardRecord(name=path.name, rows=_count_rows(path), bytes=measured.st_size, sha256=sha256_file(path))
        facts = {key: value for key, value in record.to_dict().items() if key != "name"}
        write_atomically(_record_path(path), canonical_json(facts, indent=2))
        # A part that was given up too early may still be at work: its shard of the same unit, with other tokens
        # where the engine is vLLM, can take this one's place before the record is written, which then lies.
        now = path.stat()
        if (now.st_mtime_ns, now.st_size) == (measured.st_mtime_ns, measured.st_size):
            return record


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def read_records(shards: Path) -> dict[int, ShardRecord]:
    """The shards of a folder that are done: those with a record that fits the file's size."""
    names = sorted(path.name for path in shards.glob("*.json") if RECORD_NAME.fullmatch(path.name))
    records = [read_record(shards / name.removesuffix(".json")) for name in names]
    return {record.unit: record for record in records if record is not None}


def read_record(path: Path) -> ShardRecord | None:
    """The record of a shard that is done; None where there is none, or none that fits the file's size."""
    try:
        facts = read_json(_record_path(path))
        record = ShardRecord(
            name=path.name, rows=int(facts["rows"]), bytes=int(facts["bytes"]), sha256=str(facts["sha256"])
        )
        fits = path.stat().st_size == record.bytes
    except (ArtifactError, KeyError, FileNotFoundError):  # as good as not done: the unit is done again
        return None
    return record if fits else None


def check_shard(path: Path, record: ShardRecord) -> None:
    """Check that a shard is there, of the size and with the rows that its record says.

    Raises:
        ArtifactError: it is missing, cut or altered.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} is missing", hint=RUN_AGAIN_HINT)
    if path.stat().st_size != record.bytes:
        raise ArtifactError(
            f"{path} is cut or altered: {path.stat().st_size} bytes, {record.bytes} expected",
            hint=RUN_AGAIN_HINT,
        )
    rows = _count_rows(path)
    if rows != record.rows:
        raise ArtifactError(f"{path} is altered: {rows} rows, {record.rows} expected", hint=RUN_AGAIN_HINT)


def check_digest(path: Path, record: ShardRecord) -> None:
    """Read a whole shard and compare its digest.

    Raises:
        ArtifactError: the bytes are not those that were written.
    """
    digest = sha256_file(path)
    if digest != record.sha256:
        raise ArtifactError(f"{path} is altered: SHA-256 {digest}, {record.sha256} expected", hint=RUN_AGAIN_HINT)


def _count_rows(path: Path) -> int:
    if path.suffix == ".safetensors":
        with open_tensors(path) as tensors:
            if "sequence_ids" not in tensors.keys():  # noqa: SIM118 (not a mapping)
                raise ArtifactError(f"{path} holds no sequence_ids", hint=RUN_AGAIN_HINT)
            return int(tensors.get_slice("sequence_ids").get_shape()[0])
    reader = _open_table(path)
    return sum(reader.get_batch(index).num_rows for index in range(reader.num_record_batches))


def read_table_shard(path: Path) -> pa.Table:
    """An Arrow shard, mapped into memory."""
    return _open_table(path).read_all()


def _open_table(path: Path) -> pa.RecordBatchFileReader:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except pa.ArrowInvalid as error:
        raise ArtifactError(f"{path} is cut or is not an Arrow file ({error})", hint=RUN_AGAIN_HINT) from None


def open_tensors(path: Path) -> Any:
    """A safetensors file, opened lazily; use it in a ``with``.

    Raises:
        ArtifactError: the file is missing, cut or no safetensors file.
    """
    try:
        return safe_open(str(path), framework="pt")
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing", hint=RUN_AGAIN_HINT) from None
    except SafetensorError as error:
        raise ArtifactError(f"{path} is cut or is not a safetensors file ({error})", hint=RUN_AGAIN_HINT) from None


def read_metadata(metadata: Mapping[Any, Any] | None) -> dict[str, Any] | None:
    """Our JSON object in the metadata of an Arrow schema or a safetensors file; None where there is none."""
    text = (metadata or {}).get(METADATA_KEY) or (metadata or {}).get(METADATA_KEY.encode())
    return None if text is None else json.loads(text)


def remove_shards(shards: Path) -> None:
    """Remove shards, records and temporary folders of ours; a file of another name stays."""
    for path in shards.glob("*"):
        if SHARD_NAME.fullmatch(path.name) or RECORD_NAME.fullmatch(path.name):
            path.unlink()
    remove_partials(shards)


def remove_partials(folder: Path, names: str = "*") -> None:
    """Remove the temporary folders that a killed process left.

    Args:
        names: pattern of what they are for.
    """
    for path in folder.glob(f".{names}{PARTIAL_SUFFIX}"):
        shutil.rmtree(path, ignore_errors=True)
