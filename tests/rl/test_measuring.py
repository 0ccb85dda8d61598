"""A rollout batch measured once: scores that depend on the response alone, and what is kept and paid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlfr_cli.artifacts.rollouts import RolloutRow
from rlfr_cli.config.flow import FlowRewardConfig, ScoreSource
from rlfr_cli.errors import WorkError
from rlfr_cli.flow.choices import Context, Normalise
from rlfr_cli.flow.flow import Flow, response_key
from rlfr_cli.flow.noise import keyed_seed
from rlfr_cli.policy.forward import forward_batches
from rlfr_cli.policy.loading import Policy
from rlfr_cli.rl.measuring import Measurement, flow_rewards, measure, sequences_of
from rlfr_cli.rl.token_scores import random_scores
from tiny_policies import CPU_BF16, HIDDEN, ModelFolders, rollout_rows, tiny_flow

ROWS = rollout_rows([(4, 9), (7, 20), (3, 12), (5, 1), (6, 7), (2, 2)])
REWARD = FlowRewardConfig(timestep=(0.5, 0.8), num_draws=2)
KEY = (0, 1)


def measured(policy: Policy, flow: Flow | None, rows: list[RolloutRow] = ROWS, **changes: Any) -> Measurement:
    options: dict[str, Any] = {
        "keep_latents": [False] * len(rows),
        "temperature": 0.7,
        "reward": REWARD,
        "scores_from": ScoreSource.FLOW,
        "key": KEY,
        "tokens_per_batch": 60,
        **changes,
    }
    return measure(policy, flow, rows, **options)


def assert_close(ours: list[Tensor], theirs: list[Tensor], relative: float = 1e-4) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=relative, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("context", list(Context))
def test_scores_are_those_of_each_response_alone(context: Context, model_folders: ModelFolders) -> None:
    policy, flow = model_folders.policy(), tiny_flow(context=context)
    ours = measured(policy, flow)
    for index, (row, sequence) in enumerate(zip(ROWS, sequences_of(ROWS), strict=True)):
        batch = next(forward_batches(policy, [sequence], temperature=0.7, tapped=(1, 2)))
        pairs = flow.pair(batch.latents)
        alone = flow.deviations(
            pairs,
            [response_key(row.problem_id, row.sample_index)],
            seed=keyed_seed(*KEY),
            timesteps=REWARD.timestep,
            num_draws=REWARD.num_draws,
        )
        valid = ~ours.scores[index].isnan()
        invalid_tokens = 1 if context is Context.NEXT else 0
        assert valid.tolist() == [True] * (len(valid) - invalid_tokens) + [False] * invalid_tokens
        assert_close([ours.scores[index][valid], ours.deviations[index][valid]], [alone.score_M, alone.deviation_M])
        assert_close([ours.logprobs[index], ours.entropies[index]], [batch.logprobs[0], batch.entropies[0]])


@pytest.mark.parametrize("source", list(ScoreSource))
def test_budget_and_order_change_no_score(source: ScoreSource, model_folders: ModelFolders) -> None:
    policy, flow = model_folders.policy(), tiny_flow()
    wanted = measured(policy, flow, scores_from=source)
    order = [3, 0, 5, 1, 4, 2]
    for budget in (1, 10_000):
        ours = measured(policy, flow, [ROWS[i] for i in order], scores_from=source, tokens_per_batch=budget)
        for name in ("scores", "deviations", "logprobs", "entropies", "flow_rewards"):
            assert_close(getattr(ours, name), [getattr(wanted, name)[i] for i in order])


def test_noise_is_that_of_the_key(model_folders: ModelFolders) -> None:
    policy, flow = model_folders.policy(), tiny_flow()
    first, again, other = (measured(policy, flow, key=key).scores[0] for key in ((0, 1), (0, 1), (0, 2)))
    assert torch.equal(first[:-1], again[:-1])
    assert bool((first[:-1] != other[:-1]).all())


def test_random_scores_stand_on_the_same_tokens_and_leave_deviations_alone(model_folders: ModelFolders) -> None:
    policy, flow = model_folders.policy(), tiny_flow()
    real, control = measured(policy, flow), measured(policy, flow, scores_from=ScoreSource.RANDOM)
    assert_close(control.deviations, real.deviations)
    for mine, theirs in zip(control.scores, real.scores, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert bool(((mine[:-1] >= 0) & (mine[:-1] < 1)).all())
    assert not torch.allclose(control.scores[1][:-1], real.scores[1][:-1])
    assert not torch.equal(control.scores[0][:5], control.scores[1][:5])


def test_random_scores_are_keyed_by_response() -> None:
    valid = [torch.tensor([True, False, True]), torch.tensor([True, True, True])]
    first = random_scores(1, ["a", "b"], valid)
    swapped = random_scores(1, ["b", "a"], valid[::-1])[::-1]
    for mine, theirs in zip(first, swapped, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert first[0].isnan().tolist() == [False, True, False]
    assert not torch.equal(random_scores(2, ["b"], valid[1:])[0], first[1])


def test_a_flow_that_warms_up_is_measured_and_not_paid(model_folders: ModelFolders) -> None:
    policy, flow = model_folders.policy(), tiny_flow()
    paid, warming = measured(policy, flow), measured(policy, flow, reward=replace(REWARD, coef=0.0))
    assert any(bool((rewards < 0).any()) for rewards in paid.flow_rewards)
    assert all(torch.equal(rewards, torch.zeros_like(rewards)) for rewards in warming.flow_rewards)
    assert [len(rewards) for rewards in warming.flow_rewards] == [len(row.response_token_ids) for row in ROWS]
    assert_close(warming.scores, paid.scores)


def test_latents_are_kept_of_the_responses_asked_for(model_folders: ModelFolders) -> None:
    policy, flow = model_folders.policy(), tiny_flow()
    keep = [False, True, False, True, False, True]
    kept = measured(policy, flow, keep_latents=keep).latents
    assert sorted(kept) == [1, 3, 5]
    for index, latents in kept.items():
        assert latents.shape == (1 + len(ROWS[index].response_token_ids), 2, HIDDEN)
        alone = next(forward_batches(policy, sequences_of([ROWS[index]]), temperature=1.0, tapped=(1, 2)))
        assert_close([latents], alone.latents)
        assert not latents.requires_grad


def test_kept_latents_have_the_compute_dtype(model_folders: ModelFolders) -> None:
    policy = model_folders.policy(placement=CPU_BF16)
    kept = measured(policy, tiny_flow(), keep_latents=[True] * len(ROWS)).latents
    assert {latents.dtype for latents in kept.values()} == {torch.bfloat16}


def test_without_a_flow_there_are_logprobs_and_zero_rewards(model_folders: ModelFolders) -> None:
    policy = model_folders.policy()
    plain = measured(policy, None, keep_latents=[True] * len(ROWS))
    assert plain.scores == plain.deviations == []
    assert plain.latents == {}
    assert all(float(rewards.abs().sum()) == 0 for rewards in plain.flow_rewards)
    assert_close(plain.logprobs, measured(policy, tiny_flow()).logprobs)


def test_a_batch_of_one_token_responses_has_no_valid_token(model_folders: ModelFolders) -> None:
    rows = rollout_rows([(4, 1), (3, 1)])
    ours = measured(model_folders.policy(), tiny_flow(), rows)
    assert all(scores.isnan().all() for scores in ours.scores)
    assert [rewards.tolist() for rewards in ours.flow_rewards] == [[0.0], [0.0]]


def test_measuring_leaves_no_gradient_and_no_hook(model_folders: ModelFolders) -> None:
    policy, flow = model_folders.policy(), tiny_flow()
    ours = measured(policy, flow, keep_latents=[True] * len(ROWS))
    tensors = [*ours.logprobs, *ours.entropies, *ours.scores, *ours.deviations, *ours.flow_rewards]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert not any(block._forward_hooks for block in policy.decoder.layers)


def test_a_flow_that_gives_no_numbers_stops_the_run(model_folders: ModelFolders) -> None:
    flow = tiny_flow()
    with torch.no_grad():
        flow.network.input_proj.bias[0] = float("nan")
    with pytest.raises(WorkError, match="not finite"):
        measured(model_folders.policy(), flow)


def test_flow_rewards_by_hand() -> None:
    """Min-max to 0, 0.5, 1; not above 0.6 is dropped; a penalty of 0.01; invalid tokens count nowhere."""
    scores = [torch.tensor([1.0, 2.0, 3.0, torch.nan]), torch.tensor([torch.nan, 7.0, 4.0]), torch.tensor([torch.nan])]
    plain = flow_rewards(scores, FlowRewardConfig())
    assert [r.tolist() for r in plain] == [pytest.approx([0, 0, -0.01, 0]), pytest.approx([0, -0.01, 0]), [0.0]]
    centred = flow_rewards(scores, FlowRewardConfig(centre_reward=True))
    assert centred[0].tolist() == pytest.approx([0.01 / 3, 0.01 / 3, -0.02 / 3, 0], abs=1e-7)
    config = FlowRewardConfig(score_normalisation=Normalise.NONE, threshold=0, top_k=1, coef=0.5, power=2)
    assert flow_rewards(scores, config)[0].tolist() == pytest.approx([0, 0, -4.5, 0])
