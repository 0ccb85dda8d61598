"""`rlfr merge`: complete a folder whose units are all there, or say which are missing and what to run.

Reads and completes the folder of a stage that works in parts. Needs no model and no inputs: what the manifest says
beside the shards lies in ``stage.json`` since the first part began, and ``results.json`` is made from the rows.
A checkpoint of adapters is completed by ``model/`` (``stages/adapter_checkpoints.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlfr_cli.artifacts.files import read_json
from rlfr_cli.artifacts.folder import StageFolder
from rlfr_cli.artifacts.reading import check_format_version, read_stage
from rlfr_cli.errors import ArtifactError, ConfigError, during_work

COMMANDS = {"rollouts": "sample", "latents": "extract-latents", "scores": "score", "eval": "eval"}
NUM_NAMED = 8


def merge(path: Path, *, model: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Complete a folder, if all its units are there; returns what was found.

    ``parts_missing`` names parts only where the work was begun in parts.

    Args:
        model: the base model of a checkpoint of adapters, where it is no longer where they say.
        trust_remote_code: of that model.

    Raises:
        MissingInputError: there is no such folder.
        ArtifactError: it holds no work that is done in parts, or work of another version of the format.
    """
    if _is_checkpoint(path):
        # Brings torch and transformers, which the other kinds do without.
        from rlfr_cli.stages.adapter_checkpoints import merge_checkpoint

        return merge_checkpoint(path, model, trust_remote_code=trust_remote_code)
    if model is not None:
        raise ConfigError(f"--model is for a checkpoint of adapters, and {path} is none", hint="leave it out")
    stage = read_stage(path)
    kind = stage["kind"]
    if kind not in COMMANDS:
        raise ArtifactError(
            f"{path} holds {kind}, which is not made in parts",
            hint=f"merge completes what {', '.join(f'`rlfr {name}`' for name in COMMANDS.values())} write",
        )
    check_format_version(path / "stage.json", stage, kind)
    if "extra" not in stage:
        raise ArtifactError(
            f"{path / 'stage.json'} was written by an earlier version of rlfr and lacks what the manifest is to say",
            hint=f"run `rlfr {COMMANDS[kind]}` again with the same options: it continues",
        )
    folder = StageFolder(path, stage, continued=True)
    num_parts = folder.num_parts()
    missing = folder.missing_units()
    if not missing and not folder.complete:
        with during_work():
            _finish(folder)
    parts = sorted({unit % num_parts + 1 for unit in missing}) if num_parts else []
    return {
        "out": str(path),
        "kind": kind,
        "complete": folder.complete,
        "units": folder.num_units,
        "units_missing": missing,
        "parts_missing": [f"{part}/{num_parts}" for part in parts],
    }


def _is_checkpoint(path: Path) -> bool:
    manifest = path / "manifest.json"
    return manifest.is_file() and bool(read_json(manifest).get("kind") == "checkpoint")


def _finish(folder: StageFolder) -> None:
    if folder.stage["kind"] == "eval":
        from rlfr_cli.stages.evaluate import finish_folder  # brings transformers, which the other kinds do without

        finish_folder(folder)
    folder.finish()


def what_is_missing(merged: dict[str, Any]) -> tuple[str, str]:
    """What an unfinished folder lacks, and the next step."""
    missing, parts = merged["units_missing"], merged["parts_missing"]
    again = f"run `rlfr {COMMANDS[merged['kind']]}` again with the same options"
    lacks = f"{merged['out']} is unfinished: of {merged['units']} units, {len(missing)} are missing: {_named(missing)}"
    if not parts:
        return lacks, f"{again}: it continues"
    flags = _named([f"--part {part}" for part in parts])
    return f"{lacks}; of the parts: {_named(parts)}", (
        f"unless these parts are still at work, {again} and {flags}{' in turn' if len(parts) > 1 else ''}; or without "
        "--part, which does all that is missing"
    )


def _named(items: list[Any]) -> str:
    more = f" and {len(items) - NUM_NAMED} more" if len(items) > NUM_NAMED else ""
    return ", ".join(map(str, items[:NUM_NAMED])) + more
