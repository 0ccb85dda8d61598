"""`score`: the right numbers for the right tokens, the same ones from rollouts and latents, in any batch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlfr_cli.artifacts.folder import StageFolder
from rlfr_cli.artifacts.latents import LatentsFolder
from rlfr_cli.artifacts.rollouts import RolloutRow, iter_rollouts
from rlfr_cli.artifacts.scores import ScoreRow, iter_scores
from rlfr_cli.config.flow import FlowRewardConfig, NetworkConfig
from rlfr_cli.errors import ArtifactError, ConfigError, MismatchError, MissingInputError, Stopped
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.noise import response_noise
from rlfr_cli.stages import extract_latents, fit_flow, score
from rlfr_cli.stages.flows import load_flow
from stages.tiny_stages import TinyArtifacts, bytes_of, extract_config, fit_config, interrupt_after, score_config
from tiny_models import make_model_folder


def from_rollouts(tiny: TinyArtifacts, out: Path, **options: Any) -> list[ScoreRow]:
    score.run(score_config(tiny.flow, out, **{"model": str(tiny.policy), "rollouts": tiny.rollouts, **options}))
    return list(iter_scores(out))


@pytest.fixture(scope="module")
def scored(tiny: TinyArtifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored") / "scores"
    from_rollouts(tiny, out, per_layer=True)
    return out


def assert_rows_close(rows: list[ScoreRow], others: list[ScoreRow], tolerance: float = 1e-5) -> None:
    for row, other in zip(rows, others, strict=True):
        assert (row.problem_id, row.sample_index) == (other.problem_id, other.sample_index)
        for column in ("deviation", "score"):
            ours, theirs = (np.array(getattr(r, column), dtype=float) for r in (row, other))
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_score_is_the_weighted_velocity_error_of_the_latent_given_the_next_one(
    tiny: TinyArtifacts, scored: Path
) -> None:
    """One response by hand, from transformers' hidden states to the number on disk."""
    row, given = list(iter_rollouts(tiny.rollouts))[5], list(iter_scores(scored))[5]
    model = AutoModelForCausalLM.from_pretrained(tiny.policy)
    network = load_flow(tiny.flow, torch.device("cpu"))[1].network
    ids = torch.tensor([[*row.prompt_token_ids, *row.response_token_ids]])
    tokens, t = len(row.response_token_ids), 0.8
    errors = []
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        for layer in (2, 5):
            response = states[layer + 1][0, len(row.prompt_token_ids) :]
            target, condition = response[:-1], response[1:]
            noise = response_noise(0, f"{row.problem_id}\n{row.sample_index}", layer, 0, num_tokens=tokens, size=128)
            noise = noise[:-1]
            velocity = network(t * target + (1 - t) * noise, torch.tensor([t]), condition, torch.tensor([layer / 8]))
            errors.append((velocity - (target - noise)).square().mean(-1))
    by_layer = torch.stack(errors, dim=1)
    wanted = by_layer.mean(1)
    assert given.deviation[-1] is given.score[-1] is given.flow_reward[-1] is None
    torch.testing.assert_close(torch.tensor(given.deviation[:-1]), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(given.score[:-1]), 4 * wanted, atol=4e-4, rtol=1e-4)
    stored = torch.tensor(given.per_layer_timestep[:-1])
    torch.testing.assert_close(stored[:, :, 0], by_layer, atol=1e-4, rtol=1e-4)


def test_a_flow_reward_is_the_shaped_score(scored: Path) -> None:
    for row in iter_scores(scored):
        scores = np.array(row.score[:-1])
        shares = (scores - scores.min()) / (scores.max() - scores.min())
        wanted = np.where(shares > 0.6, -0.01 * shares, 0)
        np.testing.assert_allclose(row.flow_reward[:-1], wanted, atol=1e-7)
        assert row.flow_reward[int(scores.argmax())] == pytest.approx(-0.01)


def test_centred_flow_rewards_sum_to_zero_and_coef_scales_them(tiny: TinyArtifacts, tmp_path: Path) -> None:
    reward = FlowRewardConfig(coef=0.5, centre_reward=True, threshold=0.0, top_k=0)
    for row in from_rollouts(tiny, tmp_path, flow_reward=reward):
        rewards = [value for value in row.flow_reward if value is not None]
        assert sum(rewards) == pytest.approx(0, abs=1e-5)
        assert max(rewards) - min(rewards) == pytest.approx(0.5, rel=1e-4)


