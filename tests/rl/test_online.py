"""The online update: it moves the flow and only the flow, towards accepted responses and only those."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from engines.threaded_ranks import on_threads
from rlfr_cli.config.flow import FlowRewardConfig, ScoreSource
from rlfr_cli.config.rl import OnlineConfig, OnlineTimes, OptimiserConfig, PolicyLossConfig
from rlfr_cli.engines.adamw import NamedAdamW
from rlfr_cli.engines.flow_ranks import check_same_flow
from rlfr_cli.engines.ranks import ALONE, Ranks
from rlfr_cli.engines.single import SingleProcessEngine
from rlfr_cli.engines.training import StepOutcome
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.matching import accumulate_matching_gradients, choose_times, matching_errors, sample_times
from rlfr_cli.flow.noise import keyed_generator
from rlfr_cli.policy.loading import Policy
from rlfr_cli.rl.measuring import Measurement, measure, sequences_of
from rlfr_cli.rl.online import update_flow
from rlfr_cli.rl.updating import TrainingBatch, UpdateCounts, update_policy
from tiny_policies import HIDDEN, ModelFolders, rollout_rows, tiny_flow

LENGTHS = [(4, 9), (7, 20), (3, 12), (5, 5), (6, 7), (2, 2)]
CONFIG = OnlineConfig()
KEY = (0, 1)


class RecordingAdamW(NamedAdamW):
    """Keeps the gradients of its steps."""

    def __init__(self, flow: Flow) -> None:
        super().__init__(flow.network.named_parameters(), weight_decay=0.01, clip_norm=1.0)
        self.gradients: list[dict[str, Tensor | None]] = []

    def step(self, learning_rate: float, *, loss_is_finite: bool = True) -> StepOutcome:
        self.gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in self.parameters.items()})
        return super().step(learning_rate, loss_is_finite=loss_is_finite)


def random_latents(count: int = 3, seed: int = 0) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {i: torch.randn(1 + 4 + i, 2, HIDDEN, generator=generator) for i in range(count)}


def ones(latents: dict[int, Tensor]) -> dict[int, Tensor]:
    return {index: torch.ones(len(tensor) - 1) for index, tensor in latents.items()}


def update(
    flow: Flow,
    latents: dict[int, Tensor],
    weights: dict[int, Tensor],
    config: OnlineConfig = CONFIG,
    optimiser: NamedAdamW | None = None,
    key: tuple[int, ...] = KEY,
) -> tuple[NamedAdamW, dict[str, float]]:
    optimiser = optimiser or RecordingAdamW(flow)
    return optimiser, update_flow(flow, optimiser, latents, weights, config, (0.8,), key)


def parameters(flow: Flow) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in flow.network.named_parameters()}


def unchanged(flow: Flow, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in flow.network.named_parameters())


def measured(policy: Policy, flow: Flow, seed: int) -> Measurement:
    rows = rollout_rows(LENGTHS, seed)
    return measure(
        policy,
        flow,
        rows,
        [True] * len(rows),
        temperature=1.0,
        reward=FlowRewardConfig(),
        scores_from=ScoreSource.FLOW,
        key=(0, seed),
        tokens_per_batch=80,
    )


@pytest.mark.parametrize("context", list(Context))
def test_gradients_reach_every_parameter_of_the_flow_and_none_of_the_policy(
    context: Context, model_folders: ModelFolders
) -> None:
    policy, flow = model_folders.policy(), tiny_flow(context=context)
    policy.model.train()
    weights_before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    latents = measured(policy, flow, 1).latents
    optimiser, metrics = update(flow, latents, ones(latents))
    assert metrics["flow/steps"] == 1
    assert isinstance(optimiser, RecordingAdamW)
    reached = {name: g is not None and float(g.abs().max()) > 0 for name, g in optimiser.gradients[0].items()}
    assert len(reached) == len(list(flow.network.parameters())) > 20
    assert all(reached.values()), [name for name, got in reached.items() if not got]
    assert all(p.requires_grad and p.grad is None for p in policy.model.parameters())
    assert all(torch.equal(p, weights_before[name]) for name, p in policy.model.named_parameters())


def test_latents_with_a_graph_get_no_gradient() -> None:
    """Without detaching, the published target passes gradients into the policy."""
    latents = {index: tensor.requires_grad_() for index, tensor in random_latents().items()}
    flow = tiny_flow()
    before = parameters(flow)
    update(flow, latents, ones(latents))
    assert not unchanged(flow, before)
    assert all(tensor.grad is None for tensor in latents.values())


def test_a_fresh_flow_moves_too() -> None:
    """Its output layer is zero, so only that layer gets a gradient at first; the second step reaches the rest."""
    flow, latents = tiny_flow(zero=True), random_latents()
    optimiser, _ = update(flow, latents, ones(latents), OnlineConfig(online_steps=3))
    assert isinstance(optimiser, RecordingAdamW)
    assert float(optimiser.gradients[0]["final_layer.linear.weight"].abs().max()) > 0
    assert float(optimiser.gradients[2]["res_blocks.0.mlp.0.weight"].abs().max()) > 0


def test_a_leaf_loss_with_requires_grad_set_by_hand_moves_nothing() -> None:
    """The published failure: the loss is computed where no graph is kept, then made to look trainable. ``backward``
    passes and a loss is logged, but no gradient arrives. What our update does to the same flow is the contrast.
    """
    flow, latents = tiny_flow(), random_latents()
    pairs = flow.pair(list(latents.values()))
    targets, conditions = pairs.targets(0, slice(None)), pairs.conditions(0, 0, slice(None))
    with torch.no_grad():
        times, noise = torch.full((len(targets),), 0.8), torch.randn_like(targets)
        loss = matching_errors(flow.network, targets, conditions, times, noise, 0.25).mean()
    assert loss.is_leaf
    loss.requires_grad = True
    loss.backward()
    assert all(p.grad is None for p in flow.network.parameters())
    before = parameters(flow)
    optimiser = RecordingAdamW(flow)
    optimiser.step(1e-4)
    assert unchanged(flow, before)
    update(flow, latents, ones(latents), optimiser=optimiser)
    assert not unchanged(flow, before)


def loss_on(flow: Flow, latents: dict[int, Tensor]) -> float:
    """The fitting loss with fixed noise, 8 draws."""
    pairs = flow.pair(list(latents.values()))
    result = accumulate_matching_gradients(
        flow.network, pairs, keyed_generator("cpu", "held out"), noise_repeats=8, backward=False
    )
    return float(result.loss)


def test_the_loss_on_fresh_accepted_rollouts_falls(model_folders: ModelFolders) -> None:
    """Every batch is new to the flow when it is measured, and the last one is never trained on."""
    policy, flow = model_folders.policy(), tiny_flow(zero=True)
    fresh = measured(policy, flow, 99).latents
    optimiser = RecordingAdamW(flow)
    config = OnlineConfig(online_learning_rate=3e-3)
    course = [loss_on(flow, fresh)]
    for step in range(1, 61):
        latents = measured(policy, flow, step).latents
        update(flow, latents, ones(latents), config, optimiser, (0, step))
        if step % 20 == 0:
            course.append(loss_on(flow, fresh))
    assert course == sorted(course, reverse=True)
    assert course[-1] < 0.7 * course[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_policys_gradient_checkpointing_does_not_touch_the_flows_update(
    checkpointing: bool, model_folders: ModelFolders
) -> None:
    """In the published code it is what cuts the flow off. Policy step first, as in a run."""
    policy, flow = model_folders.policy(), tiny_flow()
    engine = SingleProcessEngine(
        policy,
        stored_dtype=torch.float32,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        clip_norm=1.0,
        gradient_checkpointing=checkpointing,
    )
    rows = rollout_rows(LENGTHS, 1)
    known = measured(policy, flow, 1)
    advantages = [torch.ones_like(logprobs_T) for logprobs_T in known.logprobs]
    batch = TrainingBatch(sequences_of(rows), known.logprobs, advantages, None, None, [True] * len(rows), 1.0, 32)
    update_policy(
        engine, batch, OptimiserConfig(), PolicyLossConfig(), UpdateCounts(), lambda done, of: 1e-4, (0, "update", 1)
    )
    optimiser, metrics = update(flow, known.latents, ones(known.latents))
    assert isinstance(optimiser, RecordingAdamW)
    assert all(g is not None and float(g.abs().max()) > 0 for g in optimiser.gradients[0].values())
    assert all(p.grad is None for p in policy.model.parameters())
    plain = tiny_flow()
    other_latents = measured(model_folders.policy(), plain, 1).latents
    assert metrics["flow/loss"] == pytest.approx(update(plain, other_latents, ones(other_latents))[1]["flow/loss"])


# What is learned from


def test_nothing_accepted_means_no_step() -> None:
    flow, latents = tiny_flow(), random_latents()
    before = parameters(flow)
    nothing = {index: torch.zeros(len(tensor) - 1) for index, tensor in latents.items()}
    for chosen_latents, weights in (({}, {}), (latents, nothing)):
        optimiser, metrics = update(flow, chosen_latents, weights)
        assert metrics == {"flow/steps": 0}
        assert optimiser.state_tensors() == {}
    assert unchanged(flow, before)


def test_accepting_only_tokens_without_a_neighbour_means_no_step() -> None:
    """With ``next`` the last token is not valid."""
    flow, latents = tiny_flow(context=Context.NEXT), random_latents()
    before = parameters(flow)
    last_only = {index: torch.eye(len(tensor) - 1)[-1] for index, tensor in latents.items()}
    optimiser, metrics = update(flow, latents, last_only)
    assert metrics == {"flow/steps": 0}
    assert optimiser.state_tensors() == {}
    assert unchanged(flow, before)


def test_responses_and_tokens_of_weight_zero_teach_nothing() -> None:
    """With ``previous``, so that token 3 of response 2 is nobody's condition."""
    latents, weights = random_latents(), ones(random_latents())
    weights[1][:] = 0
    weights[2][5] = 0
    flows = []
    for garbage in (0.0, 1e3):
        flow = tiny_flow(context=Context.PREVIOUS)
        changed = {index: tensor.clone() for index, tensor in latents.items()}
        changed[1] += garbage
        changed[2][1 + 5] += garbage
        assert len(weights[2]) == 6
        flows.append((update(flow, changed, weights)[1], parameters(flow)))
    assert flows[0][0] == flows[1][0]
    assert all(torch.equal(p, flows[1][1][name]) for name, p in flows[0][1].items())


