"""From artifacts to the page of tokens: which responses, which tokenizer, and the facts of the header.

Reads a run folder, its rollouts or those of ``rlfr sample``; or takes the scores and rollouts of ``rlfr score``. Writes
one HTML file. ``report/page.py`` has the page itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlfr_cli.artifacts.files import write_atomically
from rlfr_cli.artifacts.fingerprint import ModelFingerprint
from rlfr_cli.artifacts.flow_file import FlowHeader, read_flow_header
from rlfr_cli.artifacts.reading import ArtifactFolder
from rlfr_cli.artifacts.rollouts import STEP_FOLDER, RolloutsFolder, table_rows
from rlfr_cli.artifacts.run_folder import RunFolder, step_of
from rlfr_cli.config.common import check_page_file
from rlfr_cli.config.fields import to_table
from rlfr_cli.config.flow import FlowRewardConfig
from rlfr_cli.errors import InputError
from rlfr_cli.policy.loading import load_tokenizer, resolve_model_folder
from rlfr_cli.report.page import PageRow, make_page
from rlfr_cli.report.tables import format_value
from rlfr_cli.report.token_texts import TokenTexts

SHORT_DIGEST = 16


def write_rollouts_page(path: Path, html: Path, *, model: str | None = None, num_responses: int = 500) -> int:
    """Write the page of a run, of its rollouts or one step of them, or of the rollouts of ``rlfr sample``.

    Args:
        path: the artifact.
        html: the file to write.
        model: model folder whose tokenizer made the responses; that of the run's newest checkpoint by default.
        num_responses: at most this many responses.

    Returns:
        How many responses the page shows.

    Raises:
        InputError: no tokenizer is known, or there are no responses.
        ArtifactError: the path holds neither a run nor rollouts.
    """
    check_page_file(html)
    run = _run_of(path)
    rollouts = RolloutsFolder(path / "rollouts" if run is not None and run.path == path.absolute() else path)
    tokenizer = load_tokenizer(_model_folder(model, run))
    tables = _read_tables(rollouts)
    steps = [step for step, table in tables for _ in range(table.num_rows)]
    table = pa.concat_tables([table for _, table in tables])
    chosen = choose_groups(list(zip(steps, table["problem_id"].to_pylist(), strict=True)), num_responses)
    if not chosen:
        raise InputError(f"{path} holds no responses")
    texts = TokenTexts(tokenizer)
    rows = [
        PageRow(row, texts.of(row.response_token_ids), steps[index])
        for index, row in zip(chosen, table_rows(table.take(chosen)), strict=True)
    ]
    facts = _run_facts(run) if run is not None else _sample_facts(rollouts.folders[0])
    write_atomically(html, make_page(facts, rows, rollouts.num_rows).encode())
    return len(rows)


def write_scores_page(
    html: Path,
    *,
    scores: Sequence[pa.Table],
    rollouts: pa.Table,
    tokenizer: Any,
    header: FlowHeader,
    flow: tuple[str, str],
    model: ModelFingerprint,
    reward: FlowRewardConfig,
    num_responses: int,
) -> int:
    """Write the page of scores of rollouts, row by row.

    Args:
        scores: tables of ``rlfr score``, in order.
        rollouts: the responses that were scored, in the same order.
        header: of the flow.
        flow: the flow's file and fingerprint.

    Returns:
        How many responses the page shows.
    """
    chosen = choose_groups(rollouts["problem_id"].to_pylist(), num_responses)
    score_rows = pa.concat_tables(scores).take(chosen).to_pylist()
    texts = TokenTexts(tokenizer)
    rows = []
    for row, score in zip(table_rows(rollouts.take(chosen)), score_rows, strict=True):
        row.deviation, row.score = score["deviation"], score["score"]
        row.flow_reward = [value or 0.0 for value in score["flow_reward"]]
        rows.append(PageRow(row, texts.of(row.response_token_ids)))
    facts = {
        "flow": f"{flow[0]}, fingerprint {_digest(flow[1])}",
        "model": _model_text(model),
        **_flow_facts(header),
        **_reward_facts(to_table(reward)),
    }
    write_atomically(html, make_page(facts, rows, rollouts.num_rows).encode())
    return len(rows)


def choose_groups(groups: Sequence[object], limit: int) -> list[int]:
    """At most ``limit`` rows: whole groups of neighbours with the same name, evenly spread; a part of the first
    group where it is larger than that.
    """
    if len(groups) <= limit:
        return list(range(len(groups)))
    spans = [[row for row, _ in members] for _, members in groupby(enumerate(groups), key=lambda pair: pair[1])]
    count = max(1, limit * len(spans) // len(groups))
    while True:
        # The first and the last group are among them: of a run, its first step and its last.
        places = [index * (len(spans) - 1) // max(1, count - 1) for index in range(count)]
        chosen = [row for place in places for row in spans[place]]
        if len(chosen) <= limit or count == 1:
            return chosen[:limit]
        count -= 1


def _run_of(path: Path) -> RunFolder | None:
    """The run that a path is, or whose rollouts it is, or whose rollouts of one step."""
    path = path.absolute()
    steps = path.parent if path.name.startswith("step-") else path
    folder = steps.parent if steps.name == "rollouts" and not (steps / "stage.json").exists() else path
    return RunFolder.open(folder) if (folder / "config.json").is_file() else None


def _model_folder(model: str | None, run: RunFolder | None) -> Path:
    if model is not None:
        return resolve_model_folder(model)
    checkpoint = None if run is None else run.latest_checkpoint()
    if checkpoint is None:
        raise InputError(
            "the page needs the tokenizer that made the responses, and there is no checkpoint that holds it",
            hint="name its model folder with --model",
        )
    return resolve_model_folder(str(checkpoint / "model"))


def _read_tables(rollouts: RolloutsFolder) -> list[tuple[int | None, pa.Table]]:
    """Every shard with the training step it belongs to."""
    return [
        (step_of(folder.path) if STEP_FOLDER.fullmatch(folder.path.name) else None, folder.read_table(unit))
        for folder in rollouts.folders
        for unit in range(len(folder.shards))
    ]


def _run_facts(run: RunFolder) -> dict[str, str]:
    config, inputs = run.config["config"], run.config["inputs"]
    facts = {"run": run.path.name, "model": _model_text(ModelFingerprint.from_dict(inputs["model"])), "flow": "none"}
    if not ("flow" in inputs or config["new_flow"]):
        return facts
    start = f"fingerprint {_digest(inputs['flow'])} at the start" if "flow" in inputs else "new with the run"
    learning = "it learns online" if config["online"]["online_steps"] else "kept as it is"
    facts["flow"] = f"{start}, {learning}"
    checkpoint = run.latest_checkpoint()
    if checkpoint is not None:
        facts |= _flow_facts(read_flow_header(checkpoint / "flow.safetensors"))
    facts |= _reward_facts(config["flow_reward"])
    if config["scores"] == "random":
        facts["flow reward"] += "; of random scores, the control"
    return facts


def _sample_facts(folder: ArtifactFolder) -> dict[str, str]:
    model = folder.stage["inputs"].get("model")
    facts = {"rollouts": folder.path.absolute().name, "flow": "none: `rlfr score --html` shows scores of these"}
    return facts | ({} if model is None else {"model": _model_text(ModelFingerprint.from_dict(model))})


def _flow_facts(header: FlowHeader) -> dict[str, str]:
    return {
        "layers": f"blocks {format_value(header.layer_indices)} of {header.num_blocks}",
        "context": ", ".join(header.contexts),
    }


def _reward_facts(reward: Mapping[str, Any]) -> dict[str, str]:
    """Timesteps, and how scores become flow rewards."""
    steps = [
        f"scaled by {reward['score_normalisation']}",
        *([f"power {format_value(reward['power'])}"] if reward["power"] != 1 else []),
        *([f"kept above {format_value(reward['threshold'])}"] if reward["threshold"] > 0 else []),
        *([f"top {reward['top_k']} of a response"] if reward["top_k"] > 0 else []),
        f"times −{format_value(reward['coef'])}",
        *(["centred"] if reward["centre_reward"] else []),
    ]
    return {"timesteps": format_value(reward["timestep"]), "flow reward": ", ".join(steps)}


def _model_text(model: ModelFingerprint) -> str:
    return f"{model.architecture}, weights {_digest(model.weights_sha256)}"


def _digest(digest: str) -> str:
    return f"{digest[:SHORT_DIGEST]}…"
