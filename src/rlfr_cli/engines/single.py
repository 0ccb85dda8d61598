"""Training in one process: float32 weights and moments, autocast for compute, plain PyTorch.

A checkpoint's ``model/`` is a Hugging Face folder in the dtype that the policy came in; where that is not float32,
``trainer/weights.safetensors`` holds the float32 weights, so that a resumed run loses nothing. ``trainer/optimiser.
safetensors`` holds AdamW's moments by parameter name. Of a policy with adapters ``trainer/`` holds these alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rlfr_cli.engines.adamw import NamedAdamW
from rlfr_cli.engines.training import ENGINE_FILE, OPTIMISER_FILE, WEIGHTS_FILE, StepOutcome, T
from rlfr_cli.policy.adapters import plain_weights
from rlfr_cli.policy.loading import Policy
from rlfr_cli.policy.saving import save_model_folder


class SingleProcessEngine:
    """Trains the policy's own transformers model.

    Args:
        policy: loaded with float32 weights; one with adapters, which are float32, in the compute dtype.
        stored_dtype: dtype of the checkpoints' ``model/``.
        betas, weight_decay, clip_norm: of AdamW.
        gradient_checkpointing: compute activations again in the backward pass.
    """

    name = "single"

    def __init__(
        self,
        policy: Policy,
        *,
        stored_dtype: torch.dtype,
        betas: tuple[float, float],
        weight_decay: float,
        clip_norm: float,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.policy = policy
        self.stored_dtype = stored_dtype
        self._loss_is_finite = True
        if gradient_checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimiser = NamedAdamW(
            policy.model.named_parameters(), betas=betas, weight_decay=weight_decay, clip_norm=clip_norm
        )

    def run(self, work: Callable[[], T]) -> T:
        """Do the work; one process needs nothing around it."""
        return work()

    def backward(self, loss: torch.Tensor, *, last: bool = True) -> None:
        """Add the gradient of a part of the loss."""
        self._loss_is_finite &= math.isfinite(float(loss.detach()))
        loss.backward()

    def idle_backward(self, *, last: bool = True) -> None:
        """Nothing: there is no other rank to keep up with."""

    def step(self, learning_rate: float) -> StepOutcome:
        """Clip, step and forget the gradients; skip the step where anything is not finite."""
        outcome = self.optimiser.step(learning_rate, loss_is_finite=self._loss_is_finite)
        self._loss_is_finite = True
        return outcome

    def whole_policy(self) -> AbstractContextManager[None]:
        """The policy is whole always."""
        return nullcontext()

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and float32 weights as a plain checkpoint has them; a tied one comes once."""
        return plain_weights(self.policy, lambda parameter: parameter.detach())

    def save(self, model_folder: Path, trainer_folder: Path) -> None:
        """Write the model as a Hugging Face folder, unless it has adapters, and the trainer's state."""
        adapted = self.policy.adapters is not None
        if not adapted:
            save_model_folder(self.policy, model_folder, self.stored_dtype)
        trainer_folder.mkdir(parents=True, exist_ok=True)
        moments = {name: tensor.contiguous() for name, tensor in self.optimiser.state_tensors().items()}
        save_file(moments, trainer_folder / OPTIMISER_FILE)
        if adapted or self.stored_dtype != torch.float32:
            weights = {name: weight.detach().contiguous() for name, weight in self.optimiser.parameters.items()}
            save_file(weights, trainer_folder / WEIGHTS_FILE)
        (trainer_folder / ENGINE_FILE).write_text(json.dumps({"engine": self.name}) + "\n", encoding="utf-8")

    def load(self, trainer_folder: Path) -> None:
        """Take weights and optimiser state of a checkpoint."""
        weights = trainer_folder / WEIGHTS_FILE
        if weights.is_file():
            by_name = load_file(weights)
            with torch.no_grad():
                for name, parameter in self.optimiser.parameters.items():
                    parameter.copy_(by_name[name])
        self.optimiser.load_state_tensors(load_file(trainer_folder / OPTIMISER_FILE))
