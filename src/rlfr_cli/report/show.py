"""What ``rlfr show PATH`` says: what an artifact is, from what it was made, what it holds, if it is whole.

Reads any artifact of the project and writes nothing. Damage is what this command is asked about, so it is
part of the answer rather than an error; a path that is no artifact is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from rlfr_cli.artifacts import checkpoints
from rlfr_cli.artifacts.files import human_bytes, read_json
from rlfr_cli.artifacts.fingerprint import ModelFingerprint
from rlfr_cli.artifacts.flow_file import flow_fingerprint, read_flow, read_flow_header
from rlfr_cli.artifacts.latents import LatentsFolder
from rlfr_cli.artifacts.reading import ArtifactFolder, read_stage
from rlfr_cli.artifacts.rollouts import RolloutsFolder, table_rows
from rlfr_cli.artifacts.run_folder import RunFolder, step_folders
from rlfr_cli.artifacts.shards import read_records
from rlfr_cli.errors import ArtifactError, MissingInputError
from rlfr_cli.report import show_rows
from rlfr_cli.report.tables import summary_lines

SHORT_DIGEST = 16
COUNTED_COLUMNS = ("grade", "finish_reason", "source")
NOTHING_OF_OURS = (
    "show reads a rollouts, latents, scores, eval or run folder, the rollouts/ folder of a run, "
    "a checkpoint, or a flow.safetensors"
)


@dataclass
class Shown:
    """An artifact, explained.

    Attributes:
        path: what was asked for.
        kind: what it is.
        state: ``complete``, ``unfinished`` or ``damaged``.
        note: the state in words: what is missing or altered, and the next step.
        verified: every digest was checked and fits.
        facts: what it holds, JSON-able, in the order in which it is printed.
        rows: some rows, where they were asked for.
        row_lines: the same for people.
    """

    path: Path
    kind: str
    state: str = "complete"
    note: str = ""
    verified: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    row_lines: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All of it for ``--json``."""
        names = ("kind", "state", "note", "verified", "facts", "rows")
        return {"path": str(self.path), **{name: getattr(self, name) for name in names}}

    def lines(self) -> list[str]:
        """What people want to know of it; ``--json`` has the rest."""
        state = self.state + (", every digest checked" if self.verified else "")
        return [
            f"{self.path}: {self.kind}, {state}",
            *([f"  {self.note}"] if self.note else []),
            *(f"  {line}" for line in summary_lines(_for_people(self.facts))),
            *self.row_lines,
        ]


def show(path: str | Path, *, verify: bool = False, num_rows: int = 0) -> Shown:
    """Explain an artifact.

    Args:
        verify: read everything and check the digests.
        num_rows: rows to show: the first of an artifact, the last steps of a run.

    Raises:
        MissingInputError: there is nothing at the path.
        ArtifactError: it is no artifact of this project.
    """
    path = Path(path)
    if not path.exists():
        raise MissingInputError(f"{path} does not exist", hint=NOTHING_OF_OURS)
    kind, explain = _recognise(path)
    shown = Shown(path, kind)
    try:
        explain(shown, verify, num_rows)
    except ArtifactError as error:
        shown.state, shown.note, shown.verified = "damaged", str(error).replace("\n\n", "; "), False
    return shown


def _recognise(path: Path) -> tuple[str, Callable[[Shown, bool, int], None]]:
    if path.is_file() and path.suffix == ".safetensors":
        read_flow_header(path)  # says so by itself where it is no flow
        return "flow", _explain_flow
    if (path / "stage.json").is_file():
        return str(read_stage(path)["kind"]), _explain_stage
    if _kind_in(path / "config.json") == "run":
        return "run", _explain_run
    if _kind_in(path / "manifest.json") == "checkpoint":
        return "checkpoint", _explain_checkpoint
    if any((step / "stage.json").is_file() for step in step_folders(path)):
        return "rollouts", _explain_run_rollouts
    if path.is_dir() and path.name.startswith("step-"):
        raise ArtifactError(f"{path} is a checkpoint that was never finished", hint="resume the run")
    raise ArtifactError(f"{path} is not an artifact of rlfr", hint=NOTHING_OF_OURS)


def _kind_in(file: Path) -> str | None:
    return read_json(file).get("kind") if file.is_file() else None


def _explain_stage(shown: Shown, verify: bool, num_rows: int) -> None:
    stage = read_stage(shown.path)
    shown.facts = {"from": stage["inputs"], "seed": stage["seed"]}
    if not (shown.path / "manifest.json").is_file():
        done = len(read_records(shown.path / "shards"))
        shown.state = "unfinished"
        shown.note = f"{done} of {stage['num_units']} units are done; the same command continues"
        shown.facts |= {"config": stage["config"], "versions": stage["versions"]}
        return
    folder = ArtifactFolder(shown.path, shown.kind)
    shown.facts |= {
        "rows": folder.num_rows,
        "shards": len(folder.shards),
        "size": human_bytes(folder.num_bytes),
        "fingerprint": folder.fingerprint,
    }
    if shown.kind == "rollouts":
        _add_rollouts(shown, RolloutsFolder(shown.path), num_rows)
    elif shown.kind == "latents":
        latents = LatentsFolder(shown.path)
        shown.facts["tokens"] = latents.num_tokens
        if num_rows:
            shown.rows, shown.row_lines = show_rows.latent_rows(latents, num_rows)
    elif num_rows and shown.kind == "scores":
        shown.rows, shown.row_lines = show_rows.score_rows(folder, num_rows)
    elif num_rows and shown.kind == "eval":
        rows = (row for unit in range(len(folder.shards)) for row in table_rows(folder.read_table(unit)))
        shown.rows, shown.row_lines = show_rows.rollout_rows(rows, num_rows)
    shown.facts |= {"holds": folder.extra, "config": stage["config"], "versions": stage["versions"]}
    if verify:
        folder.verify()
        shown.verified = True


