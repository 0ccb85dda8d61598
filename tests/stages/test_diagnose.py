"""`diagnose`: finds a signal that is planted, none where there is none, and refuses what cannot be judged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlfr_cli.artifacts.folder import StageFolder
from rlfr_cli.artifacts.latents import LatentsFolder
from rlfr_cli.artifacts.rollouts import RolloutRow, iter_rollouts, rollout_table
from rlfr_cli.artifacts.scores import iter_scores
from rlfr_cli.config.diagnose import DiagnoseConfig
from rlfr_cli.errors import InputError, MismatchError, OutputInUseError
from rlfr_cli.flow.baselines import gaussian_error_on, zero_error_on
from rlfr_cli.report.chains import Place
from rlfr_cli.report.diagnosis import (
    PARTIAL,
    ResponseTable,
    TokenTable,
    correlations,
    reward_of_classes,
    separation_of_responses,
    separation_of_tokens,
)
from rlfr_cli.report.diagnosis_plots import PLOTS
from rlfr_cli.report.scores import ScoreSummary
from rlfr_cli.stages import diagnose, score
from stages.tiny_stages import TinyArtifacts, bytes_of, score_config
from tiny_models import make_model_folder


def diagnose_config(tiny: TinyArtifacts, out: Path, **options: Any) -> DiagnoseConfig:
    values: dict[str, Any] = {"flow": tiny.flow, "model": str(tiny.policy), "rollouts": tiny.rollouts}
    return DiagnoseConfig(**{**values, "device": "cpu", "out": out, **options})


def write_rollouts(path: Path, rows: list[RolloutRow]) -> Path:
    folder = StageFolder.open_for_writing(path, kind="rollouts", config={}, inputs={}, seed=0, num_units=1)
    folder.write_table(0, rollout_table(rows))
    folder.finish()
    return path


@pytest.fixture(scope="module")
def diagnosed(tiny: TinyArtifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("diagnosed") / "diagnosis"
    diagnose.run(diagnose_config(tiny, out))
    return out


@pytest.fixture(scope="module")
def results(diagnosed: Path) -> dict[str, Any]:
    return json.loads((diagnosed / "diagnosis.json").read_text())


def test_it_writes_numbers_and_plots_and_says_so_again(tiny: TinyArtifacts, diagnosed: Path) -> None:
    for name in PLOTS:
        assert (diagnosed / name).read_bytes().startswith(b"\x89PNG")
    before = bytes_of(diagnosed)
    summary = diagnose.run(diagnose_config(tiny, diagnosed))
    assert bytes_of(diagnosed) == before
    assert summary["complete"]
    assert summary["answer"]["in_words"].startswith("Does the score tell wrong from correct responses")


def test_twice_gives_the_same_bytes(tiny: TinyArtifacts, diagnosed: Path, tmp_path: Path) -> None:
    diagnose.run(diagnose_config(tiny, tmp_path))
    assert bytes_of(tmp_path) == bytes_of(diagnosed)


def test_another_seed_draws_other_noise(tiny: TinyArtifacts, results: dict[str, Any], tmp_path: Path) -> None:
    diagnose.run(diagnose_config(tiny, tmp_path, seed=1, limit=2))
    other = json.loads((tmp_path / "diagnosis.json").read_text())
    assert other["mean_score"] != results["mean_score"]


def test_batches_change_no_number(tiny: TinyArtifacts, results: dict[str, Any], tmp_path: Path) -> None:
    diagnose.run(diagnose_config(tiny, tmp_path, tokens_per_batch=120))
    other = json.loads((tmp_path / "diagnosis.json").read_text())

    def compare(ours: Any, theirs: Any, at: str = "") -> None:
        if isinstance(ours, dict):
            assert list(ours) == list(theirs)
            for key in ours:
                compare(ours[key], theirs[key], f"{at}/{key}")
        elif isinstance(ours, list):
            for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                compare(a, b, f"{at}/{place}")
        elif isinstance(ours, float):
            assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-3), at

    for name in results.keys() - {"answer"}:  # which repeats numbers in words
        ours, theirs = results[name], other[name]
        if name in ("separation", "first_wrong_token"):
            # Least squares of several controls on so few responses is at the mercy of rounding.
            ours, theirs = ([row for row in part["rows"] if row["measure"] != PARTIAL] for part in (ours, theirs))
        compare(ours, theirs, name)


def test_scores_and_their_areas_are_those_of_score(
    tiny: TinyArtifacts, results: dict[str, Any], tmp_path: Path
) -> None:
    summary = score.run(score_config(tiny.flow, tmp_path, model=str(tiny.policy), rollouts=tiny.rollouts))
    rows = {row["measure"]: row for row in results["separation"]["rows"]}
    assert results["mean_score"] == pytest.approx(
        np.mean([value for row in iter_scores(tmp_path) for value in row.score if value is not None]), rel=1e-5
    )
    for measure, key in (("score", "wrong_scores_higher"), ("negative_logprob", "control_negative_logprob")):
        assert rows[measure]["auc"] == pytest.approx(summary[key]["auc"]["value"])
        assert rows[measure]["within_problems"] == pytest.approx(summary[key]["auc_within_problem"]["value"])
    assert results["flow_reward"]["share_of_tokens_rewarded"] == pytest.approx(summary["share_of_tokens_rewarded"])
    assert results["flow_reward"]["sum_of_wrong"] == pytest.approx(summary["flow_reward_sum_of_wrong"])
    tokens = results["most_penalised_tokens"]
    assert tokens[0]["mean_flow_reward"] == pytest.approx(summary["most_penalised_tokens"][0]["mean_flow_reward"])


def test_the_baselines_are_judged_on_problems_that_the_gaussian_has_not_seen(
    tiny: TinyArtifacts, results: dict[str, Any]
) -> None:
    """The per-channel Gaussian from the latents on disk, in closed form, against what was measured on noise."""
    folder = LatentsFolder(tiny.latents)
    names = [name for unit in range(folder.num_shards) for name in folder.read_names(unit)]
    sequences = []
    for unit in range(folder.num_shards):
        shard = folder.read_sequences(unit, 0, len(folder.read_names(unit)))
        sequences += [shard.sequence(index)[0][1:] for index in range(shard.num_sequences)]
    problems = list(dict.fromkeys(name for name, _ in names))
    seen = torch.cat([s for s, (name, _) in zip(sequences, names, strict=True) if problems.index(name) % 2 == 0])
    # The last token has no next one, and is no target.
    judged = torch.cat([s[:-1] for s, (name, _) in zip(sequences, names, strict=True) if problems.index(name) % 2])
    for row in results["velocity_error"]["rows"]:
        column = (2, 5).index(row["layer"])
        mean, std = seen[:, column].mean(0), seen[:, column].std(0, correction=0)
        wanted = gaussian_error_on(row["timestep"], mean, std, judged[:, column])
        assert row["gaussian"] == pytest.approx(float(wanted), rel=0.05)
        assert row["zero"] == pytest.approx(float(zero_error_on(judged[:, column])), rel=0.05)


def test_first_wrong_tokens_are_found_in_the_wrong_responses(results: dict[str, Any]) -> None:
    found = results["first_wrong_token"]
    assert 0 < found["compared"] <= found["located"] <= found["wrong_responses"] == results["wrong"]
    assert found["located"] > 0.8 * found["wrong_responses"]


def test_fewer_problems_than_ten_allow_no_answer(results: dict[str, Any]) -> None:
    assert results["answer"]["responses"] == results["answer"]["first_wrong_tokens"] == "cannot tell"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grade": "ungraded", "correct": False}, "no response is graded"),
        ({"grade": "correct", "correct": True}, "every graded response is correct"),
        ({"grade": "wrong", "correct": False}, "every graded response is wrong"),
    ],
)
def test_one_class_gives_no_area_and_the_words_say_why(
    tiny: TinyArtifacts, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    rows = [replace(row, **change) for row in iter_rollouts(tiny.rollouts)]
    rollouts = write_rollouts(tmp_path / "rollouts", rows)
    summary = diagnose.run(diagnose_config(tiny, tmp_path / "out", rollouts=rollouts))
    assert all(row["auc"] is None for row in summary["separation_of_wrong_from_correct"])
    assert summary["answer"]["responses"] == "cannot tell"
    assert words in summary["answer"]["in_words"]


def test_bad_input_is_refused_before_anything_is_written(tiny: TinyArtifacts, diagnosed: Path, tmp_path: Path) -> None:
    other = make_model_folder(tmp_path / "model")
    with pytest.raises(MismatchError):
        diagnose.run(diagnose_config(tiny, tmp_path / "out", model=str(other)))
    with pytest.raises(InputError, match="one problem only"):
        diagnose.run(diagnose_config(tiny, tmp_path / "out", limit=1))
    with pytest.raises(OutputInUseError):
        diagnose.run(diagnose_config(tiny, diagnosed, temperature=0.5))
    assert diagnose.run(diagnose_config(tiny, tmp_path / "out", dry_run=True))["dry_run"]
    assert not (tmp_path / "out").exists()


def planted(signal: float, leak: float, seed: int = 0) -> tuple[ResponseTable, TokenTable]:
    """40 problems of 8 responses of 12 tokens.

    Scores of the first wrong token, and so of wrong responses, are raised by ``signal``; ``leak`` times the negative
    log-probability, which says a little of wrong too, is added to every score.
    """
    generator = np.random.default_rng(seed)
    num_responses, length = 320, 12
    problem_ids = [f"p{row // 8}" for row in range(num_responses)]
    wrong = generator.random(num_responses) < 0.5
    response = np.repeat(np.arange(num_responses), length)
    position = np.tile(np.arange(length), num_responses)
    first_wrong = wrong[response] & (position == 4)
    nll = generator.normal(size=len(response)) + 1.0 * first_wrong
    noise, random, shuffled, norm, entropy = generator.normal(size=(5, len(response)))
    score_N = noise + signal * first_wrong + leak * nll
    places = [
        Place(0, "result", 0, True) if at == 4 and (bad or not is_wrong) else None
        for at, bad, is_wrong in zip(position, first_wrong, wrong[response], strict=True)
    ]
    tokens = TokenTable(
        response=response,
        token_id=generator.integers(10, size=len(response)),
        position=position,
        score=score_N,
        flow_reward=-0.01 * score_N,
        negative_logprob=nll,
        entropy=entropy,
        latent_norm=norm,
        random_latents=random,
        shuffled_context=shuffled,
        places=places,
        first_wrong=first_wrong,
    )
    responses = ResponseTable(
        problem_ids=problem_ids,
        graded=np.ones(num_responses, dtype=bool),
        wrong=wrong,
        length=np.full(num_responses, length),
        negative_logprob=tokens.over_responses(nll, num_responses),
        entropy=tokens.over_responses(entropy, num_responses),
    )
    return responses, tokens


def test_a_planted_signal_is_found_beyond_the_controls() -> None:
    responses, tokens = planted(signal=5.0, leak=0.0)
    found = separation_of_responses(responses, tokens, seed=0)
    rows = {row["measure"]: row for row in found["rows"]}
    assert rows["score"]["within_low"] > 0.7
    assert rows[PARTIAL]["within_low"] > 0.7
    assert rows["length"]["within_problems"] == 0.5
    assert found["above_best_control"]["low"] > 0
    assert found["above_shuffled_context"]["low"] > 0
    located = separation_of_tokens(responses, tokens, seed=0)
    by_measure = {row["measure"]: row for row in located["rows"]}
    assert by_measure["score"]["low"] > 0.95
    assert by_measure[PARTIAL]["low"] > 0.95
    assert by_measure["shuffled_context"]["low"] < 0.5 < by_measure["shuffled_context"]["high"]
    assert located["best_control"] == "negative_logprob"
    assert located["above_best_control"]["low"] > 0
    assert located["compared"] == responses.wrong.sum()
    assert reward_of_classes(responses, tokens)["wrong_less_correct_within_problems"]["high"] < 0


def test_a_score_that_is_log_probability_and_noise_has_nothing_beyond_it() -> None:
    responses, tokens = planted(signal=0.0, leak=5.0)
    located = {row["measure"]: row for row in separation_of_tokens(responses, tokens, seed=0)["rows"]}
    assert located["score"]["low"] > 0.6
    assert located[PARTIAL]["low"] < 0.5 < located[PARTIAL]["high"]
    within = {row["measure"]: row for row in separation_of_responses(responses, tokens, seed=0)["rows"]}[PARTIAL]
    assert within["within_low"] < 0.5 < within["within_high"]


def test_a_score_that_falls_where_it_should_rise_is_below() -> None:
    responses, tokens = planted(signal=-5.0, leak=0.0)
    rows = {row["measure"]: row for row in separation_of_responses(responses, tokens, seed=0)["rows"]}
    assert rows["score"]["within_high"] < 0.5
    assert rows[PARTIAL]["within_high"] < 0.5
    assert reward_of_classes(responses, tokens)["wrong_less_correct_within_problems"]["low"] > 0


def test_correlations_have_the_sign_of_the_quantity() -> None:
    responses, tokens = planted(signal=0.0, leak=2.0)
    rows = {row["with"]: row for row in correlations(responses, tokens, seed=0)}
    assert rows["log-probability"]["high"] < -0.8
    assert rows["response length"]["spearman"] is None  # all are of one length
    assert abs(rows["entropy"]["spearman"]) < 0.1


def test_the_summary_of_score_and_of_diagnose_share_their_token_table() -> None:
    summary = ScoreSummary(0, 1, None)
    summary.by_token = {3: (5, -1.0, 10.0), 4: (5, 0.0, 5.0), 5: (4, -9.0, 1.0)}
    tokens = summary.result()
    assert tokens["most_penalised_tokens"][0] == {
        "token": "3",
        "count": 5,
        "mean_flow_reward": -0.2,
        "mean_score": 2.0,
    }
    assert tokens["least_penalised_tokens"][0]["token"] == "4"


def test_rollouts_of_a_run_have_the_runs_temperature(tiny: TinyArtifacts, tmp_path: Path) -> None:
    rollouts = tmp_path / "run" / "rollouts"
    shutil.copytree(tiny.rollouts, rollouts / "step-000001")
    run = {"kind": "run", "format_version": 1, "config": {"sampling": {"temperature": 0.6}}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(run))
    for given in (rollouts, rollouts / "step-000001"):
        config = DiagnoseConfig(flow=tiny.flow, model=str(tiny.policy), rollouts=given)
        assert diagnose._temperature(config) == 0.6
    shutil.copytree(tiny.rollouts, tmp_path / "rollouts")
    plain = DiagnoseConfig(flow=tiny.flow, model=str(tiny.policy), rollouts=tmp_path / "rollouts")
    assert diagnose._temperature(plain) == 1.0


def test_a_token_that_the_model_does_not_know_is_refused_before_work(tiny: TinyArtifacts, tmp_path: Path) -> None:
    rows = list(iter_rollouts(tiny.rollouts))
    rows[3].response_token_ids[0] = 100_000
    folder = StageFolder.open_for_writing(
        tmp_path / "rollouts", kind="rollouts", config={}, inputs={}, seed=0, num_units=1
    )
    folder.write_table(0, rollout_table(rows))
    folder.finish({})
    config = DiagnoseConfig(
        flow=tiny.flow, model=str(tiny.policy), rollouts=tmp_path / "rollouts", out=tmp_path / "out", device="cpu"
    )
    with pytest.raises(InputError, match="100000") as caught:
        diagnose.run(config)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
