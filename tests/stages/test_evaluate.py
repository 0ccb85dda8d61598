"""`eval`: the figures of a set of responses by hand, and what the command leaves on disk."""

from __future__ import annotations

import json
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlfr_cli.artifacts.folder import StageFolder
from rlfr_cli.artifacts.reading import ArtifactFolder
from rlfr_cli.artifacts.rollouts import RolloutRow, table_rows
from rlfr_cli.config.common import GradingConfig
from rlfr_cli.engines import opening
from rlfr_cli.engines.generation import Generation
from rlfr_cli.engines.hf import HfEngine
from rlfr_cli.errors import ConfigError, OutputInUseError, Stopped
from rlfr_cli.grading.answers import AnswerFallback
from rlfr_cli.stages import evaluate
from rlfr_cli.stages.evaluate import default_ks, summarise
from stages.tiny_stages import TinyArtifacts, bytes_of, eval_config, interrupt_after, sampling_of


def response(
    problem: str, sample: int, answer: str | None, grade: str, *, cut: bool = False, tokens: int = 4
) -> RolloutRow:
    return RolloutRow(
        problem_id=problem,
        sample_index=sample,
        problem="?",
        answer=["7"],
        prompt_token_ids=[1],
        response_token_ids=[2] * tokens,
        response_logprobs=None,
        response="none" if answer is None else f"so \\boxed{{{answer}}}",
        finish_reason="length" if cut else "stop",
        reward=0.0,
        correct=grade == "correct",
        grade=grade,
    )


ROWS = [
    # Two of four right, one of them cut off behind its answer; the others say 8 and nothing.
    response("a", 0, "7", "correct", tokens=10),
    response("a", 1, "8", "wrong"),
    response("a", 2, "7", "correct", cut=True),
    response("a", 3, None, "no_answer", cut=True),
    # Three of four right.
    response("b", 0, "7", "correct"),
    response("b", 1, "7.0", "correct"),
    response("b", 2, "8", "wrong"),
    response("b", 3, "7", "correct"),
]


