"""The protocol of training engines: gradients in, stepped float32 weights out.

An engine trains one policy, in one process or in many. Where there are many, each rank brings a part of the optimiser
batch, and gradients are summed over ranks: a loss is a share of the mean over the whole batch of all ranks. Unless it
says otherwise, a method is called by every rank, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from rlfr_cli.policy.loading import Policy

T = TypeVar("T")

OPTIMISER_FILE, WEIGHTS_FILE, ENGINE_FILE = "optimiser.safetensors", "weights.safetensors", "engine.json"


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

    def run(self, work: Callable[[], T]) -> T:
        """Run a forward pass of parts of the policy (``policy.decoder``, ``policy.logits``) and return what it returns.

        The tensors that a loss is made of are in what ``work`` returns: a tensor, or a tuple, list or dict with them.
        A pass with gradients is followed by its ``backward`` before the next pass.
        """
        ...

    def backward(self, loss: torch.Tensor, *, last: bool = True) -> None:
        """Add the gradient of a part of the loss.

        Args:
            last: whether a step follows. All ranks call this, or ``idle_backward``, equally often before a step.
        """
        ...

    def idle_backward(self, *, last: bool = True) -> None:
        """What a rank without a part of its own calls in place of ``run`` and ``backward``; it adds nothing."""
        ...

    def step(self, learning_rate: float) -> StepOutcome:
        """Clip, step and forget the gradients; skip the step, on every rank, where anything is not finite on any."""
        ...

    def whole_policy(self) -> AbstractContextManager[None]:
        """Inside, ``policy.model`` holds whole weights on every rank, and each may run it by itself, without gradients.

        Only entering and leaving are done together.
        """
        ...

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and whole float32 weights as a plain checkpoint has them, one after the other; a tied one comes once.

        Adapters are merged into the weights that they adapt.
        """
        ...

    def save(self, model_folder: Path, trainer_folder: Path) -> None:
        """Write the model as a Hugging Face folder, and the trainer's state; rank 0 writes, the others wait for it.

        Of a policy with adapters only the trainer's state is written: the adapters in it are all that was trained.
        """
        ...

    def load(self, trainer_folder: Path) -> None:
        """Take weights and optimiser state of a checkpoint, whichever engine and however many processes wrote it.

        The policy was loaded from the checkpoint's ``model/``; one with adapters from its base model.
        """
        ...