def _explain_run_rollouts(shown: Shown, verify: bool, num_rows: int) -> None:
    rollouts = RolloutsFolder(shown.path)
    shown.facts = {
        "steps": len(rollouts.folders),
        "rows": rollouts.num_rows,
        "size": human_bytes(sum(folder.num_bytes for folder in rollouts.folders)),
        "fingerprint": rollouts.fingerprint,
    }
    _add_rollouts(shown, rollouts, num_rows)
    if verify:
        for folder in rollouts.folders:
            folder.verify()
        shown.verified = True


def _add_rollouts(shown: Shown, rollouts: RolloutsFolder, num_rows: int) -> None:
    problems: set[str] = set()
    counts = {name: Counter[str]() for name in COUNTED_COLUMNS}
    num_tokens, rewards = 0, []
    for table in rollouts.tables(verify=False):
        problems.update(table["problem_id"].to_pylist())
        for name, counter in counts.items():
            counter.update(table[name].to_pylist())
        num_tokens += pc.sum(pc.list_value_length(table["response_token_ids"])).as_py() or 0
        rewards += [reward for reward in table["reward"].to_pylist() if reward is not None]
    shown.facts |= {
        "problems": len(problems),
        "response_tokens": num_tokens,
        "mean_reward": sum(rewards) / len(rewards) if rewards else None,
        **{name: dict(sorted(counter.items())) for name, counter in counts.items()},
    }
    if num_rows:
        shown.rows, shown.row_lines = show_rows.rollout_rows(rollouts.rows(), num_rows)


def _explain_flow(shown: Shown, verify: bool, num_rows: int) -> None:
    header = read_flow_header(shown.path)
    shown.facts = {
        "size": human_bytes(shown.path.stat().st_size),
        "fingerprint": flow_fingerprint(shown.path),
        **header.to_dict(),
    }
    if verify:
        read_flow(shown.path)
        shown.verified = True


def _explain_run(shown: Shown, verify: bool, num_rows: int) -> None:
    run = RunFolder.open(shown.path)
    metrics = run.read_metrics()
    steps = run.checkpoint_steps()
    shown.facts = {
        "from": run.config["inputs"],
        "steps_logged": metrics[-1]["step"] if metrics else 0,
        "whole_checkpoints": steps,
        "steps_with_rollouts": len(step_folders(shown.path / "rollouts")),
        "config": run.config["config"],
        "versions": run.config["versions"],
    }
    damaged = [path for path in step_folders(shown.path / "checkpoints") if int(path.name[5:]) not in steps]
    if damaged:
        raise ArtifactError(
            f"{', '.join(str(path) for path in damaged)} is not whole",
            hint="`rlfr show` on it says why; resuming uses the last whole checkpoint",
        )
    if verify:
        for step in step_folders(shown.path / "checkpoints"):
            checkpoints.read_manifest(step, verify=True)
        if step_folders(shown.path / "rollouts"):
            for folder in RolloutsFolder(shown.path / "rollouts").folders:
                folder.verify()
        shown.verified = True
    if num_rows:
        shown.rows, shown.row_lines = show_rows.metric_rows(metrics, num_rows)


def _explain_checkpoint(shown: Shown, verify: bool, num_rows: int) -> None:
    manifest = checkpoints.read_manifest(shown.path, verify=verify)
    shown.verified = verify
    files = manifest["files"]
    shown.facts = {
        "step": manifest["step"],
        "files": len(files),
        "size": human_bytes(sum(entry["bytes"] for entry in files.values())),
        "model": "model/" if any(name.startswith("model/") for name in files) else None,
        "holds": manifest["extra"],
    }
    if "adapter/adapter_config.json" in files:
        adapter = read_json(shown.path / "adapter" / "adapter_config.json")
        shown.facts["adapter"] = {
            "rank": adapter["r"],
            "alpha": adapter["lora_alpha"],
            "target": ", ".join(adapter["target_modules"]),
            "base": adapter["base_model_name_or_path"],
        }
        if shown.facts["model"] is None:
            shown.note = f"no model/: `rlfr merge {shown.path}` makes it of the adapters and their base model"
    if "flow.safetensors" in files:
        shown.facts["flow"] = read_flow_header(shown.path / "flow.safetensors").to_dict()


def _for_people(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A line a fact: digests short, a model, counts, versions and pairings in one line, options counted."""
    short: dict[str, Any] = {}
    for key, value in facts.items():
        if key == "config":
            short[key] = f"{_count_leaves(value)} options (--json shows them)"
        elif isinstance(value, Mapping) and value.keys() >= {"model_type", "weights_sha256"}:
            model = ModelFingerprint.from_dict(value)
            short[key] = f"{model.architecture}, weights {model.weights_sha256[:SHORT_DIGEST]}…"
        elif key in ("versions", *COUNTED_COLUMNS) and isinstance(value, Mapping):
            short[key] = ", ".join(f"{name} {number}" for name, number in value.items())
        elif key == "pairings":
            short[key] = ", ".join(f"{pairing['context']} {pairing['shift']}" for pairing in value)
        elif isinstance(value, Mapping):
            short[key] = _for_people(value) or None
        elif isinstance(value, str) and len(value) == 64 and all(c in "0123456789abcdef" for c in value):
            short[key] = f"{value[:SHORT_DIGEST]}…"
        else:
            short[key] = value
    return short


def _count_leaves(value: object) -> int:
    return sum(map(_count_leaves, value.values())) if isinstance(value, Mapping) else 1
