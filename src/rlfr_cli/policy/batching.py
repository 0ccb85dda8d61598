"""Batches by token budget, and padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def token_budget_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Group items so that rows × longest row stays within the budget; longest first, so padding is small.

    Args:
        lengths: tokens of each item.
        tokens_per_batch: budget, padding counted; an item longer than it makes a batch of its own.

    Returns:
        Lists of item indices; every item stands in exactly one. Equal lengths keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens_per_batch:
            batches.append([])
        batches[-1].append(index)
    return batches


def pad_right(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> torch.Tensor:
    """Rows of token ids as one tensor [B, longest], padded on the right.

    Under causal attention no real token sees what stands right of it, so no attention mask is needed.
    """
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the left: token ids [B, longest] and attention mask [B, longest]."""
    width = max(map(len, rows))
    ids = torch.tensor([[*[pad] * (width - len(row)), *row] for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