def test_figures_of_fixed_responses_by_hand() -> None:
    figures = summarise(ROWS, (1, 2, 4), AnswerFallback.NONE)
    assert (figures["problems"], figures["samples"], figures["responses"]) == (2, 4, 8)
    assert figures["accuracy"]["value"] == pytest.approx((1 / 4 + 3 / 4) / 2)
    assert figures["accuracy_with_cut_off"]["value"] == pytest.approx((2 / 4 + 3 / 4) / 2)
    assert figures["accuracy_of_finished"]["value"] == pytest.approx((1 / 2 + 3 / 4) / 2)
    for k in (1, 2, 4):
        wanted = np.mean([1 - comb(4 - correct, k) / comb(4, k) for correct in (1, 3)])
        assert figures["pass_at_k"][str(k)]["value"] == pytest.approx(wanted)
    # Majority of 4: "7" has two votes in both, and its first sample counts. Of 2: a: 7 first, then 7 (cut off, so
    # wrong) and nobody; b: 7, then 8 before 7.
    assert figures["majority_at_k"]["4"]["value"] == 1
    assert figures["majority_at_k"]["2"]["value"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert figures["majority_at_k"]["1"]["value"] == figures["accuracy"]["value"]
    assert figures["mean_response_tokens"] == (10 + 7 * 4) / 8
    assert figures["cut_off"] == 2
    assert figures["grades"] == {"correct": 5, "no_answer": 1, "wrong": 2}
    assert figures["by_problem"] == {"a": {"correct": 1, "cut_off": 2}, "b": {"correct": 3, "cut_off": 0}}


def test_intervals_count_problems_and_not_responses() -> None:
    figures = summarise(ROWS, (1,), AnswerFallback.NONE)
    assert figures["accuracy"]["count"] == 2
    # Means 1/4 and 3/4: t(0.975, 1) = 12.706 times s / sqrt(2) = 0.25 is more than all there is.
    assert (figures["accuracy"]["low"], figures["accuracy"]["high"]) == (0, 1)


def test_all_cut_off_leaves_nothing_finished() -> None:
    figures = summarise([response("a", 0, "7", "correct", cut=True)], (1,), AnswerFallback.NONE)
    assert figures["accuracy"]["value"] == 0
    assert figures["accuracy_with_cut_off"]["value"] == 1
    assert figures["accuracy_of_finished"]["value"] is None


def test_default_ks_are_powers_of_two_and_the_number_itself() -> None:
    assert [default_ks(n) for n in (1, 4, 6)] == [(1,), (1, 2, 4), (1, 2, 4, 6)]


def test_answers_that_were_written_are_graded_and_counted(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that answers by rote: right in half of the samples, which the whole command then reports."""
    golds = [json.loads(line)["answer"] for line in tiny.problems.read_text().splitlines()]

    def rote(self: HfEngine, requests: Any, sampling: Any, *, key: Any, on_finished: Any) -> list[Generation]:
        unit = key[1]
        answers = [golds[2 * unit + index // 4] if index % 2 else "0" for index in range(len(requests))]
        return [Generation([5, 6], [-1.0, -1.0], f"\\boxed{{{answer}}}", "stop") for answer in answers]

    monkeypatch.setattr(HfEngine, "generate", rote)
    results = evaluate.run(eval_config(tiny.policy, tiny.problems, tmp_path))
    assert results["accuracy"]["value"] == 0.5
    assert results["pass_at_k"]["2"]["value"] == pytest.approx(1 - 1 / 6)
    assert results["pass_at_k"]["4"]["value"] == 1
    assert results["majority_at_k"]["4"]["value"] == 0, "ties go to the answer seen first"


@pytest.fixture(scope="module")
def evaluated(tiny: TinyArtifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "eval"
    evaluate.run(eval_config(tiny.policy, tiny.problems, out))
    return out


def test_results_are_those_of_the_responses_on_disk(evaluated: Path) -> None:
    results = json.loads((evaluated / "results.json").read_text())
    artifact = ArtifactFolder(evaluated, "eval")
    rows = [row for unit in range(3) for row in table_rows(artifact.read_table(unit))]
    assert len(rows) == 24
    assert 0 < results["accuracy"]["value"] < 1
    assert results["accuracy"]["value"] == pytest.approx(np.mean([row.correct for row in rows]))
    right: dict[str, int] = {}
    for row in rows:
        right[row.problem_id] = right.get(row.problem_id, 0) + row.correct
    assert {name: entry["correct"] for name, entry in results["by_problem"].items()} == right
    assert results["pass_at_k"]["4"]["value"] == pytest.approx(np.mean([count > 0 for count in right.values()]))
    assert list(results["pass_at_k"]) == ["1", "2", "4"]


def test_parts_and_stops_give_the_bytes_of_one_run(
    tiny: TinyArtifacts, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate.run(eval_config(tiny.policy, tiny.problems, tmp_path, part="2/3"))
    assert first == {"out": str(tmp_path), "complete": False, "units_missing": 2}
    assert not (tmp_path / "results.json").exists()
    with monkeypatch.context() as patch:
        interrupt_after(patch, StageFolder, "write_table", 1)
        with pytest.raises(Stopped) as caught:
            evaluate.run(eval_config(tiny.policy, tiny.problems, tmp_path))
    assert "the same command continues" in str(caught.value)
    assert evaluate.run(eval_config(tiny.policy, tiny.problems, tmp_path))["complete"]
    assert bytes_of(tmp_path) == bytes_of(evaluated)


def test_a_complete_evaluation_is_told_again(
    tiny: TinyArtifacts, evaluated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bytes_of(evaluated)
    monkeypatch.setattr(opening, "load_policy", None)
    again = evaluate.run(eval_config(tiny.policy, tiny.problems, evaluated))
    assert "nothing to do" in capsys.readouterr().err
    stored = json.loads((evaluated / "results.json").read_text())
    assert {key: again[key] for key in ("accuracy", "pass_at_k", "majority_at_k")} == {
        key: stored[key] for key in ("accuracy", "pass_at_k", "majority_at_k")
    }
    with pytest.raises(OutputInUseError, match=r"config\.num_samples: 4 there, 2 here"):
        evaluate.run(eval_config(tiny.policy, tiny.problems, evaluated, num_samples=2))
    assert bytes_of(evaluated) == before


def test_a_list_of_k_is_reported_as_asked(tiny: TinyArtifacts, tmp_path: Path) -> None:
    results = evaluate.run(eval_config(tiny.policy, tiny.problems, tmp_path, num_samples=3, k=(3, 1)))
    assert list(results["pass_at_k"]) == list(results["majority_at_k"]) == ["3", "1"]
    with pytest.raises(ConfigError, match="--k 5 needs as many samples"):
        eval_config(tiny.policy, tiny.problems, tmp_path, k=(5,))


def test_greedy_evaluation_draws_one_response(tiny: TinyArtifacts, tmp_path: Path) -> None:
    greedy = sampling_of(temperature=0.0)
    with pytest.raises(ConfigError, match="--num-samples 4") as caught:
        eval_config(tiny.policy, tiny.problems, tmp_path, sampling=greedy)
    assert "--num-samples 1" in str(caught.value.hint)
    config = eval_config(tiny.policy, tiny.problems, tmp_path / "0", sampling=greedy, num_samples=1)
    other = eval_config(tiny.policy, tiny.problems, tmp_path / "1", sampling=greedy, num_samples=1, seed=1)
    assert evaluate.run(config)["accuracy"] == evaluate.run(other)["accuracy"]


def test_a_dry_run_writes_nothing(tiny: TinyArtifacts, tmp_path: Path) -> None:
    plan = evaluate.run(eval_config(tiny.policy, tiny.problems, tmp_path / "eval", dry_run=True))
    assert (plan["problems"], plan["responses"]) == (6, 24)
    assert list(tmp_path.iterdir()) == []


def test_the_fallback_grades_an_answer_without_a_box(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golds = [json.loads(line)["answer"] for line in tiny.problems.read_text().splitlines()]

    def unboxed(self: HfEngine, requests: Any, sampling: Any, *, key: Any, on_finished: Any) -> list[Generation]:
        return [Generation([5], [-1.0], f"the answer is {golds[2 * key[1] + i]}", "stop") for i in range(len(requests))]

    monkeypatch.setattr(HfEngine, "generate", unboxed)
    accuracies = {}
    for fallback in (AnswerFallback.NONE, AnswerFallback.LAST_NUMBER):
        grading = GradingConfig(answer_fallback=fallback)
        config = eval_config(tiny.policy, tiny.problems, tmp_path / fallback, num_samples=1, grading=grading)
        accuracies[fallback] = evaluate.run(config)["accuracy"]["value"]
    assert accuracies == {AnswerFallback.NONE: 0, AnswerFallback.LAST_NUMBER: 1}
