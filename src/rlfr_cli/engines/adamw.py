"""AdamW whose state is ours: moments by parameter name, which safetensors hold and any number of processes reads.

The state of ``torch.optim.AdamW`` is keyed by position; here it is written and read by the parameter's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from rlfr_cli.engines.training import StepOutcome

MOMENTS = ("exp_avg", "exp_avg_sq")


class NamedAdamW:
    """AdamW with gradient clipping over named float32 parameters.

    Args:
        parameters: names and parameters; those without ``requires_grad`` are left alone.
        betas: AdamW's betas.
        weight_decay: AdamW's decay.
        clip_norm: largest gradient norm.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float,
        clip_norm: float,
    ) -> None:
        self.parameters = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        assert all(p.dtype == torch.float32 for p in self.parameters.values()), "stepped weights are float32"
        self.clip_norm = clip_norm
        self.optimiser = torch.optim.AdamW(self.parameters.values(), lr=0.0, betas=betas, weight_decay=weight_decay)

    def step(self, learning_rate: float, *, loss_is_finite: bool = True) -> StepOutcome:
        """Clip and step, unless the loss or a gradient is not finite; gradients are gone afterwards."""
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.clip_norm))
        finite = loss_is_finite and norm == norm and norm != float("inf")
        if finite:
            for group in self.optimiser.param_groups:
                group["lr"] = learning_rate
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return StepOutcome(norm, finite)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Moments as ``exp_avg/NAME`` and ``exp_avg_sq/NAME``, and steps taken as ``step/NAME``."""
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                state[f"{key}/{name}"] = torch.as_tensor(value)
        return state

    def load_state_tensors(self, state: Mapping[str, torch.Tensor]) -> None:
        """The inverse of ``state_tensors``; a parameter without state begins anew."""
        for name, parameter in self.parameters.items():
            if f"step/{name}" not in state:
                continue
            entry: dict[str, Any] = {key: state[f"{key}/{name}"].to(parameter.device) for key in MOMENTS}
            entry["step"] = state[f"step/{name}"]
            self.optimiser.state[parameter] = entry
