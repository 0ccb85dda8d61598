"""`rlfr score --html`: the page holds the scores that were written, also when they were written before."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlfr_cli.artifacts.rollouts import iter_rollouts
from rlfr_cli.artifacts.scores import iter_scores
from rlfr_cli.stages import score
from stages.tiny_stages import TinyArtifacts, score_config


def test_the_page_holds_the_scores_on_disk(tiny: TinyArtifacts, tmp_path: Path) -> None:
    given = {"model": str(tiny.policy), "rollouts": tiny.rollouts}
    score.run(score_config(tiny.flow, tmp_path / "scores", **given))
    page = tmp_path / "scores" / "page.html"
    # The page is no part of the artifact: asking for it continues complete work.
    summary = score.run(score_config(tiny.flow, tmp_path / "scores", html=page, html_responses=9, **given))
    assert (summary["html"], summary["responses_on_page"]) == (str(page), 8)
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[0])
    shown = {(entry["id"], entry["sample"]): entry for entry in data["responses"]}
    assert len(shown) == 8
    rollouts = {(row.problem_id, row.sample_index): row for row in iter_rollouts(tiny.rollouts)}
    for row in iter_scores(tmp_path / "scores"):
        entry = shown.get((row.problem_id, row.sample_index))
        if entry is None:
            continue
        assert entry["values"]["score"] == [None if v is None else pytest.approx(v, rel=1e-3) for v in row.score]
        assert entry["values"]["flow_reward"] == [
            None if v is None else pytest.approx(v, rel=1e-3) for v in row.flow_reward
        ]
        rollout = rollouts[row.problem_id, row.sample_index]
        assert (entry["grade"], entry["problem"]) == (rollout.grade, rollout.problem)
        texts = [data["texts"][place] for place in entry["tokens"]]
        assert "".join(texts).removesuffix("<end>") == rollout.response
        assert texts[-1] == "<end>" or rollout.finish_reason == "length"


def test_a_part_writes_no_page_until_all_parts_are_there(tiny: TinyArtifacts, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    given = {"model": str(tiny.policy), "rollouts": tiny.rollouts, "html": page}
    score.run(score_config(tiny.flow, tmp_path / "scores", part="1/2", **given))
    assert not page.exists()
    score.run(score_config(tiny.flow, tmp_path / "scores", part="2/2", **given))
    assert page.exists()
