"""Scores of a run's rollouts on a page: beside the new scores stand the advantage and entropy that the run knew."""

from __future__ import annotations

from pathlib import Path

import pytest

from report.test_page import data_of, trained
from rlfr_cli.artifacts.fingerprint import model_fingerprint
from rlfr_cli.artifacts.flow_file import FlowHeader
from rlfr_cli.artifacts.rollouts import rollout_table
from rlfr_cli.artifacts.scores import ScoreRow, score_table
from rlfr_cli.config.flow import FlowRewardConfig
from rlfr_cli.policy.loading import load_tokenizer
from rlfr_cli.report.page_inputs import write_scores_page

HEADER = FlowHeader(
    latent_size=8,
    condition_size=8,
    width=8,
    depth=1,
    num_frequencies=4,
    rms_epsilon=1e-6,
    time_scale=1.0,
    layer_indices=(1,),
    num_blocks=4,
    pairings=({"context": "next", "shift": 1},),
)


@pytest.mark.parametrize("of_a_run", [False, True])
def test_what_can_be_shaded_is_what_the_rollouts_hold(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_a_run: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    policy = repository / "data" / "policy"
    row = trained(0).row
    row.trainer_logprobs = [-0.25] * 3
    scored = ScoreRow(
        problem_id=row.problem_id,
        sample_index=row.sample_index,
        deviation=[9.0, 8.0, None],
        score=[36.0, 32.0, None],
        flow_reward=[-0.5, 0.0, None],
    )
    write_scores_page(
        tmp_path / "page.html",
        scores=[score_table([scored])],
        rollouts=rollout_table([row], run=of_a_run),
        tokenizer=load_tokenizer(policy),
        header=HEADER,
        flow=("flow.safetensors", "ab" * 32),
        model=model_fingerprint(policy),
        reward=FlowRewardConfig(),
        num_responses=10,
    )
    data = data_of((tmp_path / "page.html").read_text())
    values = data["responses"][0]["values"]
    # The new score, not the one that the run had written.
    assert values["score"] == [36, 32, None]
    assert values["flow_reward"] == [-0.5, 0, None]
    shades = [measure["key"] for measure in data["measures"] if measure["scale"] is not None]
    if of_a_run:
        assert shades == ["flow_reward", "score", "advantage", "entropy", "surprise"]
        assert (values["advantage"], values["entropy"]) == ([-1, -1, 0.5], [0.125, 3, 0.5])
    else:
        assert shades == ["flow_reward", "score", "surprise"]
