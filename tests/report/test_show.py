"""`rlfr show`: every kind of artifact explained, and what is wrong with it named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlfr_cli.artifacts.fingerprint import ModelFingerprint
from rlfr_cli.artifacts.flow_file import FlowHeader, save_flow
from rlfr_cli.artifacts.folder import StageFolder
from rlfr_cli.artifacts.latents import LatentsInfo, latents_shard
from rlfr_cli.artifacts.rollouts import RolloutRow, rollout_table
from rlfr_cli.artifacts.run_folder import RunFolder
from rlfr_cli.artifacts.scores import ScoreRow, score_table
from rlfr_cli.errors import ArtifactError, MissingInputError
from rlfr_cli.report.show import Shown, show

MODEL = ModelFingerprint(model_type="t", num_blocks=4, hidden_size=6, vocab_size=9, weights_sha256="ab" * 32)


def stage(path: Path, kind: str, num_units: int = 1) -> StageFolder:
    inputs = {"model": MODEL.to_dict()}
    return StageFolder.open_for_writing(path, kind=kind, config={"t": 1}, inputs=inputs, seed=0, num_units=num_units)


def row(problem: int, reward: float, grade: str, response: str = "so \\boxed{2}") -> RolloutRow:
    return RolloutRow(
        problem_id=f"p{problem}",
        sample_index=0,
        problem="1 + 1?",
        answer=["2"],
        prompt_token_ids=[5, 6],
        response_token_ids=[7, 8, 2],
        response_logprobs=None,
        response=response,
        finish_reason="stop",
        reward=reward,
        correct=grade == "correct",
        grade=grade,
    )


def make_rollouts(path: Path) -> Path:
    folder = stage(path, "rollouts", num_units=2)
    folder.write_table(0, rollout_table([row(0, 1.0, "correct"), row(1, 0.5, "wrong", "it is\n\x1b[31m3")]))
    folder.write_table(1, rollout_table([row(2, 0.0, "no_answer")]))
    folder.finish()
    return path


def make_latents(path: Path) -> Path:
    folder = stage(path, "latents")
    latents = torch.full((5, 1, 6), 2.0).bfloat16()
    folder.write_tensors(0, latents_shard(latents, torch.arange(5), torch.tensor([0, 2, 5]), torch.tensor([3, 4])))
    info = LatentsInfo(
        layer_indices=(2,),
        num_blocks=4,
        hidden_size=6,
        num_prompt_tokens=1,
        dtype="bfloat16",
        model=MODEL,
        source="s",
    )
    folder.finish(info.to_extra())
    return path


def make_scores(path: Path) -> Path:
    folder = stage(path, "scores")
    scores = ScoreRow(
        problem_id="p0",
        sample_index=4,
        deviation=[None, 0.5, 1.5],
        score=[None, 2.0, 6.0],
        flow_reward=[None, 0.0, -0.01],
    )
    folder.write_table(0, score_table([scores]))
    folder.finish()
    return path


def make_flow(path: Path) -> Path:
    header = FlowHeader(
        latent_size=6,
        condition_size=6,
        width=6,
        depth=1,
        num_frequencies=4,
        rms_epsilon=1e-6,
        time_scale=1.0,
        layer_indices=(2,),
        num_blocks=4,
        pairings=({"context": "next", "shift": 1},),
        model=MODEL,
        heldout_loss=0.25,
    )
    save_flow(path / "flow.safetensors", header, {"w": torch.ones(2)})
    return path / "flow.safetensors"


def make_run(path: Path) -> Path:
    run = RunFolder.create(path, config={"seed": 0}, inputs={"model": MODEL.to_dict()})
    for step in (1, 2):
        run.log_metrics(step, {"reward/mean": step / 4})
        run.write_rollouts(step, rollout_table([row(step, 1.0, "correct")], run=True))
    with run.checkpoint(2, extra={"best": 1}) as folder:
        make_flow(folder)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
    return path


def make_eval(path: Path) -> Path:
    folder = stage(path, "eval")
    folder.write_table(0, rollout_table([row(0, 1.0, "correct")]))
    folder.finish({"pass@1": 1.0})
    return path


def text(shown: Shown) -> str:
    return "\n".join(shown.lines())


MAKERS = {
    "rollouts": make_rollouts,
    "latents": make_latents,
    "scores": make_scores,
    "flow": make_flow,
    "run": make_run,
    "eval": make_eval,
    "checkpoint": lambda path: make_run(path) / "checkpoints" / "step-000002",
}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_is_explained_and_verified(tmp_path: Path, kind: str) -> None:
    path = MAKERS[kind](tmp_path / "out")
    shown = show(path, verify=True, num_rows=2)
    assert (shown.kind, shown.state, shown.verified, shown.note) == (kind, "complete", True, "")
    assert text(shown).startswith(f"{path}: {kind}, complete, every digest checked")
    assert json.loads(json.dumps(shown.to_dict(), allow_nan=False))["kind"] == kind
    assert not show(path).verified
    assert show(path).rows == []


@pytest.mark.parametrize("kind", MAKERS)
def test_an_altered_byte_is_found_by_verify(tmp_path: Path, kind: str) -> None:
    path = MAKERS[kind](tmp_path / "out")
    pattern = {"run": "checkpoints/*/flow.safetensors", "checkpoint": "flow.safetensors"}.get(kind, "shards/00000.*")
    file = path if kind == "flow" else next(f for f in sorted(path.glob(pattern)) if f.suffix != ".json")
    data = bytearray(file.read_bytes())
    # The last byte of a safetensors file is data; an Arrow file ends with its magic, so take one from within.
    place = -1 if file.suffix == ".safetensors" else data.rindex(b"p0")
    data[place] ^= 1
    file.write_bytes(data)
    assert show(path).state == "complete"
    shown = show(path, verify=True)
    assert (shown.state, shown.verified) == ("damaged", False)
    assert file.name in shown.note
    assert "altered" in shown.note


def test_rollouts_are_counted_and_printed(tmp_path: Path) -> None:
    shown = show(make_rollouts(tmp_path / "rollouts"), num_rows=2)
    assert shown.facts["problems"] == 3
    assert shown.facts["response_tokens"] == 9
    assert shown.facts["mean_reward"] == pytest.approx(0.5)
    assert shown.facts["grade"] == {"correct": 1, "no_answer": 1, "wrong": 1}
    assert shown.facts["from"]["model"]["weights_sha256"] == "ab" * 32
    printed = text(shown)
    assert "t, 4 blocks, hidden size 6, vocabulary 9, weights abababababababab…" in printed
    assert "correct 1, no_answer 1, wrong 1" in printed
    assert len(printed.split("problem p0")[0].splitlines()) < 20
    assert "problem p0, sample 0: correct, reward 1, 3 tokens, finish reason stop" in printed
    assert "response: so \\boxed{2}" in printed
    # What a policy writes must not steer the terminal.
    assert "\x1b" not in printed
    assert "    \N{REPLACEMENT CHARACTER}[31m3" in printed
    assert [r["grade"] for r in shown.rows] == ["correct", "wrong"]
    assert shown.rows[1]["response"] == "it is\n\x1b[31m3"


def test_the_rollouts_of_a_run(tmp_path: Path) -> None:
    shown = show(make_run(tmp_path) / "rollouts", verify=True, num_rows=5)
    assert (shown.kind, shown.facts["steps"], shown.facts["rows"], shown.verified) == ("rollouts", 2, 2, True)
    assert [r["problem_id"] for r in shown.rows] == ["p1", "p2"]
    assert show(tmp_path / "rollouts" / "step-000001").facts["rows"] == 1


def test_an_evaluation_shows_results_and_responses(tmp_path: Path) -> None:
    shown = show(make_eval(tmp_path), num_rows=5)
    assert shown.facts["holds"] == {"pass@1": 1.0}
    assert "problem p0, sample 0: correct, reward 1, 3 tokens, finish reason stop" in text(shown)


def test_scores_show_the_highest_tokens_first(tmp_path: Path) -> None:
    shown = show(make_scores(tmp_path), num_rows=1)
    (shown_row,) = shown.rows
    assert [token["token"] for token in shown_row["top_tokens"]] == [2, 1]
    assert shown_row["num_valid_tokens"] == 2
    assert "problem p0, sample 4: 2 of 3 tokens valid" in text(shown)


def test_latents_show_shapes(tmp_path: Path) -> None:
    shown = show(make_latents(tmp_path), num_rows=9)
    assert shown.facts["tokens"] == 5
    assert shown.facts["holds"]["layer_indices"] == [2]
    assert [(r["sequence_id"], r["shape"], r["rms_by_layer"]) for r in shown.rows] == [
        (3, [2, 1, 6], [2.0]),
        (4, [3, 1, 6], [2.0]),
    ]


def test_a_run_shows_its_last_steps(tmp_path: Path) -> None:
    shown = show(make_run(tmp_path), num_rows=1)
    assert shown.rows == [{"step": 2, "reward/mean": 0.5}]
    assert (shown.facts["steps_logged"], shown.facts["whole_checkpoints"]) == (2, [2])
    checkpoint = show(tmp_path / "checkpoints" / "step-000002")
    assert checkpoint.facts["step"] == 2
    assert checkpoint.facts["flow"]["heldout_loss"] == 0.25


def test_unfinished_work_says_how_far_it_is(tmp_path: Path) -> None:
    folder = stage(tmp_path, "rollouts", num_units=16)
    for unit in (0, 5, 7):
        folder.write_table(unit, rollout_table([row(unit, 1.0, "correct")]))
    shown = show(tmp_path, verify=True, num_rows=1)
    assert shown.state == "unfinished"
    assert shown.note == "3 of 16 units are done; the same command continues"
    assert not shown.verified


def test_damage_names_the_file(tmp_path: Path) -> None:
    path = make_rollouts(tmp_path / "rollouts")
    (path / "shards" / "00001.arrow").unlink()
    shown = show(path)
    assert shown.state == "damaged"
    assert "00001.arrow is missing" in shown.note
    run = make_run(tmp_path / "run")
    (run / "checkpoints" / "step-000002" / "model" / "config.json").write_text("cut")
    assert show(run).state == "damaged"
    assert "step-000002 is not whole" in show(run).note


@pytest.mark.parametrize("name", ["empty", "model", "page.html"])
def test_what_is_none_of_ours_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "page.html").write_text("<html>")
    with pytest.raises(ArtifactError, match="is not an artifact of rlfr") as caught:
        show(tmp_path / name)
    assert "rollouts, latents, scores" in str(caught.value.hint)
    with pytest.raises(MissingInputError):
        show(tmp_path / "gone")
