"""What a checkpoint of a run with adapters holds beside ``trainer/``: ``adapter/``, and ``model/`` with them merged in.

Reads the adapters of ``trainer/`` and the base model; writes ``adapter/`` in PEFT's format and, now or when `rlfr
merge` is asked to, ``model/``: the same bytes either way.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from rlfr_cli.artifacts import checkpoints
from rlfr_cli.artifacts.files import PARTIAL_SUFFIX, reporting_full_disk
from rlfr_cli.artifacts.fingerprint import ModelFingerprint, model_fingerprint
from rlfr_cli.config.lora import LoraCheckpoint
from rlfr_cli.engines.training import WEIGHTS_FILE
from rlfr_cli.errors import ArtifactError, MismatchError, MissingInputError, OutputInUseError, during_work
from rlfr_cli.policy.adapter_files import base_of, fingerprint_of, load_merged, write_adapter_folder
from rlfr_cli.policy.loading import resolve_model_folder
from rlfr_cli.policy.saving import save_model_folder

if TYPE_CHECKING:
    from rlfr_cli.stages.train_rl import Plan

BASE = "base_model"  # in the manifest: the base model's fingerprint


def write_adapters(folder: Path, plan: Plan) -> ModelFingerprint | None:
    """Write ``adapter/`` of a checkpoint whose ``trainer/`` is written, and ``model/`` where the run wants it.

    Returns:
        The fingerprint of the merged model; None where nothing asks for it: no model is written, and there is no flow.
    """
    config, base = plan.config, plan.model
    assert plan.adapters is not None
    local = Path(config.model).expanduser()
    name = str(local.resolve()) if local.is_dir() else config.model
    write_adapter_folder(folder / "adapter", plan.adapters, load_file(folder / "trainer" / WEIGHTS_FILE), name)
    merged = config.lora.checkpoint is LoraCheckpoint.MERGED
    if not merged and plan.header is None:
        return None
    policy = load_merged(
        base.folder, folder / "adapter", base.placement.device, trust_remote_code=config.trust_remote_code
    )
    if not merged:
        return fingerprint_of(policy, base.fingerprint)
    save_model_folder(policy, folder / "model", policy.placement.dtype)
    return model_fingerprint(folder / "model")


def merge_checkpoint(path: Path, model: str | None = None, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Write ``model/`` of a checkpoint that holds adapters alone; one that has it stays as it is.

    Args:
        model: the base model; by default the one that the adapters name.

    Raises:
        ArtifactError: the checkpoint is not whole, or has no adapters.
        MissingInputError: the base model is not where it was.
        MismatchError: another model is there.
        OutputInUseError: a ``model/`` is there that the checkpoint does not know.
    """
    manifest = checkpoints.read_manifest(path)
    done = {"out": str(path), "kind": "checkpoint", "complete": True, "model": str(path / "model")}
    if any(name.startswith("model/") for name in manifest["files"]):
        return done
    if not any(name.startswith("adapter/") for name in manifest["files"]):
        raise ArtifactError(f"{path} holds neither model/ nor adapter/", hint=checkpoints.COPY_HINT)
    if (path / "model").exists():
        raise OutputInUseError(f"{path / 'model'} is there and not of this checkpoint", hint="move it away")
    base = _base_folder(path, model)
    expected, found = ModelFingerprint.from_dict(manifest["extra"][BASE]), model_fingerprint(base)
    if found != expected:
        raise MismatchError(
            f"{path} was trained from another model than {base}: {expected.architecture}, weights "
            f"{expected.weights_sha256[:16]}…; it holds {found.architecture}, weights {found.weights_sha256[:16]}…",
            hint="name the model that train-rl was given with --model",
        )
    with during_work(), reporting_full_disk(path):
        policy = load_merged(base, path / "adapter", torch.device("cpu"), trust_remote_code=trust_remote_code)
        partial = path / f".model{PARTIAL_SUFFIX}"
        if partial.exists():
            shutil.rmtree(partial)
        save_model_folder(policy, partial, policy.placement.dtype)
        os.replace(partial, path / "model")
        checkpoints.add_to_manifest(path, "model")
    return done


def _base_folder(path: Path, model: str | None) -> Path:
    name = base_of(path / "adapter") if model is None else model
    try:
        return resolve_model_folder(name)
    except MissingInputError as error:
        raise MissingInputError(
            f"{path} holds adapters of {name}, which is not there", hint="name its place with --model"
        ) from error