def test_rollouts_and_their_latents_give_the_same_scores(tiny: TinyArtifacts, scored: Path, tmp_path: Path) -> None:
    score.run(score_config(tiny.flow, tmp_path, latents=tiny.latents))
    assert_rows_close(list(iter_scores(tmp_path)), list(iter_scores(scored)))


def test_more_prompt_tokens_than_needed_change_nothing(tiny: TinyArtifacts, scored: Path, tmp_path: Path) -> None:
    extract_latents.run(
        extract_config(
            tiny.policy, tmp_path / "l", rollouts=tiny.rollouts, layer_index=(2, 5), store="float32", max_shift=3
        )
    )
    score.run(score_config(tiny.flow, tmp_path / "s", latents=tmp_path / "l"))
    assert_rows_close(list(iter_scores(tmp_path / "s")), list(iter_scores(scored)))


def test_twice_gives_the_same_bytes(tiny: TinyArtifacts, scored: Path, tmp_path: Path) -> None:
    from_rollouts(tiny, tmp_path, per_layer=True)
    assert bytes_of(tmp_path) == bytes_of(scored)


@pytest.mark.parametrize("tokens_per_batch", [1, 70])
def test_the_batch_budget_changes_no_score(
    tiny: TinyArtifacts, scored: Path, tmp_path: Path, tokens_per_batch: int
) -> None:
    rows = from_rollouts(tiny, tmp_path / "rollouts", tokens_per_batch=tokens_per_batch)
    assert_rows_close(rows, list(iter_scores(scored)))
    score.run(score_config(tiny.flow, tmp_path / "latents", latents=tiny.latents, tokens_per_batch=tokens_per_batch))
    assert_rows_close(list(iter_scores(tmp_path / "latents")), list(iter_scores(scored)))


def test_shards_of_another_size_change_no_score(tiny: TinyArtifacts, scored: Path, tmp_path: Path) -> None:
    assert_rows_close(from_rollouts(tiny, tmp_path, problems_per_shard=4), list(iter_scores(scored)))


@pytest.mark.parametrize(
    ("context", "shift", "first", "last"),
    [
        ((Context.NEXT,), 1, 0, 1),
        ((Context.NEXT,), 2, 0, 2),
        ((Context.PREVIOUS,), 2, 0, 0),
        ((Context.SELF,), 1, 0, 0),
        ((Context.PREVIOUS, Context.NEXT), 1, 0, 1),
    ],
)
def test_tokens_without_a_neighbour_are_null(
    tiny: TinyArtifacts, tmp_path: Path, context: tuple[Context, ...], shift: int, first: int, last: int
) -> None:
    extract_latents.run(
        extract_config(
            tiny.policy, tmp_path / "l", rollouts=tiny.rollouts, layer_index=(3,), max_shift=2, store="float32", limit=2
        )
    )
    network = NetworkConfig(width=16, depth=1, context=context, shift=shift)
    flow = tmp_path / "flow.safetensors"
    fit_flow.run(fit_config(tmp_path / "l", flow, network=network, optimiser={"steps": 1}))
    score.run(score_config(flow, tmp_path / "rollouts", model=str(tiny.policy), rollouts=tiny.rollouts, limit=2))
    score.run(score_config(flow, tmp_path / "latents", latents=tmp_path / "l"))
    rows = list(iter_scores(tmp_path / "rollouts"))
    assert_rows_close(rows, list(iter_scores(tmp_path / "latents")))
    for row, rollout in zip(rows, iter_rollouts(tiny.rollouts), strict=False):
        tokens = len(rollout.response_token_ids)
        valid = [first <= k < tokens - last for k in range(tokens)]
        for column in (row.deviation, row.score, row.flow_reward):
            assert [value is not None for value in column] == valid


def test_a_response_of_one_token_has_no_score(tiny: TinyArtifacts, tmp_path: Path) -> None:
    extract_latents.run(
        extract_config(tiny.policy, tmp_path / "l", rollouts=tiny.rollouts, layer_index=(2, 5), max_tokens=1)
    )
    summary = score.run(score_config(tiny.flow, tmp_path / "s", latents=tmp_path / "l"))
    assert all(row.score == [None] for row in iter_scores(tmp_path / "s"))
    assert (summary["mean_score"], summary["valid_tokens"]) == (None, 0)


def test_several_timesteps_each_have_their_own_weight(tiny: TinyArtifacts, tmp_path: Path) -> None:
    reward = FlowRewardConfig(timestep=(0.5, 0.8))
    for row in from_rollouts(tiny, tmp_path, flow_reward=reward, per_layer=True, limit=2):
        errors = np.array(row.per_layer_timestep[:-1])
        assert errors.shape == (len(row.score) - 1, 2, 2)
        np.testing.assert_allclose(row.deviation[:-1], errors.mean((1, 2)), rtol=1e-5)
        np.testing.assert_allclose(row.score[:-1], (errors * [1.0, 4.0]).mean((1, 2)), rtol=1e-5)


def test_draws_are_averaged_and_the_seed_names_them(tiny: TinyArtifacts, scored: Path, tmp_path: Path) -> None:
    one = list(iter_scores(scored))
    two = from_rollouts(tiny, tmp_path / "two", flow_reward=FlowRewardConfig(num_draws=2))
    other = from_rollouts(tiny, tmp_path / "seed", seed=1)
    differences = [
        np.abs(np.array(a.score[:-1]) - np.array(b.score[:-1])).mean() for a, b in zip(one, two, strict=True)
    ]
    apart = [np.abs(np.array(a.score[:-1]) - np.array(b.score[:-1])).mean() for a, b in zip(one, other, strict=True)]
    assert 0 < np.mean(differences) < 0.75 * np.mean(apart), "the first draw is half of the mean of two"


def test_parts_and_stops_give_the_bytes_of_one_run(
    tiny: TinyArtifacts, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"model": str(tiny.policy), "rollouts": tiny.rollouts, "per_layer": True}
    first = score.run(score_config(tiny.flow, tmp_path, part="3/3", **options))
    assert (first["complete"], first["units_missing"]) == (False, 2)
    with monkeypatch.context() as patch:
        interrupt_after(patch, StageFolder, "write_table", 1)
        with pytest.raises(Stopped):
            score.run(score_config(tiny.flow, tmp_path, **options))
    assert score.run(score_config(tiny.flow, tmp_path, **options))["complete"]
    assert bytes_of(tmp_path) == bytes_of(scored)


def test_the_summary_separates_correct_from_wrong(tiny: TinyArtifacts, tmp_path: Path) -> None:
    config = score_config(tiny.flow, tmp_path, model=str(tiny.policy), rollouts=tiny.rollouts)
    summary = score.run(config)
    rollouts = list(iter_rollouts(tiny.rollouts))
    means = [np.mean(row.score[:-1]) for row in iter_scores(tmp_path)]
    right = [mean for mean, row in zip(means, rollouts, strict=True) if row.correct]
    wrong = [mean for mean, row in zip(means, rollouts, strict=True) if not row.correct]
    assert summary["score_of_correct"] == pytest.approx(np.mean(right))
    assert summary["score_of_wrong"] == pytest.approx(np.mean(wrong))
    auc = np.mean([[(w > r) + 0.5 * (w == r) for r in right] for w in wrong])
    assert summary["wrong_scores_higher"]["auc"]["value"] == pytest.approx(auc)

    def mean_negative(row: RolloutRow) -> float:
        return -float(np.mean(row.response_logprobs))

    control = np.mean(
        [[mean_negative(w) > mean_negative(r) for r in rollouts if r.correct] for w in rollouts if not w.correct]
    )
    assert summary["control_negative_logprob"]["auc"]["value"] == pytest.approx(control)


def test_the_most_penalised_tokens_are_named_as_text(tiny: TinyArtifacts, tmp_path: Path) -> None:
    summary = score.run(score_config(tiny.flow, tmp_path, model=str(tiny.policy), rollouts=tiny.rollouts, examples=2))
    most, least = summary["most_penalised_tokens"], summary["least_penalised_tokens"]
    assert len(most) == len(least) == 2
    assert most[0]["mean_flow_reward"] <= most[1]["mean_flow_reward"] <= least[0]["mean_flow_reward"]
    sums: dict[int, list[float]] = {}
    for row, rollout in zip(iter_scores(tmp_path), iter_rollouts(tiny.rollouts), strict=True):
        for token, reward in zip(rollout.response_token_ids, row.flow_reward, strict=True):
            if reward is not None:
                sums.setdefault(token, []).append(reward)
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    lowest = min(np.mean(values) for values in sums.values() if len(values) >= 5)
    named = {repr(tokenizer.decode([token])): np.mean(values) for token, values in sums.items()}
    assert named[most[0]["token"]] == pytest.approx(lowest) == pytest.approx(most[0]["mean_flow_reward"])


