"""Write a safetensors file tensor by tensor, without holding all of them.

The header names every tensor's dtype, shape and place before the first byte of data, so names, dtypes and shapes are
given first. Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from rlfr_cli.policy.saving import DTYPE_NAMES


class TensorStream:
    """A safetensors file that is being written.

    Args:
        path: the file; None for a process that only takes part in gathering what another writes.
        shapes: every tensor's name and shape, in the order in which they will come.
        dtype: of all of them.
    """

    def __init__(
        self, path: Path | None, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32
    ) -> None:
        self._shapes, self._dtype = dict(shapes), dtype
        self._waiting = iter(self._shapes)
        header, end = {}, 0
        for name, shape in self._shapes.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # data begins at a multiple of 8
        self._file = None if path is None else path.open("wb")
        if self._file is not None:
            self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor, which is the one that ``shapes`` names next."""
        expected = next(self._waiting)
        assert name == expected, f"{name} came before {expected}"
        assert tuple(tensor.shape) == self._shapes[name], f"{name} has shape {tuple(tensor.shape)}"
        if self._file is None:
            return
        plain = tensor.detach().to("cpu", self._dtype).contiguous()
        self._file.write(plain.reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """The last tensor was written."""
        assert next(self._waiting, None) is None, "a tensor is missing"
        if self._file is not None:
            self._file.close()
