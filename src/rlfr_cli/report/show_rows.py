"""Rows of an artifact, readable: what ``rlfr show --rows N`` prints and what ``--json`` holds of them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from rlfr_cli.artifacts.latents import LatentsFolder
from rlfr_cli.artifacts.reading import ArtifactFolder
from rlfr_cli.artifacts.rollouts import RolloutRow
from rlfr_cli.artifacts.scores import ScoreRow, iter_scores
from rlfr_cli.report.tables import format_value, text_table

LONGEST_TEXT = 2000
TOP_TOKENS = 5


def rollout_rows(rollouts: Iterable[RolloutRow], num_rows: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The first responses: problem, response, grade and reward."""
    rows = list(islice(rollouts, num_rows))
    return [_rollout_data(row) for row in rows], [line for row in rows for line in _rollout_lines(row)]


def _rollout_data(row: RolloutRow) -> dict[str, Any]:
    names = (
        "problem_id",
        "sample_index",
        "problem",
        "answer",
        "response",
        "finish_reason",
        "reward",
        "grade",
    )
    return {name: getattr(row, name) for name in names} | {
        "source": row.source,
        "num_prompt_tokens": len(row.prompt_token_ids),
        "num_response_tokens": len(row.response_token_ids),
    }


def _rollout_lines(row: RolloutRow) -> list[str]:
    return [
        "",
        f"{row.name}: {row.grade}, reward {format_value(row.reward)}, {len(row.response_token_ids)} tokens, "
        f"finish reason {row.finish_reason}, from {row.source}",
        *_indented("problem", row.problem),
        *_indented("answer", ", ".join(row.answer) or "-"),
        *_indented("response", row.response),
    ]


def score_rows(folder: ArtifactFolder, num_rows: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The first responses' tokens of the highest scores."""
    data, lines = [], []
    for row in islice(iter_scores(folder), num_rows):
        top = _top_tokens(row)
        num_valid = sum(value is not None for value in row.score)
        data.append(
            {
                "problem_id": row.problem_id,
                "sample_index": row.sample_index,
                "num_tokens": len(row.score),
                "num_valid_tokens": num_valid,
                "top_tokens": top,
            }
        )
        name = f"problem {row.problem_id}, sample {row.sample_index}"
        lines += ["", f"{name}: {num_valid} of {len(row.score)} tokens valid"]
        lines += [f"  {line}" for line in text_table(top)]
    return data, lines


def _top_tokens(row: ScoreRow) -> list[dict[str, Any]]:
    valid = [(score, token) for token, score in enumerate(row.score) if score is not None]
    top = sorted(valid, key=lambda pair: (-pair[0], pair[1]))[:TOP_TOKENS]
    return [
        {
            "token": token,
            "score": score,
            "deviation": row.deviation[token],
            "flow_reward": row.flow_reward[token],
        }
        for score, token in top
    ]


def latent_rows(latents: LatentsFolder, num_rows: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The first sequences: their shape, and the root mean square of a channel by layer."""
    data: list[dict[str, Any]] = []
    for shard in range(latents.num_shards):
        _, sequence_ids = latents.read_offsets(shard)
        count = min(len(sequence_ids), num_rows - len(data))
        read = latents.read_sequences(shard, 0, count, verify=False)
        for index in range(count):
            latents_TJD, _ = read.sequence(index)
            rms_J = latents_TJD.float().square().mean(dim=(0, 2)).sqrt()
            data.append(
                {
                    "sequence_id": int(sequence_ids[index]),
                    "shape": list(latents_TJD.shape),
                    "rms_by_layer": [value if math.isfinite(value) else None for value in rms_J.tolist()],
                }
            )
        if len(data) == num_rows:
            break
    return data, ["", *text_table(data)]


def metric_rows(metrics: Sequence[Mapping[str, Any]], num_rows: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The last steps' metrics."""
    data = [dict(row) for row in metrics[-num_rows:]]
    return data, [line for row in data for line in _row_lines(row)]


def _row_lines(row: Mapping[str, Any]) -> list[str]:
    return ["", *(line for key, value in row.items() for line in _indented(key, format_value(value)))]


def _indented(title: str, text: str) -> list[str]:
    shown = printable(text)
    if len(shown) > LONGEST_TEXT:
        shown = f"{shown[:LONGEST_TEXT]}… ({len(text)} characters; --json shows all)"
    first, *rest = shown.splitlines() or [""]
    return [f"  {title}: {first}", *(f"    {line}" for line in rest)]


def printable(text: str) -> str:
    """Text without control characters, which a policy can write and a terminal obeys."""
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) != "Cc" else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )
