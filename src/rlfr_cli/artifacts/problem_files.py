"""Rows of a table of problems from whatever holds it: a file, a folder of files, a dataset.

Reads JSON lines, JSON, CSV, Parquet, Arrow (file and stream), folders that ``datasets`` saved, and datasets
by name. Gives one dictionary a row, each with the place it came from, for messages. A file is read as it is
used, so that a million rows need no memory here.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlfr_cli.artifacts.files import sha256_file
from rlfr_cli.errors import ConfigError, InputError, MissingInputError

Rows = Iterator[tuple[str, dict[str, Any]]]

_NOT_UTF8 = "convert it: iconv -f LATIN1 -t UTF-8 OLD > NEW, with the encoding that it has"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class RowSource:
    """The rows as ``(place, row)``, the name for messages, and the SHA-256 of the content."""

    name: str
    fingerprint: str
    rows: Rows


def open_rows(source: str | Path, *, split: str | None, columns: Sequence[str]) -> RowSource:
    """Find out what ``source`` is and start reading it.

    Args:
        source: a path, or a dataset's name with its configuration as in ``openai/gsm8k:main``.
        split: which part of a dataset; files have none.
        columns: those that will be used; of datasets, only these are read and fingerprinted.

    Raises:
        MissingInputError: nothing is there.
        InputError: it cannot be read. Errors in a row are raised when the row is reached.
        ConfigError: a split that is missing, unknown or of no use.
    """
    path = Path(source).expanduser()
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _open_dataset(_load_saved(path), str(source), split, columns)
    if not path.exists():
        if path.suffix not in _READERS and isinstance(source, str) and _HUB_NAME.fullmatch(source):
            return _open_dataset(_load_named(source, split), source, split, columns)
        raise MissingInputError(f"there is no file or folder {source}", hint="check the path")
    if split is not None:
        raise ConfigError(f"{source} has no splits, but split {split!r} was given", hint="leave --split out")
    paths = [path]
    if path.is_dir():
        paths = sorted(file for file in path.iterdir() if file.suffix in _READERS)
        if not paths:
            raise InputError(f"{source} holds no file that ends in {', '.join(_READERS)}")
    elif path.suffix not in _READERS:
        raise InputError(f"{source} does not end in one of {', '.join(_READERS)}", hint="rename or convert it")
    digests = [sha256_file(file) for file in paths]
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return RowSource(str(source), whole, _read_files(paths))


def _read_files(paths: Sequence[Path]) -> Rows:
    for path in paths:
        try:
            yield from _READERS[path.suffix](path)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path} is not UTF-8: it holds the byte {error.object[error.start]:#04x}", hint=_NOT_UTF8
            ) from error
        except (pa.ArrowInvalid, OSError, csv.Error) as error:  # cut, or not the format that its name says
            raise InputError(f"{path} cannot be read: {error}", hint="write the file again") from error


def _read_json_lines(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path} line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{place} is not UTF-8: {error.reason}", hint=_NOT_UTF8) from error
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{place} is not JSON: {error}", hint="each line must be one object, as in {...}"
                ) from error
            yield place, _object(row, place)


def _read_json(path: Path) -> Rows:
    text = path.read_bytes().decode("utf-8-sig")
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):
            yield from _read_json_lines(path)
            return
        raise InputError(f"{path} is not JSON: {error}", hint="a list of objects is wanted") from error
    if isinstance(content, dict) and content and all(isinstance(column, list) for column in content.values()):
        lengths = {name: len(column) for name, column in content.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"{path} has columns of different lengths: {lengths}")
        content = [dict(zip(content, row, strict=True)) for row in zip(*content.values(), strict=True)]
    elif isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise InputError(f"{path} holds one {type(content).__name__}, not a list of objects")
    for index, row in enumerate(content):
        yield f"{path} item {index}", _object(row, f"{path} item {index}")


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{place} is a {type(row).__name__}, not an object with named columns")
    return row


def _read_csv(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            place = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                wanted = len(reader.fieldnames or ())
                extra = len(row.get(None) or ())  # type: ignore[call-overload]
                found = wanted + extra if extra else sum(value is not None for value in row.values())
                raise InputError(f"{place} has {found} fields, not {wanted}", hint='quote text with commas: "a, b"')
            yield place, row


def _read_parquet(path: Path) -> Rows:
    with pq.ParquetFile(path) as file:
        yield from _read_batches(file.iter_batches(batch_size=1024), path)


def _read_arrow(path: Path) -> Rows:
    with pa.memory_map(str(path)) as file:
        start = file.read(6)
        file.seek(0)
        reader: Any = pa.ipc.open_file(file) if start == b"ARROW1" else pa.ipc.open_stream(file)
        batches = reader if start != b"ARROW1" else map(reader.get_batch, range(reader.num_record_batches))
        yield from _read_batches(batches, path)


def _read_batches(batches: Any, path: Path) -> Rows:
    index = 0
    for batch in batches:
        for row in batch.to_pylist():
            yield f"{path} row {index}", row
            index += 1


_READERS = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def _load_saved(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # datasets passes on whatever its readers raise
        raise InputError(f"{path} cannot be opened: {error}", hint="save the dataset again") from error


def _load_named(source: str, split: str | None) -> Any:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # no network, no such dataset, no such split: all kinds of exceptions
        raise InputError(
            f"{source} is no file here, and loading it as a dataset failed: {error}",
            hint="check the path; a dataset is named owner/name or owner/name:configuration, and needs the "
            "network or a cached copy (HF_HUB_OFFLINE=1 uses the cache only)",
        ) from error


def _open_dataset(dataset: Any, name: str, split: str | None, columns: Sequence[str]) -> RowSource:
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        splits = list(dataset)
        if len(splits) > 1 if split is None else split not in splits:
            wrong = "needs a split" if split is None else f"has no split {split!r}"
            raise ConfigError(f"{name} {wrong}; it has {', '.join(splits)}", hint=f"give --split {splits[0]}")
        dataset = dataset[split or splits[0]]
    elif split is not None and dataset.split is not None and str(dataset.split) != split:
        raise ConfigError(f"{name} holds the split {dataset.split}, not {split}", hint="leave --split out")
    used = [column for column in dataset.column_names if column in columns]
    if used:  # columns that nobody asked for may hold images
        dataset = dataset.select_columns(used)
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return RowSource(name, digest.hexdigest(), ((f"{name} row {i}", row) for i, row in enumerate(dataset)))
