"""Training with DeepSpeed's ZeRO in stages 1 to 3: float32 weights and moments are shared out over the ranks.

Weights compute in bfloat16 or float32; the weights that AdamW steps are float32 either way. DeepSpeed's own checkpoint
files are not used: rank 0 writes the files of the single-process engine, parameter by parameter, so a run may go on
with another number of processes, another stage or another engine. Of a policy with adapters these alone are stepped;
its own weights are shared out in stage 3 and have no float32 copy. Written for DeepSpeed 0.19.8.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rlfr_cli.engines.deepspeed_settings import Settings
from rlfr_cli.engines.ranks import Ranks
from rlfr_cli.engines.training import ENGINE_FILE, StepOutcome, T
from rlfr_cli.engines.zero_checkpoints import WholeModel, load_moments, load_weights, save_moments, save_weights
from rlfr_cli.engines.zero_hooks import StageThreeHooks
from rlfr_cli.engines.zero_state import get_weight, set_weight
from rlfr_cli.errors import MissingPackageError
from rlfr_cli.policy.adapters import plain_weights
from rlfr_cli.policy.loading import Policy
from rlfr_cli.policy.saving import save_model_folder


class Root(nn.Module):
    """The module that DeepSpeed is given: its forward runs whatever parts of the policy a caller wants.

    Stage 3 prepares every pass by hooks on this module, and gathers each submodule's weights by hooks on that.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> tuple[T]:
        return (work(),)  # hooks look for tensors in tuples; anything else may be in one too


