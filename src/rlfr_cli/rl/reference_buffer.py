"""Accepted responses of recent batches, kept for the flow's online update.

Token ids are kept, not latents: those are taken anew from the policy as it is. A checkpoint holds the buffer as packed
tensors, so that a resumed run goes on with the same one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlfr_cli.policy.forward import TokenSequence, offsets_of


@dataclass(frozen=True)
class KeptResponse:
    """An accepted response and the weight that the rules gave it."""

    sequence: TokenSequence
    weight: float


class ReferenceBuffer:
    """The newest accepted responses, ``capacity`` at most."""

    def __init__(self, capacity: int) -> None:
        self.kept: deque[KeptResponse] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self.kept)

    def add(self, sequences: Sequence[TokenSequence], weights: Sequence[float]) -> None:
        """Take those of positive weight, in order; the oldest make room."""
        for sequence, weight in zip(sequences, weights, strict=True):
            if weight > 0:
                self.kept.append(KeptResponse(sequence, weight))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The buffer as packed tensors: token ids, offsets of prompts and responses in turn, weights."""
        pieces = [part for entry in self.kept for part in (entry.sequence.prompt, entry.sequence.response)]
        return {
            "token_ids": torch.tensor([token for piece in pieces for token in piece], dtype=torch.int64),
            "offsets": offsets_of([len(piece) for piece in pieces]),
            "weights": torch.tensor([entry.weight for entry in self.kept], dtype=torch.float64),
        }

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of :meth:`tensors`."""
        lengths = tensors["offsets"].diff().tolist()
        pieces = [tuple(piece.tolist()) for piece in tensors["token_ids"].split(lengths)] if lengths else []
        self.kept.clear()
        for prompt, response, weight in zip(pieces[::2], pieces[1::2], tensors["weights"].tolist(), strict=True):
            self.kept.append(KeptResponse(TokenSequence(prompt, response), weight))
