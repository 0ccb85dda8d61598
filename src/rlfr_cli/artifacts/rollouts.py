"""Rollouts on disk: one row a response, in Arrow shards of a stage folder.

A rollouts folder is what ``rlfr sample`` writes; a run's ``rollouts/`` folder holds one such folder a step,
with columns for what training computed. Token ids are the truth: ``response`` is the engine's text of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow as pa

from rlfr_cli.artifacts.reading import ArtifactFolder
from rlfr_cli.errors import ArtifactError, InputError, MissingInputError
from rlfr_cli.grading.grades import Grade

FINISH_REASONS = ("stop", "length")
SOURCES = ("policy", "expert")
STEP_FOLDER = re.compile(r"step-\d{6,}")

ROLLOUT_SCHEMA = pa.schema(
    [
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("problem", pa.string(), nullable=False),
        pa.field("answer", pa.list_(pa.string()), nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_logprobs", pa.list_(pa.float32())),
        pa.field("response", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("reward", pa.float32()),
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("grade", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)
# What training adds, each [response tokens].
TRAINING_COLUMNS = ("deviation", "score", "flow_reward", "advantage", "entropy", "trainer_logprobs")
RUN_ROLLOUT_SCHEMA = pa.schema(
    [*ROLLOUT_SCHEMA, *(pa.field(name, pa.list_(pa.float32())) for name in TRAINING_COLUMNS)]
)


@dataclass(kw_only=True)
class RolloutRow:
    """One response and all that is known of it.

    Attributes:
        problem_id: the id column's value, or the zero-based row of the problem file.
        sample_index: number of the response among those to its problem.
        problem: the problem's text.
        answer: accepted answers, stripped; empty where there is none.
        prompt_token_ids: what the policy read.
        response_token_ids: what it wrote; ends with the end token if the finish reason is ``stop``.
        response_logprobs: of softmax(logits / temperature) before top-p and top-k; None for expert text.
        response: the engine's text.
        finish_reason: ``stop`` or ``length``.
        reward: outcome reward; None where none was computed.
        correct: the grade is ``correct``.
        grade: a value of ``Grade``, judging the text alone.
        source: ``policy`` or ``expert``.
        deviation: per response token, None where the token is not valid; so for ``score``.
        flow_reward: per response token, 0 where the token is not valid.
        advantage: per response token.
        entropy: per response token, in nats.
        trainer_logprobs: the trainer's own log-probabilities before the first optimiser step.
    """

    problem_id: str
    sample_index: int
    problem: str
    answer: list[str]
    prompt_token_ids: list[int]
    response_token_ids: list[int]
    response_logprobs: list[float] | None
    response: str
    finish_reason: str
    reward: float | None = None
    correct: bool = False
    grade: str = "ungraded"
    source: str = "policy"
    deviation: list[float | None] | None = None
    score: list[float | None] | None = None
    flow_reward: list[float] | None = None
    advantage: list[float] | None = None
    entropy: list[float] | None = None
    trainer_logprobs: list[float] | None = None

    @property
    def name(self) -> str:
        """For messages and generators: problem and sample."""
        return f"problem {self.problem_id}, sample {self.sample_index}"

    def check(self) -> None:
        """Check what a reader relies on.

        Raises:
            InputError: a value that is not allowed, or a list that does not have one entry a token.
        """
        allowed = {"finish_reason": FINISH_REASONS, "grade": tuple(Grade), "source": SOURCES}
        for column, values in allowed.items():
            if getattr(self, column) not in values:
                raise InputError(f"{self.name}: {column} is {getattr(self, column)!r}; allowed are {', '.join(values)}")
        if self.correct != (self.grade == "correct"):
            raise InputError(f"{self.name}: correct is {self.correct}, but the grade is {self.grade!r}")
        for column in ("response_logprobs", *TRAINING_COLUMNS):
            values = getattr(self, column)
            if values is not None and len(values) != len(self.response_token_ids):
                raise InputError(
                    f"{self.name}: {len(values)} {column} for {len(self.response_token_ids)} response tokens"
                )


def rollout_table(rows: Sequence[RolloutRow], *, run: bool = False) -> pa.Table:
    """Rows as a table.

    Args:
        run: with the columns that training adds.

    Raises:
        InputError: a row that :meth:`RolloutRow.check` refuses.
    """
    for row in rows:
        row.check()
    schema = RUN_ROLLOUT_SCHEMA if run else ROLLOUT_SCHEMA
    # Column by column: a list of dicts would copy every token list once more.
    columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def table_rows(table: pa.Table) -> list[RolloutRow]:
    """The inverse of :func:`rollout_table`."""
    known = {field.name for field in fields(RolloutRow)}
    columns = [name for name in table.column_names if name in known]
    return [RolloutRow(**values) for values in table.select(columns).to_pylist()]


class RolloutsFolder:
    """Rollouts, open for reading shard by shard: a rollouts folder, a run's ``rollouts/``, or a step of it.

    Attributes:
        path: the folder.
        folders: the finished artifacts in it, in order of steps.
        num_rows: responses.
        fingerprint: digest of the content.

    Raises:
        MissingInputError: there is no such folder.
        ArtifactError: it holds no rollouts, or they are cut, altered or unfinished.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise MissingInputError(f"{path} does not exist", hint="write it with `rlfr sample`")
        steps = sorted(
            (
                folder
                for folder in self.path.glob("step-*")
                if STEP_FOLDER.fullmatch(folder.name) and (folder / "stage.json").exists()
            ),
            # As numbers: six digits sort as text only up to a million steps.
            key=lambda folder: int(folder.name.removeprefix("step-")),
        )
        # A run that is going on, or was stopped, may be about to write its last step.
        if len(steps) > 1 and not (steps[-1] / "manifest.json").exists():
            steps.pop()
        if not steps and not (self.path / "stage.json").exists():
            raise ArtifactError(
                f"{path} holds no rollouts: neither stage.json nor step folders",
                hint="give what `rlfr sample` wrote, or the rollouts/ folder of a run or one step of it",
            )
        self.folders = [ArtifactFolder(folder, "rollouts") for folder in steps or [self.path]]
        self.num_rows = sum(folder.num_rows for folder in self.folders)

    @property
    def fingerprint(self) -> str:
        if len(self.folders) == 1:
            return self.folders[0].fingerprint
        lines = "\n".join(folder.fingerprint for folder in self.folders)
        return hashlib.sha256(lines.encode()).hexdigest()

    def tables(self, *, verify: bool = True) -> Iterator[pa.Table]:
        """One table a shard, in order."""
        for folder in self.folders:
            for unit in range(len(folder.shards)):
                yield folder.read_table(unit, verify=verify)

    def rows(self, *, verify: bool = True) -> Iterator[RolloutRow]:
        """All rows in order, with one shard in memory at a time."""
        for table in self.tables(verify=verify):
            yield from table_rows(table)


def iter_rollouts(path: str | Path | RolloutsFolder) -> Iterator[RolloutRow]:
    """All rows of some rollouts, with one shard in memory at a time."""
    return (path if isinstance(path, RolloutsFolder) else RolloutsFolder(path)).rows()


def read_rollouts(path: str | Path) -> pa.Table:
    """All rows of some rollouts as one table, mapped into memory."""
    return pa.concat_tables(RolloutsFolder(path).tables())
