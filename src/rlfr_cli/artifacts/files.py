"""Writing and reading single files: whole or not at all.

A file appears under its own name only after its bytes have reached the disk, so a reader never meets a cut
file, whatever killed the writer. A full disk is an error that says so and leaves nothing behind.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlfr_cli.errors import ArtifactError, MissingInputError, OutputSpaceError

PARTIAL_SUFFIX = ".partial"
SPACE_HINT = "free some space or give another --out; what was finished is kept, and the same command continues"


def write_atomically(path: str | Path, data: bytes | Callable[[Path], object], *, exclusive: bool = False) -> None:
    """Write a file in a temporary folder beside its place, flush it to the disk, then rename it.

    Args:
        path: the file to write; its folder is made where it does not exist.
        data: the bytes, or a function that writes them to the path it is given.
        exclusive: never replace a file.

    Raises:
        OutputSpaceError: the disk or a quota is full; nothing is left behind.
        FileExistsError: ``exclusive``, and the file exists.
    """
    path = Path(path)
    # Processes with other parts of the work may write the same small file at the same moment, so the name is
    # this call's alone. A folder, because safetensors writes a temporary file of its own beside its target.
    partial_folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    partial = partial_folder / path.name
    try:
        with reporting_full_disk(path):
            partial_folder.mkdir(parents=True)
            if isinstance(data, bytes):
                partial.write_bytes(data)
            else:
                data(partial)
            use_folder_permissions(partial)
            flush_to_disk(partial)
            if exclusive:
                _rename_exclusively(partial, path)
            else:
                os.replace(partial, path)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _rename_exclusively(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: a plain check is the best there is
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(partial, path)


def use_folder_permissions(path: Path) -> None:
    """Let those read a file who may read its folder; safetensors writes files for their owner alone."""
    with suppress(OSError):  # some network file systems know no permissions
        path.chmod(path.parent.stat().st_mode & 0o666)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's bytes are on the disk, whoever wrote them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def reporting_full_disk(path: str | Path) -> Iterator[None]:
    """Turn a full disk met inside, also one that safetensors or Arrow reports, into OutputSpaceError."""
    try:
        yield
    except OutputSpaceError:
        raise
    except Exception as error:
        # safetensors raises its own class and keeps the system's error number only in the text.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or (
            f"(os error {errno.ENOSPC})" in str(error) or f"(os error {errno.EDQUOT})" in str(error)
        )
        if not full:
            raise
        free = shutil.disk_usage(_existing_folder(Path(path))).free
        raise OutputSpaceError(
            f"no space left while writing {path} ({human_bytes(free)} free)", hint=SPACE_HINT
        ) from error


def check_free_space(path: str | Path, num_bytes: int) -> None:
    """Refuse before the work starts what would not fit.

    Raises:
        OutputSpaceError: fewer than ``num_bytes`` are free where ``path`` would lie.
    """
    free = shutil.disk_usage(_existing_folder(Path(path))).free
    if free < num_bytes:
        raise OutputSpaceError(
            f"{path} needs about {human_bytes(num_bytes)}, and {human_bytes(free)} are free",
            hint="free some space, or give another --out",
        )


def _existing_folder(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def human_bytes(num_bytes: int) -> str:
    """A size for people: ``human_bytes(3_200_000_000) == "3.2 GB"``."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{num_bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def remove_empty_folders(folder: Path) -> None:
    """Remove a folder and those in it, as far as they are empty."""
    inner = sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True)
    for path in (*inner, folder):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: object, *, indent: int | None = None) -> bytes:
    """JSON that equal values always turn into the same bytes: sorted keys, UTF-8, no NaN.

    Args:
        indent: spaces an indentation step, for files that people read; these end with a newline.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=indent)
    return (text + "\n" if indent is not None else text).encode()


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        MissingInputError: there is no such file.
        ArtifactError: it is not a JSON object.
    """
    try:
        value = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise MissingInputError(f"{path} does not exist") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is cut or altered: it is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def differing_keys(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare two JSON-able mappings; dotted keys whose values differ, with both values.

    A key that one side lacks has the value ``None`` there, since a config has no option that means
    something by being absent.
    """
    flat_there, flat_here = _flatten(there), _flatten(here)
    keys = sorted(flat_there.keys() | flat_here.keys())
    pairs = {key: (flat_there.get(key), flat_here.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def describe_differences(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """One line a differing key: ``  config.temperature: 1.0 there, 0.7 here``."""
    return "\n".join(
        f"  {key}: {_shorten(there)} there, {_shorten(here)} here" for key, (there, here) in differences.items()
    )


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _shorten(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
