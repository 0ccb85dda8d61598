"""The policy's optimiser steps: equal to a loss written out naively, whatever the micro-batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlfr_cli.config.rl import OptimiserConfig, PolicyLossConfig
from rlfr_cli.engines.single import SingleProcessEngine
from rlfr_cli.engines.training import StepOutcome
from rlfr_cli.errors import WorkError
from rlfr_cli.policy.forward import TokenSequence, response_logprobs
from rlfr_cli.policy.loading import Policy
from rlfr_cli.rl.choices import Aggregation, KLEstimator, RatioLevel
from rlfr_cli.rl.updating import TrainingBatch, UpdateCounts, update_policy
from tiny_policies import ModelFolders, random_sequences

SEQUENCES = random_sequences([(4, 9), (7, 3), (3, 12), (5, 5), (6, 7), (2, 1)])
TEMPERATURE, MAX_NEW_TOKENS = 0.7, 16
ONE_STEP = OptimiserConfig(minibatch_responses=len(SEQUENCES), learning_rate=1e-3)
Gradients = dict[str, Tensor | None]


class RecordingEngine(SingleProcessEngine):
    """Keeps the gradients and learning rates of its steps."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy, stored_dtype=torch.float32, betas=(0.9, 0.95), weight_decay=0.0, clip_norm=1.0)
        self.gradients: list[Gradients] = []
        self.rates: list[float] = []

    def step(self, learning_rate: float) -> StepOutcome:
        self.gradients.append(
            {name: None if p.grad is None else p.grad.clone() for name, p in self.policy.model.named_parameters()}
        )
        self.rates.append(learning_rate)
        return super().step(learning_rate)


def logprobs_of(policy: Policy, sequences: list[TokenSequence]) -> list[Tensor]:
    with torch.no_grad():
        packed, _ = response_logprobs(policy, sequences, TEMPERATURE)
    return list(packed.split([len(s.response) for s in sequences]))


