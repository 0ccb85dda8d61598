"""Scores on disk: one row a response, in Arrow shards of a stage folder.

``deviation`` and ``score`` have one entry a response token, null where the token is not valid; rows are found
by ``problem_id`` and ``sample_index``, as in the rollouts that were scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from rlfr_cli.artifacts.reading import ArtifactFolder
from rlfr_cli.errors import InputError

TOKEN_COLUMNS = ("deviation", "score", "flow_reward")
SCORE_SCHEMA = pa.schema(
    [
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        *(pa.field(name, pa.list_(pa.float32()), nullable=False) for name in TOKEN_COLUMNS),
    ]
)
# [tokens][layers][timesteps], null for a token that is not valid.
PER_LAYER_TIMESTEP_FIELD = pa.field("per_layer_timestep", pa.list_(pa.list_(pa.list_(pa.float32()))))


@dataclass(kw_only=True)
class ScoreRow:
    """What the flow says of one response, an entry a response token.

    Attributes:
        problem_id: as in the rollouts.
        sample_index: as in the rollouts.
        deviation: mean over dimensions of the squared velocity error; None where a token is not valid.
        score: weighted over timesteps, then averaged over layers and pairings; None likewise.
        flow_reward: the shaped reward; None likewise.
        per_layer_timestep: deviation by layer and timestep, where it was asked for.
    """

    problem_id: str
    sample_index: int
    deviation: list[float | None]
    score: list[float | None]
    flow_reward: list[float | None]
    per_layer_timestep: list[list[list[float]] | None] | None = None

    def check(self) -> None:
        """Check that the columns speak of the same tokens.

        Raises:
            InputError: they differ in length, or in which tokens are valid.
        """
        name = f"problem {self.problem_id}, sample {self.sample_index}"
        columns = {"score": self.score, "flow_reward": self.flow_reward}
        if self.per_layer_timestep is not None:
            columns["per_layer_timestep"] = self.per_layer_timestep  # type: ignore[assignment]
        invalid = [value is None for value in self.deviation]
        for column, values in columns.items():
            if len(values) != len(self.deviation):
                raise InputError(f"{name}: {len(values)} entries of {column} for {len(self.deviation)} of deviation")
            if [value is None for value in values] != invalid:
                raise InputError(f"{name}: {column} is null for other tokens than deviation")


def score_table(rows: Sequence[ScoreRow], *, per_layer_timestep: bool = False) -> pa.Table:
    """Rows as a table.

    Args:
        per_layer_timestep: with the deviation by layer and timestep, which every row must then have.

    Raises:
        InputError: a row that :meth:`ScoreRow.check` refuses.
    """
    for row in rows:
        row.check()
    schema = SCORE_SCHEMA.append(PER_LAYER_TIMESTEP_FIELD) if per_layer_timestep else SCORE_SCHEMA
    columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def iter_scores(path: str | Path | ArtifactFolder) -> Iterator[ScoreRow]:
    """All rows of a scores folder, with one shard in memory at a time.

    Raises:
        ArtifactError: the folder holds no scores, or they are cut, altered or unfinished.
    """
    folder = path if isinstance(path, ArtifactFolder) else ArtifactFolder(path, "scores")
    for unit in range(len(folder.shards)):
        for values in folder.read_table(unit).to_pylist():
            yield ScoreRow(**values)
