"""Checkpoint files out of DeepSpeed's partitions and into them, parameter by parameter.

The files are those of the single-process engine: ``weights.safetensors`` where the stored dtype is not float32, and
``optimiser.safetensors`` with AdamW's moments by parameter name. Every rank calls each function; the one that
``writes`` leaves the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from rlfr_cli.engines.adamw import MOMENTS
from rlfr_cli.engines.tensor_stream import TensorStream
from rlfr_cli.engines.training import OPTIMISER_FILE, WEIGHTS_FILE
from rlfr_cli.engines.zero_state import (
    begin_moments,
    get_moment,
    get_weight,
    refresh_weights,
    set_moment,
    set_weight,
    shape_of,
    steps_taken,
)

Parameters = Mapping[str, nn.Parameter]


def save_weights(
    parameters: Parameters, folder: Path, stored_dtype: torch.dtype | None, *, writes: bool
) -> dict[str, torch.Tensor]:
    """Write float32 weights unless they are what the model folder will hold; return them in the stored dtype.

    What is returned lies in main memory, and is empty where this process does not write, or where nothing is stored
    in a model folder.
    """
    shapes = {name: shape_of(parameter) for name, parameter in parameters.items()}
    keeps_float32 = writes and stored_dtype != torch.float32
    stream = TensorStream(folder / WEIGHTS_FILE if keeps_float32 else None, shapes)
    stored = {}
    for name, parameter in parameters.items():
        weight = get_weight(parameter)
        stream.write(name, weight)
        if writes and stored_dtype is not None:
            stored[name] = weight.to("cpu", stored_dtype)
    stream.close()
    return stored


def save_moments(
    parameters: Parameters, folder: Path, zero: Any, adamw: torch.optim.Optimizer, *, writes: bool
) -> None:
    """Write AdamW's moments and count of steps; a file without tensors before the first step."""
    steps = steps_taken(zero, adamw)
    named = parameters if steps is not None else {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in named.items():
        shapes |= {f"{key}/{name}": shape_of(parameter) for key in MOMENTS} | {f"step/{name}": ()}
    stream = TensorStream(folder / OPTIMISER_FILE if writes else None, shapes)
    for name, parameter in named.items():
        for key in MOMENTS:
            stream.write(f"{key}/{name}", get_moment(parameter, key))
        stream.write(f"step/{name}", torch.tensor(steps))
    stream.close()


def load_weights(parameters: Parameters, folder: Path, zero: Any) -> None:
    """Take the float32 weights of a checkpoint that has them beside its model folder."""
    if not (folder / WEIGHTS_FILE).is_file():
        return
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        for name, parameter in parameters.items():
            set_weight(parameter, file.get_tensor(name))
    refresh_weights(zero)


def load_moments(parameters: Parameters, folder: Path, zero: Any, adamw: torch.optim.Optimizer) -> None:
    """Take AdamW's moments and count of steps."""
    with safe_open(folder / OPTIMISER_FILE, "pt") as file:
        if not file.keys():  # saved before the first step
            return
        begin_moments(zero, adamw, float(file.get_tensor(f"step/{next(iter(parameters))}")))
        for name, parameter in parameters.items():
            for key in MOMENTS:
                set_moment(parameter, key, file.get_tensor(f"{key}/{name}"))


class WholeModel:
    """Stands in for a model in ``save_model_folder``, with whole weights in place of this process's share.

    Args:
        model: the transformers model.
        weights: by parameter name; a tied parameter has one.
    """

    def __init__(self, model: Any, weights: Mapping[str, torch.Tensor]) -> None:
        self._model = model
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        entries = model.state_dict(keep_vars=True)  # with a tied parameter under each of its names, and buffers
        self._entries = {
            name: weights[names[id(entry)]] if id(entry) in names else entry.detach() for name, entry in entries.items()
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._entries

    def save_pretrained(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        self._model.save_pretrained(folder, state_dict=state_dict)