def test_weights_are_relative() -> None:
    latents = random_latents()
    results = []
    for scale in (1.0, 4.0):
        weights = {index: scale * w * (index + 1) for index, w in ones(latents).items()}
        results.append(update(tiny_flow(), latents, weights)[1])
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert results[0] != pytest.approx(update(tiny_flow(), latents, ones(latents))[1], rel=1e-4)


@pytest.mark.parametrize("times", list(OnlineTimes))
def test_the_loss_is_the_fitting_loss_at_the_times_asked_for(times: OnlineTimes) -> None:
    latents = random_latents()
    config = replace(CONFIG, online_timesteps=times, online_noise_repeats=2)
    _, metrics = update(tiny_flow(), latents, ones(latents), config)
    flow = tiny_flow()
    wanted = accumulate_matching_gradients(
        flow.network,
        flow.pair(list(latents.values())),
        keyed_generator("cpu", *KEY, "online", 0),
        noise_repeats=2,
        draw_times=sample_times if times is OnlineTimes.FIT else partial(choose_times, (0.8,)),
        backward=False,
    )
    assert metrics["flow/loss"] == pytest.approx(float(wanted.loss), rel=1e-6)


def test_each_step_draws_fresh_noise_keyed_by_the_run() -> None:
    latents = random_latents()
    frozen = replace(CONFIG, online_steps=2, online_learning_rate=1e-12)
    flow = tiny_flow()
    optimiser, metrics = update(flow, latents, ones(latents), frozen)
    assert metrics["flow/steps"] == 2
    assert isinstance(optimiser, RecordingAdamW)
    first, second = (g["final_layer.linear.bias"] for g in optimiser.gradients)
    assert not torch.allclose(first, second)
    assert update(tiny_flow(), latents, ones(latents), frozen)[1] == metrics
    assert update(tiny_flow(), latents, ones(latents), frozen, key=(0, 2))[1] != metrics