def test_a_flow_of_another_architecture_is_refused(tiny: TinyArtifacts, random_model: Path, tmp_path: Path) -> None:
    config = score_config(tiny.flow, tmp_path / "s", model=str(random_model), rollouts=tiny.rollouts)
    with pytest.raises(MismatchError, match=r"8 blocks, hidden size 128.*4 blocks, hidden size 32"):
        score.run(config)
    assert not (tmp_path / "s").exists()


def test_other_weights_of_the_same_architecture_only_warn(
    tiny: TinyArtifacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.policy)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny.policy).save_pretrained(tmp_path / "model")
    config = score_config(tiny.flow, tmp_path / "s", model=str(tmp_path / "model"), rollouts=tiny.rollouts, limit=1)
    assert score.run(config)["complete"]
    assert "warning: the flow was fitted on other weights" in capsys.readouterr().err


def test_a_cut_or_altered_flow_is_refused_before_anything_is_written(tiny: TinyArtifacts, tmp_path: Path) -> None:
    whole = tiny.flow.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "altered.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (tmp_path / "text.safetensors").write_text("no flow")
    shutil.copy(tiny.policy / "model.safetensors", tmp_path / "model.safetensors")
    for name, message in {"cut": "cut", "altered": "altered", "text": "cut", "model": "not a flow file"}.items():
        flow = tmp_path / f"{name}.safetensors"
        with pytest.raises(ArtifactError, match=message) as caught:
            score.run(score_config(flow, tmp_path / "s", model=str(tiny.policy), rollouts=tiny.rollouts))
        assert caught.value.exit_code == 2
        assert caught.value.hint
    with pytest.raises(MissingInputError):
        score.run(score_config(tmp_path / "none", tmp_path / "s", latents=tiny.latents))
    assert not (tmp_path / "s").exists()


def test_latents_of_other_layers_or_too_few_prompt_tokens_are_refused(tiny: TinyArtifacts, tmp_path: Path) -> None:
    extract_latents.run(
        extract_config(tiny.policy, tmp_path / "l", rollouts=tiny.rollouts, layer_index=(2, 6), limit=1)
    )
    with pytest.raises(MismatchError, match=r"blocks \[2, 5\], and .* holds blocks \[2, 6\]") as caught:
        score.run(score_config(tiny.flow, tmp_path / "s", latents=tmp_path / "l"))
    assert "--layer-index" in str(caught.value.hint)
    extract_latents.run(
        extract_config(tiny.policy, tmp_path / "two", rollouts=tiny.rollouts, layer_index=(2, 5), limit=1, max_shift=2)
    )
    network = NetworkConfig(width=16, depth=1, context=(Context.PREVIOUS,), shift=2)
    fit_flow.run(fit_config(tmp_path / "two", tmp_path / "flow", network=network, optimiser={"steps": 1}))
    with pytest.raises(MismatchError, match="shift of 2 needs as many prompt tokens"):
        score.run(score_config(tmp_path / "flow", tmp_path / "s", latents=tiny.latents))
    assert not (tmp_path / "s").exists()


def test_latents_of_another_model_are_refused(tiny: TinyArtifacts, tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model", num_blocks=8, hidden_size=64)
    (tmp_path / "e.jsonl").write_text('{"problem": "1+1", "solution": "2 is it"}\n')
    extract_latents.run(extract_config(model, tmp_path / "l", data=str(tmp_path / "e.jsonl"), layer_index=(2, 5)))
    with pytest.raises(MismatchError, match="hidden size 64"):
        score.run(score_config(tiny.flow, tmp_path / "s", latents=tmp_path / "l"))


def test_options_that_do_nothing_with_latents_are_refused(tiny: TinyArtifacts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--limit"):
        score_config(tiny.flow, tmp_path, latents=tiny.latents, limit=2)
    with pytest.raises(ConfigError, match="exactly one of --rollouts and --latents"):
        score_config(tiny.flow, tmp_path, latents=tiny.latents, rollouts=tiny.rollouts, model="m")
    with pytest.raises(ConfigError, match="--rollouts needs --model"):
        score_config(tiny.flow, tmp_path, rollouts=tiny.rollouts)


def test_a_dry_run_writes_nothing(tiny: TinyArtifacts, tmp_path: Path) -> None:
    plan = score.run(
        score_config(tiny.flow, tmp_path / "s", model=str(tiny.policy), rollouts=tiny.rollouts, dry_run=True)
    )
    assert (plan["responses"], plan["tokens"]) == (24, LatentsFolder(tiny.latents).num_tokens - 24)
    assert list(tmp_path.iterdir()) == []
