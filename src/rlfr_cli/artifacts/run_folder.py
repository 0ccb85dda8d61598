"""The folder of a training run.

``config.json`` first: config, fingerprints of the inputs, versions. Then, step by step, ``metrics.jsonl``
(one object a step), ``rollouts/step-000001/`` (each a rollouts artifact) and ``checkpoints/step-000050/``
with ``model/``, ``flow.safetensors``, ``trainer/`` and, last, ``manifest.json``. A checkpoint appears under
its name only when it is whole. ``latest`` is a text file with the name of the newest. On resuming, whatever
lies past the last whole checkpoint is removed, so that no step is counted twice.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlfr_cli.artifacts import checkpoints
from rlfr_cli.artifacts.files import (
    PARTIAL_SUFFIX,
    canonical_json,
    describe_differences,
    differing_keys,
    read_json,
    remove_empty_folders,
    reporting_full_disk,
    write_atomically,
)
from rlfr_cli.artifacts.folder import StageFolder, package_versions, refuse_foreign_files, remove_stage
from rlfr_cli.artifacts.reading import FORMAT_VERSIONS, check_format_version
from rlfr_cli.artifacts.shards import remove_partials
from rlfr_cli.errors import ArtifactError, MissingInputError, OutputInUseError

CONFIG_KEYS = ("kind", "format_version", "config", "inputs")
# Options that may differ on resuming: how long to train, what to keep and show, how to fit into memory.
MAY_CHANGE = frozenset(
    {
        "rollout.steps",
        "rollout.episodes",
        "evaluation.eval_every",
        "run.save_every",
        "run.keep_checkpoints",
        "run.tensorboard",
        "run.wandb",
        "optimiser.tokens_per_micro_batch",
        "optimiser.gradient_checkpointing",
        "lora.checkpoint",
    }
)


class RunFolder:
    """A run's folder.

    Attributes:
        path: the folder.
        config: the contents of ``config.json``.
        resumed: earlier work is being continued.
        version_differences: one line a package whose version is not that of the earlier work.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.resumed = False
        self.version_differences: list[str] = []

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        config: Mapping[str, Any],
        inputs: Mapping[str, Any],
        overwrite: bool = False,
        resume: bool = False,
        may_change: Collection[str] = MAY_CHANGE,
    ) -> RunFolder:
        """Start a run, or go on from its last whole checkpoint.

        Args:
            config: the resolved config less paths and display options, JSON-able.
            inputs: fingerprints of the inputs, JSON-able.
            overwrite: remove what the project wrote there, and start again.
            resume: continue; a folder that is empty or does not exist is started, so that a job that may be
                stopped at any time is always started by the same command.
            may_change: dotted config keys that may differ on resuming.

        Raises:
            OutputInUseError: the folder holds a run and neither is asked for; or, on resuming, another
                config's run; or files of another origin.
        """
        path = Path(path)
        described = _describe_run(config, inputs)
        _refuse_output(path, described, overwrite=overwrite, resume=resume, may_change=may_change)
        run = cls(path, described)
        if (path / "config.json").exists() and overwrite:
            remove_run(path)
        elif (path / "config.json").exists():
            earlier = read_run_config(path)
            run.resumed = True
            run.version_differences = describe_differences(
                differing_keys(earlier["versions"], described["versions"])
            ).splitlines()
            run._remove_past(run.latest_step())
        write_atomically(path / "config.json", canonical_json(described, indent=2))
        return run

    @staticmethod
    def check_for_writing(
        path: str | Path,
        *,
        config: Mapping[str, Any],
        inputs: Mapping[str, Any],
        overwrite: bool = False,
        resume: bool = False,
        may_change: Collection[str] = MAY_CHANGE,
    ) -> None:
        """Refuse what :meth:`create` would refuse, given the same, and write nothing.

        Raises:
            OutputInUseError: as :meth:`create`.
        """
        described = _describe_run(config, inputs)
        _refuse_output(Path(path), described, overwrite=overwrite, resume=resume, may_change=may_change)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open a run's folder for reading.

        Raises:
            MissingInputError: there is no such folder.
            ArtifactError: it holds no run, or one of another format version.
        """
        return cls(Path(path), read_run_config(Path(path)))

    # Metrics

    def log_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one object to ``metrics.jsonl``; a number that is not finite becomes null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in metrics.items()
        }
        line = canonical_json({"step": step, **finite}) + b"\n"
        with (
            reporting_full_disk(self.path / "metrics.jsonl"),
            open(self.path / "metrics.jsonl", "ab") as file,
        ):
            file.write(line)
            file.flush()

    def read_metrics(self) -> list[dict[str, Any]]:
        """The logged objects in order, without a last line that was cut."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    # Rollouts

    def write_rollouts(self, step: int, table: pa.Table) -> Path:
        """Write a step's rollouts, in place of earlier ones, as an artifact of one shard."""
        folder = StageFolder.open_for_writing(
            self.path / "rollouts" / step_name(step),
            kind="rollouts",
            config={"command": "train-rl", "step": step},
            inputs=self.config["inputs"],
            seed=int(self.config["config"].get("seed", 0)),
            num_units=1,
            overwrite=True,
        )
        folder.write_table(0, table)
        folder.finish()
        return folder.path

    # Checkpoints

    @contextmanager
    def checkpoint(
        self, step: int, *, keep: int | None = None, extra: Mapping[str, Any] | None = None
    ) -> Iterator[Path]:
        """Write a checkpoint: the body fills the folder that it is given, and leaving it makes it whole.

        Args:
            keep: afterwards remove all but this many of the newest checkpoints; None keeps all.
            extra: facts for its manifest, JSON-able.

        Raises:
            OutputSpaceError: no space was left; the unfinished checkpoint is removed.
        """
        folder = self.path / "checkpoints"
        partial = folder / f".{step_name(step)}{PARTIAL_SUFFIX}"
        if partial.exists():
            shutil.rmtree(partial)
        try:
            with reporting_full_disk(folder):
                partial.mkdir(parents=True)
                yield partial
                checkpoints.write_manifest(partial, step=step, extra=extra or {})
                target = folder / step_name(step)
                checkpoints.remove_checkpoint(target)
                if target.exists():  # somebody's own files lie in it
                    target.rename(folder / f"{target.name}.kept-{secrets.token_hex(4)}")
                os.replace(partial, target)
                write_atomically(self.path / "latest", f"{step_name(step)}\n".encode())
        finally:
            if partial.exists():
                shutil.rmtree(partial)
        if keep is not None:
            for old in self.checkpoint_steps()[: -max(keep, 1)]:
                checkpoints.remove_checkpoint(folder / step_name(old))

    def checkpoint_steps(self) -> list[int]:
        """Steps of the whole checkpoints, in order."""
        found = []
        for path in step_folders(self.path / "checkpoints"):
            try:
                found.append(int(checkpoints.read_manifest(path)["step"]))
            except (ArtifactError, MissingInputError):  # cut, or being removed when the process was killed
                continue
        return sorted(found)

    def latest_step(self) -> int:
        """Step of the last whole checkpoint; 0 where there is none."""
        return max(self.checkpoint_steps(), default=0)

    def latest_checkpoint(self) -> Path | None:
        """Folder of the last whole checkpoint."""
        step = self.latest_step()
        return self.path / "checkpoints" / step_name(step) if step else None

    def _remove_past(self, step: int) -> None:
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        if (self.path / "metrics.jsonl").exists():
            lines = b"".join(canonical_json(line) + b"\n" for line in kept)
            write_atomically(self.path / "metrics.jsonl", lines)
        for path in step_folders(self.path / "rollouts"):
            if step_of(path) > step:
                remove_stage(path)
        whole = set(self.checkpoint_steps())
        for path in step_folders(self.path / "checkpoints"):
            if step_of(path) not in whole:
                checkpoints.remove_checkpoint(path)
        remove_partials(self.path / "checkpoints")


