"""One forward pass over prompts and responses: log-probabilities, entropies and latents of the response tokens.

Token k of a response of T tokens after a prompt of P tokens is predicted at position P + k − 1 and read at position
P + k: log-probabilities come from the first, latents from the second. Everything comes back without padding. A latent
sequence begins with the last prompt tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from rlfr_cli.policy.batching import pad_right, token_budget_batches
from rlfr_cli.policy.loading import Policy
from rlfr_cli.policy.logprobs import token_logprobs
from rlfr_cli.policy.tapping import Taps, tap
from rlfr_cli.states import State


@dataclass(frozen=True)
class TokenSequence:
    """Token ids of a prompt and of a response to it."""

    prompt: Sequence[int]
    response: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class ForwardBatch:
    """What one padded batch gives; row i of each list belongs to sequence ``indices[i]``.

    Attributes:
        indices: which of the sequences asked for.
        logprobs: [T] each, float32.
        entropies: [T] each, in nats, float32.
        latents: [num_prompt + T, tapped states, hidden] each; empty where none is tapped.
    """

    indices: list[int]
    logprobs: list[torch.Tensor]
    entropies: list[torch.Tensor]
    latents: list[torch.Tensor]


def offsets_of(lengths: Sequence[int], device: torch.device | None = None) -> torch.Tensor:
    """Offsets [R + 1] of packed sequences with these lengths."""
    ends = torch.tensor([0, *lengths], dtype=torch.int64, device=device)
    return ends.cumsum(0)


def response_logprobs(
    policy: Policy, sequences: Sequence[TokenSequence], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of one padded batch, packed in its order; gradients flow where they are on."""
    hidden_ND = _predicting_hidden_states(policy, sequences)
    device = policy.placement.device
    token_ids_N = torch.tensor([token for s in sequences for token in s.response], dtype=torch.int64, device=device)
    with policy.placement.autocast():
        return token_logprobs(
            policy.logits,
            hidden_ND,
            token_ids_N,
            temperature=temperature,
            vocab_size=policy.config.vocab_size,
        )


def forward_batches(
    policy: Policy,
    sequences: Sequence[TokenSequence],
    *,
    temperature: float,
    tapped: Sequence[State] = (),
    num_prompt: int = 1,
    tokens_per_batch: int = 16384,
) -> Iterator[ForwardBatch]:
    """Log-probabilities, entropies and latents of all responses, batch by batch, without gradients.

    Args:
        tapped: blocks, or the final normed state; none for no latents.
        num_prompt: last prompt tokens whose latents are kept.
        tokens_per_batch: budget of a padded batch. It changes speed and memory, not the result.
    """
    with tap(policy.decoder, tapped) as taps:
        for indices in token_budget_batches([len(s) for s in sequences], tokens_per_batch):
            rows = [sequences[index] for index in indices]
            lengths = [len(row.response) for row in rows]
            taps.select(_kept_positions(rows, num_prompt, policy.placement.device))
            with torch.no_grad():
                logprobs, entropies = response_logprobs(policy, rows, temperature)
            latents: list[torch.Tensor] = []
            if tapped:
                latents = list(taps.latents().split([length + num_prompt for length in lengths]))
            yield ForwardBatch(indices, list(logprobs.split(lengths)), list(entropies.split(lengths)), latents)


@torch.no_grad()
def decoder_latents(
    decoder: torch.nn.Module,
    taps: Taps,
    sequences: Sequence[TokenSequence],
    num_prompt: int,
    device: torch.device,
) -> list[torch.Tensor]:
    """Latents [num_prompt + T, J, D] of each sequence of one padded batch, from a decoder that is already tapped."""
    taps.select(_kept_positions(sequences, num_prompt, device))
    decoder(input_ids=_padded(sequences, device), use_cache=False)
    return list(taps.latents().split([len(s.response) + num_prompt for s in sequences]))


def _predicting_hidden_states(policy: Policy, sequences: Sequence[TokenSequence]) -> torch.Tensor:
    """Final normed hidden states [N, D] at the positions that predict the response tokens."""
    device = policy.placement.device
    ids_BS = _padded(sequences, device)
    with policy.placement.autocast():
        hidden_BSD = policy.decoder(input_ids=ids_BS, use_cache=False).last_hidden_state
    width = ids_BS.shape[1]
    rows_N = torch.cat(
        [torch.arange(len(s.prompt) - 1, len(s) - 1, device=device) + row * width for row, s in enumerate(sequences)]
    )
    return hidden_BSD.reshape(-1, hidden_BSD.shape[-1])[rows_N]


def _padded(sequences: Sequence[TokenSequence], device: torch.device) -> torch.Tensor:
    return pad_right([[*s.prompt, *s.response] for s in sequences], 0, device)


def _kept_positions(sequences: Sequence[TokenSequence], num_prompt: int, device: torch.device) -> torch.Tensor:
    """Rows of the flattened [B × S] positions whose latents are kept."""
    width = max(map(len, sequences))
    assert all(len(s.prompt) >= num_prompt for s in sequences), "a prompt is shorter than the shift"
    return torch.cat(
        [
            torch.arange(len(s.prompt) - num_prompt, len(s), device=device) + row * width
            for row, s in enumerate(sequences)
        ]
    )