def test_the_order_of_responses_changes_nothing() -> None:
    latents = random_latents()
    weights = ones(latents)
    backwards = dict(reversed(list(latents.items())))
    assert update(tiny_flow(), backwards, weights)[1] == update(tiny_flow(), latents, weights)[1]


def test_latents_that_are_not_finite_change_nothing() -> None:
    flow, latents = tiny_flow(), random_latents()
    latents[1][2, 0, 0] = float("inf")
    before = parameters(flow)
    _, metrics = update(flow, latents, ones(latents))
    assert metrics["flow/steps"] == 0
    assert unchanged(flow, before)


# In several processes


@pytest.mark.parametrize("times", list(OnlineTimes))
@pytest.mark.parametrize("shares", [(2, 1, 0, 3), (0, 6), (5, 1)])
def test_processes_learn_from_their_responses_as_one_does_from_all(shares: tuple[int, ...], times: OnlineTimes) -> None:
    """Uneven shares, processes without a response, and one whose only response has no weight."""
    latents = random_latents(6)
    weights = {index: w * (1 + index % 2) for index, w in ones(latents).items()}
    weights[2][1] = 0
    weights[5][:] = 0
    config = replace(CONFIG, online_steps=2, online_noise_repeats=2, online_timesteps=times)
    ends = torch.tensor(shares).cumsum(0).tolist()
    flows = [tiny_flow() for _ in range(len(shares) + 1)]  # here, since threads share the generator of their weights

    def learn(ranks: Ranks) -> tuple[dict[str, float], dict[str, Tensor]]:
        mine = range(6) if ranks.alone else range(ends[ranks.rank] - shares[ranks.rank], ends[ranks.rank])
        flow = flows.pop()
        metrics = update_flow(
            flow,
            RecordingAdamW(flow),
            {index: latents[index] for index in mine},
            {index: weights[index] for index in mine},
            config,
            (0.5, 0.8),
            KEY,
            ranks=ranks,
        )
        check_same_flow(flow, ranks)
        return metrics, parameters(flow)

    wanted_metrics, wanted = learn(ALONE)
    assert wanted_metrics["flow/steps"] == 2
    start = parameters(tiny_flow())
    update_norm = sum(float((wanted[name] - start[name]).square().sum()) for name in wanted) ** 0.5
    for metrics, learned in on_threads(len(shares), learn):
        assert metrics == pytest.approx(wanted_metrics, rel=1e-5)
        gap = sum(float((wanted[name] - learned[name]).square().sum()) for name in wanted) ** 0.5
        assert gap <= 1e-4 * update_norm


def test_processes_that_accepted_nothing_take_no_step() -> None:
    latents, flows = random_latents(1), [tiny_flow(), tiny_flow()]

    def learn(ranks: Ranks) -> dict[str, float]:
        flow = flows[ranks.rank]
        return update_flow(flow, RecordingAdamW(flow), latents, {0: torch.zeros(4)}, CONFIG, (0.8,), KEY, ranks=ranks)

    assert on_threads(2, learn) == [{"flow/steps": 0}] * 2
