"""Training in several processes that each hold everything: plain PyTorch, gradients summed before a step (ZeRO 0).

Numbers are those of the single-process engine up to the order of a sum, and so are the files, which rank 0 writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from rlfr_cli.engines.ranks import Ranks
from rlfr_cli.engines.single import SingleProcessEngine
from rlfr_cli.engines.training import StepOutcome
from rlfr_cli.policy.loading import Policy

BUCKET_ELEMENTS = 2**26  # gradients summed at once: 256 MiB


class ReplicatedEngine(SingleProcessEngine):
    """Trains a copy of the policy on each rank, all alike.

    Args:
        policy: loaded with float32 weights, from the same folder on every rank.
        ranks: the processes.
        **options: those of ``SingleProcessEngine``.
    """

    name = "replicated"

    def __init__(self, policy: Policy, ranks: Ranks, **options: Any) -> None:
        super().__init__(policy, **options)
        self.ranks = ranks

    def backward(self, loss: torch.Tensor, *, last: bool = True) -> None:
        """Add the gradient of a part of the loss; with the last part, sum gradients over ranks."""
        super().backward(loss)
        self.idle_backward(last=last)

    def idle_backward(self, *, last: bool = True) -> None:
        """Keep up with the other ranks: with the last part, sum gradients over ranks."""
        if last:
            self._sum_gradients()

    def step(self, learning_rate: float) -> StepOutcome:
        """Clip, step and forget the gradients; every rank skips a step that is not finite on any."""
        self._loss_is_finite = not self.ranks.any(not self._loss_is_finite)
        return super().step(learning_rate)

    def save(self, model_folder: Path, trainer_folder: Path) -> None:
        """Write the model as a Hugging Face folder, unless it has adapters, and the trainer's state, by rank 0."""
        if self.ranks.is_first:
            super().save(model_folder, trainer_folder)
        self.ranks.barrier()

    @torch.no_grad()
    def _sum_gradients(self) -> None:
        bucket: list[torch.Tensor] = []
        for parameter in self.optimiser.parameters.values():
            if parameter.grad is None:  # this rank was idle
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(gradient.numel() for gradient in bucket) >= BUCKET_ELEMENTS:
                self._sum_bucket(bucket)
                bucket = []
        if bucket:
            self._sum_bucket(bucket)

    def _sum_bucket(self, bucket: list[torch.Tensor]) -> None:
        totals = _unflatten_dense_tensors(self.ranks.sum(_flatten_dense_tensors(bucket)), bucket)
        for gradient, total in zip(bucket, totals, strict=True):
            gradient.copy_(total)
