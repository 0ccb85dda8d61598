"""A trainer's weights on their way into vLLM: by files in shared memory, by CUDA IPC, or by NCCL.

In: tensors named as in a checkpoint of the model. Files work everywhere. IPC, for an engine on the trainer's own GPU,
and NCCL, for engines on other GPUs, are vLLM's own transfers (``vllm.distributed.weight_transfer``, vLLM 0.32), driven
here from the trainer's side; they need GPUs and have been run nowhere yet.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from rlfr_cli.config.engine import WeightTransfer

Weights = Iterable[tuple[str, torch.Tensor]]
Call = Callable[..., Any]

SHARED_MEMORY = Path("/dev/shm")
BYTES_PER_FILE = 1 << 30
LOCALHOST = "127.0.0.1"


class WeightRoute(Protocol):
    """A way for weights into the engine."""

    def send(self, weights: Weights) -> None:
        """Give the engine these weights; returns when it has them."""
        ...


def open_route(
    transfer: WeightTransfer, call: Call, dtype: torch.dtype, num_workers: int, device: torch.device
) -> WeightRoute:
    """The route of that name.

    Args:
        call: calls a method of every worker by name, with keyword arguments.
        dtype: what the engine computes in; weights travel in it.
        num_workers: GPUs of all the engine's copies.
        device: of the trainer.
    """
    if transfer is WeightTransfer.FILE:
        return FileRoute(call, dtype)
    return TransferRoute(transfer, call, dtype, num_workers, device)


class FileRoute:
    """Safetensors files in shared memory, which every worker reads; they are gone when ``send`` returns."""

    def __init__(self, call: Call, dtype: torch.dtype) -> None:
        self.call = call
        self.dtype = dtype

    def send(self, weights: Weights) -> None:
        """See ``WeightRoute``; shared memory holds the whole model once, in the engine's dtype."""
        place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        with tempfile.TemporaryDirectory(prefix="rlfr-weights-", dir=place) as folder:
            self.call("rlfr_load_weights", files=write_files(weights, Path(folder), self.dtype))


def write_files(weights: Weights, folder: Path, dtype: torch.dtype, bytes_per_file: int = BYTES_PER_FILE) -> list[str]:
    """Write tensors in ``dtype`` into safetensors files of about that size; returns their paths."""
    files: list[str] = []
    chunk: dict[str, torch.Tensor] = {}
    size = 0

    def write() -> None:
        files.append(str(folder / f"{len(files):05d}.safetensors"))
        save_file(chunk, files[-1])

    for name, tensor in weights:
        # Copied, since safetensors refuses tensors that share memory, as tied ones do.
        chunk[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        size += chunk[name].nbytes
        if size >= bytes_per_file:
            write()
            chunk, size = {}, 0
    if chunk:
        write()
    return files


class TransferRoute:
    """vLLM's own transfer from one trainer process; run nowhere yet.

    The handshake is made with the first weights. vLLM's senders work on the current GPU, which is the first one unless
    it is said: not always the trainer's.
    """

    def __init__(
        self, transfer: WeightTransfer, call: Call, dtype: torch.dtype, num_workers: int, device: torch.device
    ) -> None:
        self.transfer = transfer
        self.call = call
        self.dtype = dtype
        self.num_workers = num_workers
        self.device = device
        self._weights: Sequence[tuple[str, torch.Tensor]] = ()
        self._sender: Any = None

    def send(self, weights: Weights) -> None:
        """See ``WeightRoute``; vLLM wants all names and shapes first, so all weights are held for that time."""
        self._weights = list(weights)
        with torch.cuda.device(self.device):
            if self._sender is None:
                self._sender = self._shake_hands()
            self._sender.send_weights()
        self._weights = ()

    def _shake_hands(self) -> Any:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        if self.transfer is WeightTransfer.IPC:
            info = IPCTrainerInitInfo(rank=0, packed=True)
        else:
            info = NCCLTrainerInitInfo(
                rank=0,
                master_address=LOCALHOST,
                master_port=free_port(),
                world_size=1 + self.num_workers,
            )
        return WeightTransferTrainerFactory.trainer_init(info, client=_Client(self.call), source=_source(self))


def free_port() -> int:
    """A port of this machine that nobody listens at, for engines on it."""
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        return int(probe.getsockname()[1])


class _Client:
    """What vLLM's senders ask of the engine (``VLLMWeightSyncClient``)."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.call("init_weight_transfer_engine", init_info=init_info)

    def start_weight_update(self) -> None:
        self.call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self.call("update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.call("finish_weight_update")


def _source(route: TransferRoute) -> Any:
    """The weights at hand as vLLM's senders read them (``WeightSource``), in the engine's dtype."""
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    class Source(WeightSource):  # type: ignore[misc]  # vLLM's classes are known only where it is installed
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, route.dtype, tuple(tensor.shape)) for name, tensor in route._weights]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            # Offloaded weights come from main memory.
            return ((name, tensor.detach().to(route.device, route.dtype)) for name, tensor in route._weights)

    return Source()