def make_batch(policy: Policy, *, off_policy: float = 0.3, with_reference: bool = False) -> TrainingBatch:
    """Random advantages; ratios spread around 1 by ``off_policy``, so that some are clipped."""
    generator = torch.Generator().manual_seed(0)

    def noise(length: int) -> Tensor:
        return torch.randn(length, generator=generator)

    now = logprobs_of(policy, SEQUENCES)
    return TrainingBatch(
        sequences=SEQUENCES,
        old_logprobs=[logprobs + off_policy * noise(len(logprobs)) for logprobs in now],
        advantages=[noise(len(logprobs)) for logprobs in now],
        reference_logprobs=[logprobs + 0.5 * noise(len(logprobs)) for logprobs in now] if with_reference else None,
        corrections=None,
        in_loss=[True] * len(SEQUENCES),
        temperature=TEMPERATURE,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def update(
    policy: Policy,
    batch: TrainingBatch,
    config: PolicyLossConfig,
    optimiser: OptimiserConfig = ONE_STEP,
    counts: UpdateCounts | None = None,
) -> tuple[RecordingEngine, dict[str, Any]]:
    engine = RecordingEngine(policy)

    def rate(done: int, of: int) -> float:
        return 1e-4 * (done + 1) / of

    return engine, update_policy(engine, batch, optimiser, config, counts or UpdateCounts(), rate, (0, "update", 1))


def assert_close(ours: Gradients, theirs: Gradients, share: float = 1e-5) -> None:
    """Each entry within ``share`` of the norm of the whole gradient."""
    allowed = share * float(torch.stack([g.norm() for g in theirs.values() if g is not None]).norm())
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        gradient = ours[name]
        assert gradient is not None
        assert wanted is not None
        assert float((gradient - wanted).abs().max()) <= allowed, name


def naive_loss(policy: Policy, batch: TrainingBatch, config: PolicyLossConfig) -> Tensor:
    """Response by response, token by token, as the formulas read."""
    terms_by_response = []
    for i, sequence in enumerate(batch.sequences):
        ids = torch.tensor([[*sequence.prompt, *sequence.response]])
        distribution = (policy.model(input_ids=ids, use_cache=False).logits[0] / TEMPERATURE).log_softmax(-1)
        start = len(sequence.prompt)
        logprobs = [distribution[start + k - 1, token] for k, token in enumerate(sequence.response)]
        differences = [logprob - old for logprob, old in zip(logprobs, batch.old_logprobs[i], strict=True)]
        mean_difference = sum(differences) / len(differences)
        terms = []
        for k, logprob in enumerate(logprobs):
            log_ratio = mean_difference if config.ratio_level is RatioLevel.SEQUENCE else differences[k]
            ratio, advantage = log_ratio.exp(), batch.advantages[i][k]
            term = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            if batch.corrections is not None:
                term = term * batch.corrections[i][k]
            if batch.reference_logprobs is not None:
                gap = batch.reference_logprobs[i][k] - logprob
                kl = (gap.exp() - 1 - gap) * (ratio if config.kl_ratio else 1)
                term = term + config.kl_coef * kl
            at = distribution[start + k - 1]
            terms.append(term + config.entropy_coef * (at.exp() * at).sum())
        terms_by_response.append(terms if batch.in_loss[i] else [])
    if config.aggregation is Aggregation.RESPONSE_MEAN:
        return sum(sum(terms) / len(terms) for terms in terms_by_response if terms) / len(terms_by_response)
    total = sum(sum(terms) for terms in terms_by_response)
    if config.aggregation is Aggregation.TOKEN_MEAN:
        return total / sum(map(len, terms_by_response))
    return total / (len(terms_by_response) * MAX_NEW_TOKENS)


# Named only, so that the config may speak of its KL; the batch brings the log-probabilities.
REFERENCE = "reference"
CONFIGS = [
    PolicyLossConfig(),
    PolicyLossConfig(aggregation=Aggregation.TOKEN_MEAN),
    PolicyLossConfig(aggregation=Aggregation.CONSTANT_LENGTH, ratio_level=RatioLevel.SEQUENCE),
    PolicyLossConfig(kl_coef=0.3, reference_model=REFERENCE),
    PolicyLossConfig(kl_coef=0.3, kl_ratio=True, reference_model=REFERENCE, ratio_level=RatioLevel.SEQUENCE),
    PolicyLossConfig(entropy_coef=0.2, aggregation=Aggregation.TOKEN_MEAN),
]
NAMES = ["response", "token", "constant-sequence", "kl", "kl-ratio", "entropy"]


@pytest.mark.parametrize("corrected", [False, True], ids=["", "corrected"])
@pytest.mark.parametrize("masked", [(), (1, 2)], ids=["all", "masked"])
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_gradient_is_that_of_the_naive_loss(
    config: PolicyLossConfig, masked: tuple[int, ...], corrected: bool, model_folders: ModelFolders
) -> None:
    policy = model_folders.policy()
    batch = make_batch(policy, with_reference=config.kl_coef > 0)
    batch = replace(batch, in_loss=[index not in masked for index in range(len(SEQUENCES))])
    if corrected:
        generator = torch.Generator().manual_seed(1)
        batch = replace(batch, corrections=[torch.rand(len(a), generator=generator) + 0.5 for a in batch.advantages])
    loss = naive_loss(policy, batch, config)
    loss.backward()
    wanted: Gradients = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    norm = float(torch.stack([g.norm() for g in wanted.values() if g is not None]).norm())
    policy.model.zero_grad()
    engine, metrics = update(policy, batch, config, replace(ONE_STEP, tokens_per_micro_batch=40))
    assert metrics["policy/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["policy/gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert_close(engine.gradients[0], wanted)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_micro_batches_change_no_gradient(config: PolicyLossConfig, model_folders: ModelFolders) -> None:
    found = []
    for budget in (10_000, 30, 1):
        policy = model_folders.policy()
        batch = make_batch(policy, with_reference=config.kl_coef > 0)
        engine, metrics = update(policy, batch, config, replace(ONE_STEP, tokens_per_micro_batch=budget))
        found.append((engine.gradients[0], metrics))
    for gradients, metrics in found[1:]:
        assert_close(gradients, found[0][0], share=1e-6)
        assert metrics == pytest.approx(found[0][1], rel=1e-4, abs=1e-6)


def test_responses_without_advantage_count_in_the_mean_and_nowhere_else(model_folders: ModelFolders) -> None:
    """Five of six responses: the gradient is 5/6 of that of the five alone, and the sixth is not even read."""
    policy = model_folders.policy()
    batch = make_batch(policy)
    batch.advantages[2] = torch.zeros_like(batch.advantages[2])
    others = [0, 1, 3, 4, 5]
    alone = replace(
        batch,
        sequences=[batch.sequences[i] for i in others],
        old_logprobs=[batch.old_logprobs[i] for i in others],
        advantages=[batch.advantages[i] for i in others],
        in_loss=[True] * len(others),
    )
    read: list[int] = []
    handle = policy.model.base_model.register_forward_pre_hook(
        lambda _module, _inputs, named: read.append(named["input_ids"].shape[0]), with_kwargs=True
    )
    engine, metrics = update(policy, batch, PolicyLossConfig())
    handle.remove()
    assert sum(read) == 5
    fewer, fewer_metrics = update(model_folders.policy(), alone, PolicyLossConfig())
    assert metrics["policy/loss"] == pytest.approx(fewer_metrics["policy/loss"] * 5 / 6, rel=1e-4)
    scaled: Gradients = {name: g * 5 / 6 for name, g in fewer.gradients[0].items() if g is not None}
    assert_close(engine.gradients[0], scaled)


def test_a_batch_without_any_advantage_moves_nothing(model_folders: ModelFolders) -> None:
    policy = model_folders.policy()
    batch = make_batch(policy)
    batch = replace(batch, advantages=[torch.zeros_like(a) for a in batch.advantages])
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    engine, metrics = update(policy, batch, PolicyLossConfig())
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())
    assert all(gradient is None for gradient in engine.gradients[0].values())
    assert metrics["policy/loss"] == metrics["policy/gradient_norm"] == 0


def test_advantages_push_logprobs_their_way(model_folders: ModelFolders) -> None:
    policy = model_folders.policy()
    before = logprobs_of(policy, SEQUENCES)
    signs = [1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    batch = replace(
        make_batch(policy, off_policy=0.0),
        advantages=[torch.full_like(b, sign) for b, sign in zip(before, signs, strict=True)],
    )
    update(policy, batch, PolicyLossConfig())
    after = logprobs_of(policy, SEQUENCES)
    assert [float((a - b).sum()) > 0 for a, b in zip(after, before, strict=True)] == [sign > 0 for sign in signs]


def test_the_first_step_is_on_policy(model_folders: ModelFolders) -> None:
    policy = model_folders.policy()
    _, metrics = update(policy, make_batch(policy, off_policy=0.0), PolicyLossConfig())
    assert metrics["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["policy/clip_fraction"] == 0
    assert metrics["policy/approximate_kl"] == pytest.approx(0, abs=1e-6)


def test_the_entropy_bonus_raises_entropy(model_folders: ModelFolders) -> None:
    changes = []
    for coefficient in (0.0, 1.0):
        policy = model_folders.policy()
        batch = replace(make_batch(policy), advantages=[torch.zeros(len(s.response)) for s in SEQUENCES])
        with torch.no_grad():
            # A random policy is near the highest entropy; make it less so.
            policy.model.lm_head.weight.mul_(8)
            before = response_logprobs(policy, SEQUENCES, TEMPERATURE)[1].mean()
        update(policy, batch, PolicyLossConfig(entropy_coef=coefficient), replace(ONE_STEP, epochs_per_batch=3))
        with torch.no_grad():
            changes.append(float(response_logprobs(policy, SEQUENCES, TEMPERATURE)[1].mean() - before))
    assert changes[0] == 0
    assert changes[1] > 1e-3


def test_an_empty_batch_changes_nothing_and_says_so(model_folders: ModelFolders) -> None:
    policy = model_folders.policy()
    empty = replace(make_batch(policy), sequences=[], old_logprobs=[], advantages=[], in_loss=[])
    engine, metrics = update(policy, empty, PolicyLossConfig())
    assert engine.rates == []
    assert metrics["policy/loss"] is None
    assert metrics["policy/learning_rate"] == pytest.approx(1e-4)


# The reference policy


@pytest.mark.parametrize("estimator", [KLEstimator.K2, KLEstimator.K3])
def test_paying_for_kl_pulls_towards_the_reference(estimator: KLEstimator, model_folders: ModelFolders) -> None:
    policy, reference = model_folders.policy(), model_folders.policy(seed=1)
    wanted = logprobs_of(reference, SEQUENCES)
    batch = replace(
        make_batch(policy),
        advantages=[torch.zeros_like(w) for w in wanted],
        reference_logprobs=wanted,
    )
    config = PolicyLossConfig(kl_coef=1.0, reference_model=REFERENCE, kl_estimator=estimator)
    optimiser = replace(ONE_STEP, epochs_per_batch=5)
    before = float((torch.cat(logprobs_of(policy, SEQUENCES)) - torch.cat(wanted)).square().mean())
    update(policy, batch, config, optimiser)
    after = float((torch.cat(logprobs_of(policy, SEQUENCES)) - torch.cat(wanted)).square().mean())
    assert after < before
    assert all(p.grad is None for p in reference.model.parameters())


# Minibatches, rates, and steps that fail


def test_every_response_is_trained_on_once_an_epoch(model_folders: ModelFolders) -> None:
    policy = model_folders.policy()
    batch = make_batch(policy)
    rows: list[list[int]] = []
    handle = policy.model.base_model.register_forward_pre_hook(
        lambda _module, _inputs, named: rows.append(named["input_ids"][:, :2].tolist()), with_kwargs=True
    )
    counts = UpdateCounts(optimiser_steps=10)
    optimiser = replace(ONE_STEP, minibatch_responses=4, epochs_per_batch=3)
    engine, metrics = update(policy, batch, PolicyLossConfig(), optimiser, counts)
    handle.remove()
    starts = [list(s.prompt[:2]) for s in SEQUENCES]
    taken = [[starts.index(row) for row in minibatch] for minibatch in rows]
    assert [len(minibatch) for minibatch in taken] == [4, 2, 4, 2, 4, 2]
    assert all(sorted(taken[i] + taken[i + 1]) == list(range(6)) for i in (0, 2, 4))
    assert len({frozenset(taken[i]) for i in (0, 2, 4)}) > 1
    assert engine.rates == pytest.approx([rate * 1e-4 / 6 for rate in range(1, 7)])
    assert metrics["policy/learning_rate"] == pytest.approx(1e-4)
    assert counts.optimiser_steps == 16
    assert not policy.model.training


def bad_batch(policy: Policy, bad: list[int]) -> TrainingBatch:
    batch = make_batch(policy)
    for index in bad:
        batch.old_logprobs[index][0] = float("nan")
    return batch


def test_steps_that_stay_bad_stop_the_run(model_folders: ModelFolders) -> None:
    policy = model_folders.policy()
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    counts = UpdateCounts()
    optimiser = replace(ONE_STEP, minibatch_responses=1, max_bad_steps=3)
    with pytest.raises(WorkError, match="3 optimiser steps in a row") as caught:
        update(policy, bad_batch(policy, list(range(6))), PolicyLossConfig(), optimiser, counts)
    assert caught.value.exit_code == 1
    assert "--learning-rate" in (caught.value.hint or "")
    assert counts == UpdateCounts(optimiser_steps=3, skipped_steps=3, skipped_in_a_row=3)
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())


def test_bad_steps_between_good_ones_are_counted_and_skipped(model_folders: ModelFolders) -> None:
    policy = model_folders.policy()
    counts = UpdateCounts()
    optimiser = replace(ONE_STEP, minibatch_responses=1, max_bad_steps=3)
    _, metrics = update(policy, bad_batch(policy, [0, 3]), PolicyLossConfig(), optimiser, counts)
    assert metrics["policy/skipped_steps"] == counts.skipped_steps == 2
    assert counts.optimiser_steps == 6
    assert all(bool(p.isfinite().all()) for p in policy.model.parameters())


def test_bad_steps_in_a_row_are_counted_across_rollout_batches(model_folders: ModelFolders) -> None:
    policy = model_folders.policy()
    counts = UpdateCounts(optimiser_steps=8, skipped_steps=2, skipped_in_a_row=2)
    with pytest.raises(WorkError, match="3 optimiser steps"):
        update(policy, bad_batch(policy, [0]), PolicyLossConfig(), replace(ONE_STEP, max_bad_steps=3), counts)