class DeepSpeedEngine:
    """Trains the policy's own transformers model in all processes together.

    A loss that is not finite on one rank is turned into gradients that are NaN, which the sum over ranks carries to
    all; each stage of DeepSpeed then finds the global norm not finite and leaves weights and moments as they were. So
    every rank skips the same step.

    Args:
        policy: loaded with float32 weights, or in the compute dtype, on any device; it is moved and changed in place.
        ranks: the processes.
        settings: of ``deepspeed_settings``.
        stored_dtype: dtype of the checkpoints' ``model/``.
        betas, weight_decay: of AdamW.
        gradient_checkpointing: compute activations again in the backward pass.

    Raises:
        MissingPackageError: DeepSpeed is not installed.
    """

    def __init__(
        self,
        policy: Policy,
        ranks: Ranks,
        settings: Settings,
        *,
        stored_dtype: torch.dtype,
        betas: tuple[float, float],
        weight_decay: float,
        gradient_checkpointing: bool = False,
    ) -> None:
        deepspeed = import_deepspeed(ranks)
        self.policy, self.ranks, self.stored_dtype = policy, ranks, stored_dtype
        self.stage: int = settings["zero_optimization"]["stage"]
        model = policy.model
        self._trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        originals = self._originals(settings["bf16"]["enabled"])
        # One parameter group, so one learning rate; fused needs no memory beside its own state.
        trained = self._trained.values()
        self._adamw = torch.optim.AdamW(trained, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)
        with redirect_stdout(io.StringIO()):  # reports of memory that cannot be turned off
            root = Root(model)
            self._engine, self._zero, *_ = deepspeed.initialize(model=root, optimizer=self._adamw, config=settings)
        policy.placement = replace(policy.placement, device=ranks.device)
        self._hooks = StageThreeHooks(self._zero, model) if self.stage == 3 else None
        self._has_gradients = False
        for name, original in originals.items():
            set_weight(self._trained[name], original)

    def _originals(self, bfloat16: bool) -> dict[str, torch.Tensor]:
        """Copies of weights that DeepSpeed is about to round, where bfloat16 does not hold them."""
        if not bfloat16 or (self.stored_dtype == torch.bfloat16 and self.policy.adapters is None):
            return {}
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._trained.items()}

    # A step

    def run(self, work: Callable[[], T]) -> T:
        """Run a forward pass of parts of the policy inside the root module, and return what ``work`` returns."""
        if self._hooks is not None:
            self._hooks.hold_head()
        result: tuple[T] = self._engine(work)
        return result[0]

    def backward(self, loss: torch.Tensor, *, last: bool = True) -> None:
        """Add the gradient of a part of the loss, summed over ranks.

        DeepSpeed averages over ranks, and the loss is a share of the mean over the batch of all ranks already: hence
        the factor.
        """
        if not math.isfinite(float(loss.detach())):
            loss = loss * torch.nan
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.ranks.world_size, scale_wrt_gas=False)
        self._has_gradients = True

    def idle_backward(self, *, last: bool = True) -> None:
        """Run one token through the policy and add a gradient of exactly 0: the other ranks' collectives need this."""
        ids_BS = torch.zeros((1, 1), dtype=torch.int64, device=self.ranks.device)

        def one_token() -> torch.Tensor:
            with self.policy.placement.autocast():
                hidden_BSD = self.policy.decoder(input_ids=ids_BS, use_cache=False).last_hidden_state
                return self.policy.logits(hidden_BSD[0])

        self.backward((self.run(one_token) * 0.0).sum(), last=last)

    def step(self, learning_rate: float) -> StepOutcome:
        """Clip, step and forget the gradients; every rank skips a step that is not finite on any."""
        if not self._has_gradients:
            return StepOutcome(0.0, True)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        self._has_gradients = False
        return StepOutcome(float(self._engine.get_global_grad_norm()), self._engine.was_step_applied())

    # Weights

    @contextmanager
    def whole_policy(self) -> Iterator[None]:
        """Inside, ``policy.model`` holds whole weights on every rank, and each may run it by itself."""
        if self._hooks is None:
            yield
        else:
            from deepspeed.runtime.zero import GatheredParameters

            self._hooks.let_go_of_head()
            with GatheredParameters(list(self.policy.model.parameters())), self._hooks.removed():
                yield
        # Ranks may have worked unequally long; DeepSpeed's own collectives wait for ten minutes at most.
        self.ranks.barrier()

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and whole float32 weights as a plain checkpoint has them, gathered one after the other."""
        return plain_weights(self.policy, get_weight)

    # Checkpoints

    def save(self, model_folder: Path, trainer_folder: Path) -> None:
        """Write the model as a Hugging Face folder, unless it has adapters, and the trainer's state, by rank 0.

        Rank 0 holds the model once more in main memory, in the stored dtype; the rest goes through it parameter by
        parameter.
        """
        if self.ranks.is_first:
            trainer_folder.mkdir(parents=True, exist_ok=True)
        # What is not in the model folder in float32 is written in float32 here.
        adapted = self.policy.adapters is not None
        stored_dtype = None if adapted else self.stored_dtype
        weights = save_weights(self._trained, trainer_folder, stored_dtype, writes=self.ranks.is_first)
        save_moments(self._trained, trainer_folder, self._zero, self._adamw, writes=self.ranks.is_first)
        if self.ranks.is_first:
            if not adapted:
                whole = replace(self.policy, model=WholeModel(self.policy.model, weights))
                save_model_folder(whole, model_folder, self.stored_dtype)
            described = {"engine": "deepspeed", "zero_stage": self.stage, "processes": self.ranks.world_size}
            (trainer_folder / ENGINE_FILE).write_text(json.dumps(described) + "\n", encoding="utf-8")
        self.ranks.barrier()

    def load(self, trainer_folder: Path) -> None:
        """Take weights and optimiser state of a checkpoint."""
        load_weights(self._trained, trainer_folder, self._zero)
        load_moments(self._trained, trainer_folder, self._zero, self._adamw)


def import_deepspeed(ranks: Ranks) -> Any:
    """DeepSpeed, told which device it has, with a process group to work in.

    Raises:
        MissingPackageError: it is not installed.
    """
    # DeepSpeed takes the first accelerator that it finds, and its index from LOCAL_RANK, which srun does not set.
    os.environ["DS_ACCELERATOR"] = ranks.device.type
    os.environ["LOCAL_RANK"] = str(ranks.device.index or 0)
    try:
        import deepspeed
    except ImportError:  # an optional package
        raise MissingPackageError(
            "--zero-stage 1, 2 and 3, and training in several processes without --zero-stage 0, need the package "
            "deepspeed",
            hint="pip install 'rlfr-cli[deepspeed]'",
        ) from None
    for handler in deepspeed.utils.logger.handlers:  # standard output is for data
        handler.setStream(sys.stderr)
    # Collectives that DeepSpeed calls by their earlier names.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if ranks.device.type == "cpu":
        # Told that it can compile nothing here: it would spend minutes on an all-reduce that training does not use.
        deepspeed.ops.__compatible_ops__ = {}
    if not dist.is_initialized():  # a single process, such as one that offloads
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return deepspeed
