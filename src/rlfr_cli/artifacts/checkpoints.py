"""A checkpoint of a run: ``model/``, ``flow.safetensors``, ``trainer/`` and ``manifest.json``.

The manifest is written last and names every file with its size and SHA-256; ``model/`` is a plain Hugging
Face model folder. A run that trains adapters writes ``adapter/`` too, in PEFT's format; its ``model/`` may come later,
by `rlfr merge`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlfr_cli.artifacts.files import (
    canonical_json,
    flush_to_disk,
    read_json,
    remove_empty_folders,
    sha256_file,
    use_folder_permissions,
    write_atomically,
)
from rlfr_cli.errors import ArtifactError

CHECKPOINT_FORMAT_VERSION = 1
COPY_HINT = "resume from another checkpoint, or copy the folder again"


def write_manifest(folder: Path, *, step: int, extra: Mapping[str, Any]) -> None:
    """Flush every file of a checkpoint to the disk, then describe them in ``manifest.json``."""
    manifest = {
        "kind": "checkpoint",
        "format_version": CHECKPOINT_FORMAT_VERSION,
        "step": step,
        "files": _flushed(folder, folder.rglob("*")),
        "extra": dict(extra),
    }
    write_atomically(folder / "manifest.json", canonical_json(manifest, indent=2))


def add_to_manifest(folder: Path, part: str) -> None:
    """Flush the files of a folder that a whole checkpoint has got, and name them in its manifest too."""
    manifest = read_json(folder / "manifest.json")
    manifest["files"] |= _flushed(folder, (folder / part).rglob("*"))
    write_atomically(folder / "manifest.json", canonical_json(manifest, indent=2))


def _flushed(folder: Path, paths: Iterable[Path]) -> dict[str, Any]:
    files = {}
    for path in sorted(path for path in paths if path.is_file()):
        use_folder_permissions(path)
        flush_to_disk(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return files


def read_manifest(folder: Path, *, verify: bool = False) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there, of the right size.

    Args:
        verify: check every file's digest too.

    Raises:
        MissingInputError: there is no manifest.
        ArtifactError: a file is missing, cut or altered, or the format version is another.
    """
    manifest = read_json(folder / "manifest.json")
    version = manifest.get("format_version")
    if manifest.get("kind") != "checkpoint" or version != CHECKPOINT_FORMAT_VERSION:
        raise ArtifactError(
            f"{folder} is not a checkpoint of format version {CHECKPOINT_FORMAT_VERSION}: it is "
            f"{manifest.get('kind')!r} of version {version}"
        )
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing", hint=COPY_HINT)
        if path.stat().st_size != entry["bytes"]:
            raise ArtifactError(
                f"{path} is cut or altered: {path.stat().st_size} bytes, {entry['bytes']} expected",
                hint=COPY_HINT,
            )
        if verify and sha256_file(path) != entry["sha256"]:
            raise ArtifactError(f"{path} is altered: its SHA-256 is not {entry['sha256']}", hint=COPY_HINT)
    return manifest


def remove_checkpoint(folder: Path) -> None:
    """Remove what a checkpoint's manifest names, then the folders that are empty; other files stay."""
    if (folder / "manifest.json").exists():
        # The manifest goes last: a removal that was cut short can be taken up again.
        for name in (*read_json(folder / "manifest.json")["files"], "manifest.json"):
            (folder / name).unlink(missing_ok=True)
    remove_empty_folders(folder)
