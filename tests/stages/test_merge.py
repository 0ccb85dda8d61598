"""`merge`: completes what parts left, without their inputs, and names what is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlfr_cli.artifacts.folder import StageFolder
from rlfr_cli.artifacts.latents import LatentsFolder
from rlfr_cli.config.extract_latents import StoreDtype
from rlfr_cli.errors import ArtifactError, MissingInputError
from rlfr_cli.stages import evaluate, extract_latents, sample, score
from rlfr_cli.stages.merge import merge, what_is_missing
from stages.tiny_stages import (
    TinyArtifacts,
    bytes_of,
    eval_config,
    extract_config,
    interrupt_after,
    sample_config,
    sampling_of,
    score_config,
)

Stage = Callable[[TinyArtifacts, Path, str | None], Any]
SHORT = sampling_of(max_new_tokens=6)
STAGES: dict[str, Stage] = {
    "rollouts": lambda tiny, out, part: sample.run(
        sample_config(tiny.policy, tiny.problems, out, sampling=SHORT, part=part)
    ),
    "latents": lambda tiny, out, part: extract_latents.run(
        extract_config(tiny.policy, out, rollouts=tiny.rollouts, store=StoreDtype.FLOAT32, part=part)
    ),
    "scores": lambda tiny, out, part: score.run(
        score_config(tiny.flow, out, model=str(tiny.policy), rollouts=tiny.rollouts, part=part)
    ),
    "eval": lambda tiny, out, part: evaluate.run(
        eval_config(tiny.policy, tiny.problems, out, sampling=SHORT, part=part)
    ),
}


@pytest.mark.parametrize("kind", STAGES)
def test_merge_completes_what_a_part_left_that_died_before_finishing(
    tiny: TinyArtifacts, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = STAGES[kind], tmp_path / "out"
    run(tiny, tmp_path / "whole", None)
    run(tiny, out, "1/2")

    def die(folder: StageFolder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StageFolder, "finish", die)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, out, "2/2")
    (out / "results.json").unlink(missing_ok=True)
    assert not (out / "manifest.json").exists()
    assert merge(out) == {
        "out": str(out),
        "kind": kind,
        "complete": True,
        "units": 3,
        "units_missing": [],
        "parts_missing": [],
    }
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    assert run(tiny, out, None)["complete"]


@pytest.mark.parametrize("kind", STAGES)
def test_three_parts_give_the_bytes_of_one(tiny: TinyArtifacts, tmp_path: Path, kind: str) -> None:
    STAGES[kind](tiny, tmp_path / "one", None)
    complete = [STAGES[kind](tiny, tmp_path / "parts", part)["complete"] for part in ("2/3", "3/3", "1/3")]
    assert complete == [False, False, True]
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "one")


def test_merge_changes_nothing_in_a_complete_folder(tiny: TinyArtifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {path: path.stat().st_mtime_ns for path in tiny.latents.rglob("*")}
    assert merge(tiny.latents)["complete"]
    assert {path: path.stat().st_mtime_ns for path in tiny.latents.rglob("*")} == times
    assert LatentsFolder(tiny.latents).info.layer_indices == (2, 5)


def test_merge_names_the_missing_units_their_parts_and_the_command(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sample_config(tiny.policy, tiny.problems, tmp_path, problems_per_shard=1, sampling=SHORT)
    with monkeypatch.context() as patch:
        interrupt_after(patch, StageFolder, "write_table", 1)
        with pytest.raises(InterruptedError):
            sample.run(sample_config(tiny.policy, tiny.problems, tmp_path, **_same(config), part="2/3"))
    sample.run(sample_config(tiny.policy, tiny.problems, tmp_path, **_same(config), part="3/3"))
    before = bytes_of(tmp_path)
    merged = merge(tmp_path)
    assert (merged["complete"], merged["units_missing"]) == (False, [0, 3, 4])
    assert merged["parts_missing"] == ["1/3", "2/3"]
    message, hint = what_is_missing(merged)
    assert "of 6 units, 3 are missing: 0, 3, 4; of the parts: 1/3, 2/3" in message
    assert "run `rlfr sample` again with the same options and --part 1/3, --part 2/3 in turn" in hint
    assert bytes_of(tmp_path) == before
    sample.run(config)
    assert merge(tmp_path)["complete"]


def _same(config: Any) -> dict[str, Any]:
    return {"problems_per_shard": config.problems_per_shard, "sampling": config.sampling}


def test_work_that_was_not_cut_is_continued_by_the_same_command(tiny: TinyArtifacts, tmp_path: Path) -> None:
    out = tmp_path / "rollouts"
    shutil.copytree(tiny.rollouts, out)
    (out / "manifest.json").unlink()
    (out / "shards" / "00001.arrow").unlink()
    merged = merge(out)
    assert (merged["units_missing"], merged["parts_missing"]) == ([1], [])
    assert what_is_missing(merged)[1] == "run `rlfr sample` again with the same options: it continues"


def test_what_is_not_made_in_parts_is_refused(tiny: TinyArtifacts, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="flow-fit, which is not made in parts") as caught:
        merge(tiny.flow.with_name("flow.fit"))
    assert "`rlfr extract-latents`" in str(caught.value.hint)
    with pytest.raises(MissingInputError):
        merge(tmp_path / "nothing")
    out = tmp_path / "rollouts"
    shutil.copytree(tiny.rollouts, out)
    for key, said in (("format_version", "format version None"), ("extra", "earlier version")):
        stage = json.loads((tiny.rollouts / "stage.json").read_text())
        stage[key] = None
        if key == "extra":
            del stage[key]
        (out / "stage.json").write_text(json.dumps(stage))
        with pytest.raises(ArtifactError, match=said):
            merge(out)
