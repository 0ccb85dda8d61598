"""Safetensors files written tensor by tensor read back as those written at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlfr_cli.engines.tensor_stream import TensorStream


def write(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    stream = TensorStream(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, dtype)
    for name, tensor in tensors.items():
        stream.write(name, tensor)
    stream.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_written_reads_back(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"matrix": torch.randn(3, 5).t(), "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    write(tmp_path / "a.safetensors", tensors, dtype)
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor.to(dtype))


def test_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    """One tensor leaves no choice of order, so the files are equal but for how the header's JSON is spaced."""
    tensor = torch.arange(6.0).reshape(2, 3)
    write(tmp_path / "ours", {"a": tensor}, torch.float32)
    save_file({"a": tensor}, tmp_path / "theirs")
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    assert ours[-24:] == theirs[-24:] == tensor.numpy().tobytes()
    length = int.from_bytes(ours[:8], "little")
    assert len(ours) == 8 + length + 24
    assert length % 8 == 0


def test_a_file_without_tensors_is_one(tmp_path: Path) -> None:
    write(tmp_path / "none.safetensors", {}, torch.float32)
    assert load_file(tmp_path / "none.safetensors") == {}


def test_another_order_or_a_missing_tensor_is_noticed() -> None:
    stream = TensorStream(None, {"a": (1,), "b": (1,)})
    with pytest.raises(AssertionError, match="b came before a"):
        stream.write("b", torch.zeros(1))
    stream = TensorStream(None, {"a": (1,), "b": (1,)})
    stream.write("a", torch.zeros(1))
    with pytest.raises(AssertionError, match="missing"):
        stream.close()
