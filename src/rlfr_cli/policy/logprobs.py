"""Log-probabilities and entropy of given tokens, in chunks, so that [tokens, vocabulary] never exists in float32.

log p = log softmax(logits / temperature)[token], the temperature that sampling used. Shapes: N tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**26  # logits of one chunk: 256 MiB in float32


def token_logprobs(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    hidden_ND: torch.Tensor,
    token_ids_N: torch.Tensor,
    *,
    temperature: float,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token, and entropy of the distribution it was drawn from.

    Args:
        logits_of: the output head, [n, D] to [n, vocabulary].
        hidden_ND: final normed hidden states at the positions that predict the tokens.
        token_ids_N: the tokens.
        temperature: divides the logits; 0 (greedy) counts as 1.
        vocab_size: sets the chunk length.

    Returns:
        Log-probabilities [N] and entropies [N] in nats, float32. Where gradients are on, both carry them, and each
        chunk's logits are computed again in the backward pass instead of being kept.
    """

    def of_chunk(hidden_nD: torch.Tensor, ids_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_nV = logits_of(hidden_nD).float()
        if temperature not in (0.0, 1.0):
            logits_nV = logits_nV / temperature
        log_total_n = logits_nV.logsumexp(-1)
        logprobs_n = logits_nV.gather(-1, ids_n[:, None])[:, 0] - log_total_n
        entropy_n = log_total_n - ((logits_nV - log_total_n[:, None]).exp() * logits_nV).sum(-1)
        return logprobs_n, entropy_n

    chunk = max(1, CHUNK_ELEMENTS // vocab_size)
    needs_gradient = torch.is_grad_enabled() and hidden_ND.requires_grad
    logprobs, entropies = [], []
    for start in range(0, len(token_ids_N), chunk):
        part = hidden_ND[start : start + chunk], token_ids_N[start : start + chunk]
        if needs_gradient and len(token_ids_N) > chunk:
            logprobs_n, entropy_n = checkpoint(of_chunk, *part, use_reentrant=False)
        else:
            logprobs_n, entropy_n = of_chunk(*part)
        logprobs.append(logprobs_n)
        entropies.append(entropy_n)
    if not logprobs:
        return hidden_ND.new_zeros(0, dtype=torch.float32), hidden_ND.new_zeros(0, dtype=torch.float32)
    return torch.cat(logprobs), torch.cat(entropies)
