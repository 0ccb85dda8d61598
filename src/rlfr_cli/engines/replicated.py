"""Training in several processes that each hold everything: plain PyTorch, gradients summed before a step (ZeRO 0).

Numbers are those of the single-process engine up to the order of a sum, and so are the files, which rank 0 writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlfr_cli.engines.flow_ranks import sum_gradients
from rlfr_cli.engines.ranks import Ranks
from rlfr_cli.engines.single import SingleProcessEngine
from rlfr_cli.engines.training import StepOutcome
from rlfr_cli.policy.loading import Policy


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
            sum_gradients(self.optimiser.parameters.values(), self.ranks)

    def step(self, learning_rate: float) -> StepOutcome:
        """Clip, step and forget the gradients; every rank skips a step that is not finite on any."""
        self._loss_is_finite = not self.ranks.any(not self._loss_is_finite)
        return super().step(learning_rate)

    def save(self, model_folder: Path, trainer_folder: Path) -> None:
        """Write the model as a Hugging Face folder, unless it has adapters, and the trainer's state, by rank 0."""
        if self.ranks.is_first:
            super().save(model_folder, trainer_folder)
        self.ranks.barrier()
