"""Weights and optimiser state by parameter name, read from and written to DeepSpeed's partitions.

Every rank calls each function, in the same order of parameters. DeepSpeed keeps float32 weights and AdamW's moments in
flat partitions: one a parameter group in stages 1 and 2 (``single_partition_of_fp32_groups``; with bfloat16 in stage 1
``fp32_groups_flat_partition``), several in stage 3 (``fp32_partitioned_groups_flat``). Its ``safe_get_full_…`` gather
one parameter's part of these. Its ``safe_set_full_…`` of stage 3 reads past the end of a parameter whose size is no
multiple of the number of ranks, so there each rank sets its own share. Written for DeepSpeed 0.19.8.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from rlfr_cli.engines.adamw import MOMENTS

FLAT_PARTITIONS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")


def get_weight(parameter: nn.Parameter) -> torch.Tensor:
    """Whole float32 weights of a parameter; of a frozen one those that the model computes with."""
    from deepspeed.utils import safe_get_full_fp32_param

    if not parameter.requires_grad:
        return _frozen_weight(parameter)
    weight: torch.Tensor = safe_get_full_fp32_param(parameter)
    return weight


def _frozen_weight(parameter: Any) -> torch.Tensor:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    here = not is_partitioned(parameter) or parameter.ds_status == ZeroParamStatus.AVAILABLE
    with nullcontext() if here else GatheredParameters([parameter]):
        # A copy, since a gathered one is freed.
        return parameter.detach().to(torch.float32, copy=not here)  # type: ignore[no-any-return]


def get_moment(parameter: nn.Parameter, key: str) -> torch.Tensor:
    """A whole moment of a parameter; there is one after the first step."""
    from deepspeed.utils import safe_get_full_optimizer_state

    moment: torch.Tensor = safe_get_full_optimizer_state(parameter, key)
    return moment


def set_weight(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Set the float32 weights of a parameter; ``refresh_weights`` follows after the last one."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if is_partitioned(parameter):
        safe_set_local_fp32_param(parameter, _share(parameter, value))
    else:
        safe_set_full_fp32_param(parameter, value)


def set_moment(parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
    """Set a moment of a parameter; ``begin_moments`` comes before the first one."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if is_partitioned(parameter):
        safe_set_local_optimizer_state(parameter, _share(parameter, value), key)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole parameter's shape; a partitioned one shows an empty tensor."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether stage 3 has taken the parameter apart."""
    return hasattr(parameter, "ds_id")


def steps_taken(zero: Any, adamw: torch.optim.Optimizer) -> float | None:
    """AdamW's count of steps, the same for every parameter; None before the first one."""
    state = adamw.state.get(_partitions(zero)[0], {})
    return float(state["step"]) if "step" in state else None


def begin_moments(zero: Any, adamw: torch.optim.Optimizer, steps: float) -> None:
    """Make AdamW's state as it is after so many steps, with moments of 0, where there is none yet."""
    for partition in _partitions(zero):
        state = adamw.state[partition]
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(partition, requires_grad=False)
        # A fused AdamW reads the count on the partition's device.
        state["step"] = torch.tensor(steps, dtype=torch.float32, device=partition.device)
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2 find moments by parameter after this
        zero._lazy_init_hp_params_optimizer_state()


@torch.no_grad()
def refresh_weights(zero: Any) -> None:
    """Bring float32 weights that were set into the weights that the model computes with."""
    if hasattr(zero, "update_lp_params"):  # stages 1 and 2
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:  # small ones, which stay gathered
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _partitions(zero: Any) -> list[torch.Tensor]:
    name = next(name for name in FLAT_PARTITIONS if hasattr(zero, name))
    partitions: list[torch.Tensor] = getattr(zero, name)
    return partitions


def _share(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """This rank's share of a partitioned parameter's values, padded with zeros as DeepSpeed pads it."""
    import deepspeed.comm

    size = parameter.ds_tensor.numel()
    start = size * deepspeed.comm.get_rank(group=parameter.ds_process_group)
    share = torch.zeros(size, dtype=torch.float32)
    present = value.reshape(-1)[start : start + size]
    share[: present.numel()] = present
    return share
