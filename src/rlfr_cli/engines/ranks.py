"""The processes that train one policy together, and what they tell each other.

Reads the environment that torchrun, the deepspeed launcher or srun has made; ``rlfr_cli/ranks.py`` says which of its
variables name a process. NCCL carries tensors on GPUs, gloo everything else. One process has no process group, and
every collective gives it back what it put in. All ranks call a collective, in the same order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist

from rlfr_cli.engines.peers import PeerWatch
from rlfr_cli.errors import ConfigError, Stopped, StoppedAtOnce
from rlfr_cli.ranks import rank_of

Value = TypeVar("Value")

# A collective that a healthy rank reaches later than this ends the job; a dead rank is noticed at once (peers.py).
LONGEST_WAIT = timedelta(hours=2)
FIRST_PORT, NUM_PORTS = 15000, 15000


class Ranks:
    """This process among those of the run.

    Attributes:
        rank, world_size: its place among all, and how many there are.
        local_rank: its place on its machine.
        device: where it computes.
    """

    def __init__(
        self, rank: int, world_size: int, local_rank: int, device: torch.device, watch: PeerWatch | None = None
    ) -> None:
        self.rank, self.world_size, self.local_rank, self.device = rank, world_size, local_rank, device
        self._watch = watch

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world_size == 1

    def share(self, items: Sequence[Value]) -> Sequence[Value]:
        """This rank's of some items, in order; shares differ by one at most, and may be empty."""
        begin, end = (len(items) * place // self.world_size for place in (self.rank, self.rank + 1))
        return items[begin:end]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, as a new tensor."""
        total = tensor.clone()
        if not self.alone:
            dist.all_reduce(total)
        return total

    def max(self, number: float) -> float:
        """Largest of the ranks' numbers; NaN counts as the largest."""
        numbers = self.all_gather(float(number))
        return next((value for value in numbers if value != value), max(numbers))

    def any(self, flag: bool) -> bool:
        """Whether the flag of any rank is set."""
        return any(self.all_gather(bool(flag)))

    def gather(self, value: Value) -> list[Value] | None:
        """Every rank's value, in rank order, at rank 0; None elsewhere."""
        if self.alone:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_first else None
        dist.gather_object(value, values)
        return values

    def all_gather(self, value: Value) -> list[Value]:
        """Every rank's value, in rank order, at every rank."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Value) -> Value:
        """Rank 0's value, at every rank."""
        if self.alone:
            return value
        values = [value if self.is_first else None]
        dist.broadcast_object_list(values)
        received: Any = values[0]
        return received

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_gather(None)

    def close(self) -> None:
        """Leave: the others wait for this rank no more. A rank that ends without it ends the others."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the others wait in collectives that this rank will not join: they are to end too. All ranks
        # stop together, unless one stops at once.
        if error is None or (isinstance(error, Stopped) and not isinstance(error, StoppedAtOnce)):
            self.close()


ALONE = Ranks(0, 1, 0, torch.device("cpu"))  # one process, which has nobody to tell


def open_ranks(
    device: torch.device, *, timeout: timedelta = LONGEST_WAIT, environment: Mapping[str, str] = os.environ
) -> Ranks:
    """Join the other processes that the launcher has started.

    Args:
        device: cpu, or cuda with or without an index; without one each process of a machine takes a GPU of its own.
        timeout: longest wait for a rank that is alive.

    Raises:
        ConfigError: the launcher does not say where rank 0 is, or all processes would share one GPU.
    """
    place = rank_of(environment)
    if place is None:
        return Ranks(0, 1, 0, device)
    local = place.local if place.local is not None else 0
    device = _device_of(device, local)
    host, port = meeting_place(environment)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # An optimiser's first step imports this module, whose default arguments would keep the group alive after its end,
    # and threads of gloo that outlive Python's abort the process.
    from torch.distributed.nn import functional  # noqa: F401

    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{host}:{port}",
        rank=place.index,
        world_size=place.count,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    ranks = Ranks(place.index, place.count, local, device)
    ranks._watch = PeerWatch(place.index, place.count, host, ranks.broadcast)
    return ranks


def meeting_place(environment: Mapping[str, str]) -> tuple[str, int]:
    """Host and port at which the processes meet: MASTER_ADDR and MASTER_PORT, or of the job step's first machine.

    srun sets neither. Every task knows the step's list of machines, whose first one has task 0, and the number of the
    job, from which the port follows.

    Raises:
        ConfigError: neither is set.
    """
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if host is not None and port is not None:
        return host, int(port)
    machines = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    job = environment.get("SLURM_JOB_ID")
    if machines is None or job is None:
        raise ConfigError(
            "several processes were started, and none of MASTER_ADDR with MASTER_PORT, or SLURM_STEP_NODELIST with "
            "SLURM_JOB_ID, says where they meet",
            hint="start them with torchrun, deepspeed or srun, or set MASTER_ADDR and MASTER_PORT",
        )
    step = int(environment.get("SLURM_STEP_ID", "0"))
    return host or _first_machine(machines), int(port or FIRST_PORT + (int(job) * 31 + step) % NUM_PORTS)


def _first_machine(machines: str) -> str:
    """The first name of a Slurm list: ``gpu[03-07,12]-ib,login1`` gives ``gpu03-ib``."""
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", machines)
    assert found is not None, machines
    return "".join(part or "" for part in found.groups())


def _device_of(device: torch.device, local_rank: int) -> torch.device:
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if device.index is not None and count > 1:
        raise ConfigError(
            f"--device cuda:{device.index} would put every process on one GPU", hint="use --device cuda or auto"
        )
    # Where each process is shown one GPU only, as by `srun --gpus-per-task 1`, that one is cuda:0 for all.
    return torch.device("cuda", local_rank % count)
