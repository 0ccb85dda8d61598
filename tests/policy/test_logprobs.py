"""Log-probabilities and entropies: by hand, and that chunks change neither values nor gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from rlfr_cli.policy import logprobs as module
from rlfr_cli.policy.logprobs import token_logprobs

NUM_TOKENS, HIDDEN, VOCABULARY = 11, 6, 9


@pytest.mark.parametrize(
    ("temperature", "odds"),
    [(1.0, 3.0), (0.5, 9.0), (2.0, math.sqrt(3)), (0.0, 3.0)],  # greedy counts as 1
)
def test_two_tokens_by_hand(temperature: float, odds: float) -> None:
    """Logits 0 and ln 3."""
    logits = torch.tensor([[0.0, math.log(3)]])
    logprobs, entropies = token_logprobs(
        lambda hidden: hidden @ logits, torch.ones(2, 1), torch.tensor([0, 1]), temperature=temperature, vocab_size=2
    )
    low, high = 1 / (1 + odds), odds / (1 + odds)
    assert logprobs.tolist() == pytest.approx([math.log(low), math.log(high)], rel=1e-5)
    assert entropies.tolist() == pytest.approx([-low * math.log(low) - high * math.log(high)] * 2, rel=1e-5)


def values_and_gradients(tokens_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", tokens_per_chunk * VOCABULARY)
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY)
    hidden = torch.randn(NUM_TOKENS, HIDDEN, requires_grad=True)
    token_ids = torch.randint(VOCABULARY, (NUM_TOKENS,))
    logprobs, entropies = token_logprobs(head, hidden, token_ids, temperature=0.7, vocab_size=VOCABULARY)
    (logprobs * torch.randn(NUM_TOKENS) + entropies * torch.randn(NUM_TOKENS)).sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    return [logprobs.detach(), entropies.detach(), hidden.grad, head.weight.grad]


@pytest.mark.parametrize("tokens_per_chunk", [1, 4, NUM_TOKENS])
def test_chunks_change_neither_values_nor_gradients(tokens_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = values_and_gradients(1000, monkeypatch)
    assert all(float(tensor.abs().max()) > 0 for tensor in whole)
    for ours, wanted in zip(values_and_gradients(tokens_per_chunk, monkeypatch), whole, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def test_chunks_keep_no_logits_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", VOCABULARY)
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    head, hidden = nn.Linear(HIDDEN, VOCABULARY), torch.randn(NUM_TOKENS, HIDDEN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        token_logprobs(head, hidden, torch.zeros(NUM_TOKENS, dtype=torch.int64), temperature=1.0, vocab_size=VOCABULARY)
    assert not any(shape[-1:] == (VOCABULARY,) and len(shape) == 2 and shape[0] != HIDDEN for shape in kept)


def test_no_tokens_give_empty_float32() -> None:
    logprobs, entropies = token_logprobs(
        nn.Linear(HIDDEN, VOCABULARY),
        torch.zeros(0, HIDDEN),
        torch.zeros(0, dtype=torch.int64),
        temperature=1.0,
        vocab_size=9,
    )
    assert logprobs.shape == entropies.shape == (0,)
    assert logprobs.dtype == entropies.dtype == torch.float32