def _describe_run(config: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    described = {
        "kind": "run",
        "format_version": FORMAT_VERSIONS["run"],
        "config": dict(config),
        "inputs": dict(inputs),
        "versions": package_versions(),
    }
    # Through JSON and back, so that tuples and lists compare equal with what was read.
    return json.loads(canonical_json(described))


def _refuse_output(
    path: Path, described: Mapping[str, Any], *, overwrite: bool, resume: bool, may_change: Collection[str]
) -> None:
    if not (path / "config.json").exists():
        refuse_foreign_files(path, "config.json")
        return
    if read_json(path / "config.json").get("kind") != "run":
        raise OutputInUseError(
            f"{path} holds a config.json that is not of a run, as a model folder does",
            hint="give another --out",
        )
    if overwrite:
        return
    earlier = read_run_config(path)
    if not resume:
        raise OutputInUseError(
            f"{path} already holds a run",
            hint="give --resume to continue it, --overwrite to replace it, or another --out",
        )
    allowed = {f"config.{key}" for key in may_change}
    there, here = ({key: facts[key] for key in CONFIG_KEYS} for facts in (earlier, described))
    differences = {key: pair for key, pair in differing_keys(there, here).items() if key not in allowed}
    if differences:
        raise OutputInUseError(
            f"{path} holds another config's run:\n{describe_differences(differences)}",
            hint="resume with the options it was started with, or give another --out",
        )


def step_name(step: int) -> str:
    """``step-000050``."""
    return f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The inverse of :func:`step_name`, for a path."""
    return int(path.name.removeprefix("step-"))


def step_folders(folder: Path) -> list[Path]:
    """The folders of single steps in a folder, in order of steps."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of)


def read_run_config(path: Path) -> dict[str, Any]:
    """The contents of a run's ``config.json``.

    Raises:
        MissingInputError: there is no such folder.
        ArtifactError: it holds no run, or one of another format version.
    """
    if not path.exists():
        raise MissingInputError(f"{path} does not exist", hint="give the folder that `rlfr train-rl` wrote")
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if config.get("kind") != "run":
        raise ArtifactError(
            f"{path} is not a run folder: it has no config.json of a run",
            hint="give the folder that `rlfr train-rl` wrote",
        )
    check_format_version(path / "config.json", config, "run")
    return config


def remove_run(path: Path) -> None:
    """Remove what the project wrote in a run's folder; other files, and so their folders, stay."""
    for folder in step_folders(path / "rollouts"):
        remove_stage(folder)
    for folder in step_folders(path / "checkpoints"):
        checkpoints.remove_checkpoint(folder)
    remove_partials(path / "checkpoints")
    for events in (path / "tensorboard").glob("events.out.tfevents.*"):
        events.unlink()
    for name in ("metrics.jsonl", "latest", "config.json"):
        (path / name).unlink(missing_ok=True)
    remove_empty_folders(path)


def run_config_of(rollouts: Path) -> dict[str, Any] | None:
    """``config.json`` of the run whose rollouts, or a step of them, lie at this path; None for others."""
    for run in (rollouts.parent, rollouts.parent.parent):
        if run / "rollouts" in (rollouts, rollouts.parent) and (run / "config.json").is_file():
            config = read_json(run / "config.json")
            return config if config.get("kind") == "run" else None
    return None
