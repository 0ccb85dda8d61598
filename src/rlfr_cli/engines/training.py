"""The protocol of training engines: gradients in, stepped float32 weights out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from rlfr_cli.policy.loading import Policy


@dataclass(frozen=True)
class StepOutcome:
    """What an optimiser step did.

    Attributes:
        gradient_norm: before clipping.
        stepped: False where loss or gradient was not finite, and nothing was changed.
    """

    gradient_norm: float
    stepped: bool


class TrainingEngine(Protocol):
    """Machinery that trains one policy."""

    policy: Policy

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a part of the loss."""
        ...

    def step(self, learning_rate: float) -> StepOutcome:
        """Clip, step and forget the gradients; skip the step where anything is not finite."""
        ...

    def save(self, model_folder: Path, trainer_folder: Path) -> None:
        """Write the model as a Hugging Face folder, and the trainer's state."""
        ...

    def load(self, trainer_folder: Path) -> None:
        """Take weights and optimiser state of a checkpoint."""
        ...
