"""One forward pass: equal to the model read naively row by row, aligned to tokens, in any batch and order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlfr_cli.policy.forward import TokenSequence, forward_batches, offsets_of, response_logprobs
from rlfr_cli.policy.loading import Policy
from tiny_models import FAMILIES
from tiny_policies import CPU_BF16, HIDDEN, ModelFolders, random_sequences

SEQUENCES = random_sequences([(4, 9), (7, 30), (3, 1), (12, 6), (1, 2)])


def measured(
    policy: Policy, sequences: list[TokenSequence], layers: tuple[int, ...] = (), *, temperature: float, budget: int
) -> list[tuple[Tensor, ...]]:
    """(log-probabilities, entropies and latents if any) of each sequence."""
    results: list[tuple[Tensor, ...]] = [()] * len(sequences)
    for batch in forward_batches(policy, sequences, temperature=temperature, tapped=layers, tokens_per_batch=budget):
        columns = [batch.logprobs, batch.entropies, *([batch.latents] if layers else [])]
        for index, *values in zip(batch.indices, *columns, strict=True):
            results[index] = tuple(values)
    return results


def naive(policy: Policy, sequence: TokenSequence, temperature: float) -> tuple[Tensor, Tensor]:
    """Token by token from the model's own logits, one row, no padding."""
    ids = [*sequence.prompt, *sequence.response]
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double() / temperature
    distribution = logits.log_softmax(-1)
    logprobs, entropies = [], []
    for k, token in enumerate(sequence.response):
        predicted = distribution[len(sequence.prompt) + k - 1]
        logprobs.append(predicted[token])
        entropies.append(-(predicted.exp() * predicted).sum())
    return torch.stack(logprobs).float(), torch.stack(entropies).float()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_entropies_equal_naive_ones(family: str, tied: bool, model_folders: ModelFolders) -> None:
    policy = model_folders.policy(family, tied=tied)
    assert policy.model.config.tie_word_embeddings is tied
    results = measured(policy, SEQUENCES, temperature=0.7, budget=100)
    for (logprobs, entropies), sequence in zip(results, SEQUENCES, strict=True):
        wanted = naive(policy, sequence, 0.7)
        assert logprobs.dtype == entropies.dtype == torch.float32
        torch.testing.assert_close(logprobs, wanted[0], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(entropies, wanted[1], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("budget", [1, 45, 10_000])
def test_budget_and_order_change_nothing(budget: int, model_folders: ModelFolders) -> None:
    policy = model_folders.policy("gemma3_text")
    wanted = measured(policy, SEQUENCES, (1, 3), temperature=1.0, budget=64)
    ours = measured(policy, SEQUENCES[::-1], (1, 3), temperature=1.0, budget=budget)[::-1]
    for mine, theirs in zip(ours, wanted, strict=True):
        assert [t.shape for t in mine] == [t.shape for t in theirs]
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changed", [0, 3, 7])
def test_a_token_changes_its_own_latent_and_logprob_and_none_before(changed: int, model_folders: ModelFolders) -> None:
    """Latent row ``num_prompt + k`` is where token k has been read; its log-probability is its own."""
    policy = model_folders.policy()
    before = TokenSequence(tuple(range(20, 26)), tuple(range(40, 48)))
    response = list(before.response)
    response[changed] = 90
    after = TokenSequence(before.prompt, response)
    (logprobs_a, entropies_a, latents_a), (logprobs_b, entropies_b, latents_b) = measured(
        policy, [before, after], (0, 2), temperature=1.0, budget=1000
    )
    assert latents_a.shape == (1 + 8, 2, HIDDEN)
    latent_moves = (latents_a - latents_b).abs().amax(dim=(1, 2)) > 1e-4
    assert latent_moves.tolist() == [False] * (1 + changed) + [True] * (8 - changed)
    logprob_moves = (logprobs_a - logprobs_b).abs() > 1e-4
    assert logprob_moves.tolist() == [False] * changed + [True] * (8 - changed)
    # The entropy at token k is that of the distribution it was drawn from, which has not read it.
    entropy_moves = (entropies_a - entropies_b).abs() > 1e-5
    assert entropy_moves.tolist() == [False] * (changed + 1) + [True] * (7 - changed)


def test_a_prompt_token_changes_everything(model_folders: ModelFolders) -> None:
    policy = model_folders.policy()
    sequences = [TokenSequence((first, 21, 22), (40, 41, 42)) for first in (20, 90)]
    (logprobs_a, _, latents_a), (logprobs_b, _, latents_b) = measured(
        policy, sequences, (3,), temperature=1.0, budget=1000
    )
    assert bool(((logprobs_a - logprobs_b).abs() > 1e-4).all())
    assert bool(((latents_a - latents_b).abs().amax(dim=(1, 2)) > 1e-4).all())


def test_no_tapped_layers_no_latents(model_folders: ModelFolders) -> None:
    policy = model_folders.policy()
    assert all(batch.latents == [] for batch in forward_batches(policy, SEQUENCES, temperature=1.0))


def test_a_prompt_shorter_than_the_shift_is_a_programming_error(model_folders: ModelFolders) -> None:
    with pytest.raises(AssertionError, match="shorter than the shift"):
        list(forward_batches(model_folders.policy(), SEQUENCES, temperature=1.0, tapped=(1,), num_prompt=2))


def test_bfloat16_compute_gives_float32_logprobs_near_those_of_float32(model_folders: ModelFolders) -> None:
    exact = measured(model_folders.policy(), SEQUENCES, (2,), temperature=1.0, budget=100)
    rough = measured(model_folders.policy(placement=CPU_BF16), SEQUENCES, (2,), temperature=1.0, budget=100)
    for (logprobs, entropies, _), (rough_logprobs, rough_entropies, _) in zip(exact, rough, strict=True):
        assert rough_logprobs.dtype == rough_entropies.dtype == torch.float32
        assert 0 < float((logprobs - rough_logprobs).abs().max()) < 0.2
        assert float((entropies - rough_entropies).abs().max()) < 0.2


def test_gradients_flow_through_the_training_pass_only(model_folders: ModelFolders) -> None:
    policy = model_folders.policy()
    logprobs, _ = response_logprobs(policy, SEQUENCES, 1.0)
    logprobs.sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in policy.model.parameters())
    batch = next(forward_batches(policy, SEQUENCES, temperature=1.0, tapped=(1,)))
    assert not any(t.requires_grad for t in (*batch.logprobs, *batch.entropies, *batch.latents))


def test_offsets_by_hand() -> None:
    assert offsets_of([3, 0, 2]).tolist() == [0, 3, 3, 5]
    assert offsets_of([]).tolist() == [0]
