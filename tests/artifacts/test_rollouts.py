"""Rollouts and scores: round trips, checks, and other tools that open the shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlfr_cli.artifacts.folder import StageFolder
from rlfr_cli.artifacts.reading import ArtifactFolder
from rlfr_cli.artifacts.rollouts import (
    ROLLOUT_SCHEMA,
    RUN_ROLLOUT_SCHEMA,
    RolloutRow,
    RolloutsFolder,
    iter_rollouts,
    read_rollouts,
    rollout_table,
    table_rows,
)
from rlfr_cli.artifacts.run_folder import RunFolder
from rlfr_cli.artifacts.scores import ScoreRow, iter_scores, score_table
from rlfr_cli.errors import ArtifactError, InputError, MissingInputError


def row(problem: int = 0, sample: int = 0, **changes: Any) -> RolloutRow:
    values = {
        "problem_id": str(problem),
        "sample_index": sample,
        "problem": "1 + 1?",
        "answer": ["2", "2.0"],
        "prompt_token_ids": [5, 6],
        "response_token_ids": [7, 8, 2],
        "response_logprobs": [-0.5, -0.25, -2.0],
        "response": "\\boxed{2}",
        "finish_reason": "stop",
        "reward": 1.0,
        "correct": True,
        "grade": "correct",
        "source": "policy",
    }
    return RolloutRow(**(values | changes))


EXPERT = row(1, 0, response_logprobs=None, reward=None, source="expert", grade="ungraded", correct=False, answer=[])


def write(path: Path) -> Path:
    stage = StageFolder.open_for_writing(path, kind="rollouts", config={}, inputs={}, seed=0, num_units=2)
    stage.write_table(0, rollout_table([row(0, 0), row(0, 1, grade="wrong", correct=False)]))
    stage.write_table(1, rollout_table([EXPERT]))
    assert stage.finish()
    return path


def test_round_trip_keeps_every_value_and_type() -> None:
    table = rollout_table([row(), EXPERT])
    assert table.schema == ROLLOUT_SCHEMA
    assert table_rows(table) == [row(), EXPERT]
    assert str(table.schema.field("response_token_ids").type) == "list<item: int32>"
    assert str(table.schema.field("response_logprobs").type) == "list<item: float>"
    assert rollout_table([]).schema == ROLLOUT_SCHEMA


def test_rollouts_of_a_run_have_more_columns() -> None:
    extra = row(
        deviation=[None, 0.5, 1.0],
        score=[None, 2.0, 4.0],
        flow_reward=[0.0, -0.0078125, 0.0],
        advantage=[1.0, 0.5, 0.25],
        entropy=[0.5, 0.25, 0.0],
        trainer_logprobs=[-0.5, -0.25, -2.0],
    )
    table = rollout_table([extra, row()], run=True)
    assert table.schema == RUN_ROLLOUT_SCHEMA
    assert table_rows(table) == [extra, row()]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"finish_reason": "eos"}, "finish_reason is 'eos'; allowed are stop, length"),
        ({"grade": "right", "correct": False}, "grade is 'right'; allowed are correct, wrong"),
        ({"source": "human"}, "source is 'human'; allowed are policy, expert"),
        ({"correct": False}, "correct is False, but the grade is 'correct'"),
        ({"response_logprobs": [-1.0]}, "1 response_logprobs for 3 response tokens"),
        ({"advantage": [1.0] * 4}, "4 advantage for 3 response tokens"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        rollout_table([row(), row(3, 4, **changes)])
    assert caught.value.message == f"problem 3, sample 4: {caught.value.message.split(': ', 1)[1]}"
    assert said in caught.value.message


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    rollouts = RolloutsFolder(write(tmp_path))
    assert rollouts.num_rows == 3
    assert [(r.problem_id, r.sample_index) for r in iter_rollouts(tmp_path)] == [("0", 0), ("0", 1), ("1", 0)]
    assert read_rollouts(tmp_path).num_rows == 3
    assert rollouts.fingerprint == ArtifactFolder(tmp_path, "rollouts").fingerprint


def test_datasets_opens_the_shards(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "rollouts")
    loaded = datasets.load_dataset(
        "arrow",
        data_files=str(tmp_path / "rollouts" / "shards" / "*.arrow"),
        cache_dir=str(tmp_path / "cache"),
        split="train",
    )
    assert loaded.column_names == ROLLOUT_SCHEMA.names
    assert [RolloutRow(**values) for values in loaded] == list(iter_rollouts(tmp_path / "rollouts"))


def test_a_runs_rollouts_and_one_step_of_them(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", config={"seed": 3}, inputs={})
    for step in (2, 1, 1_000_000):
        run.write_rollouts(step, rollout_table([row(step)], run=True))
    whole = RolloutsFolder(tmp_path / "run" / "rollouts")
    assert [r.problem_id for r in whole.rows()] == ["1", "2", "1000000"]
    step = tmp_path / "run" / "rollouts" / "step-000002"
    assert [r.problem_id for r in iter_rollouts(step)] == ["2"]
    assert whole.fingerprint != RolloutsFolder(step).fingerprint
    (tmp_path / "run" / "rollouts" / "step-1000000" / "manifest.json").unlink()
    assert RolloutsFolder(tmp_path / "run" / "rollouts").num_rows == 2


def test_what_holds_no_rollouts_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        RolloutsFolder(tmp_path / "gone")
    with pytest.raises(ArtifactError, match="holds no rollouts"):
        RolloutsFolder(tmp_path)


def test_scores_round_trip(tmp_path: Path) -> None:
    scores = ScoreRow(
        problem_id="a",
        sample_index=1,
        deviation=[None, 0.5, 1.5],
        score=[None, 2.0, 6.0],
        flow_reward=[None, 0.0, -0.0078125],
        per_layer_timestep=[None, [[0.25, 0.75]], [[1.0, 2.0]]],
    )
    stage = StageFolder.open_for_writing(tmp_path, kind="scores", config={}, inputs={}, seed=0, num_units=1)
    stage.write_table(0, score_table([scores], per_layer_timestep=True))
    stage.finish()
    assert list(iter_scores(tmp_path)) == [scores]
    plain = score_table([replace(scores, per_layer_timestep=None)])
    assert plain.column_names == ["problem_id", "sample_index", "deviation", "score", "flow_reward"]


def test_scores_of_other_tokens_than_the_deviation_are_refused() -> None:
    whole = ScoreRow(problem_id="a", sample_index=1, deviation=[None, 0.5], score=[None, 2.0], flow_reward=[None, 0.0])
    with pytest.raises(InputError, match="1 entries of score for 2 of deviation"):
        score_table([replace(whole, score=[2.0])])
    with pytest.raises(InputError, match="flow_reward is null for other tokens"):
        score_table([replace(whole, flow_reward=[0.0, 0.0])])
