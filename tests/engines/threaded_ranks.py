"""Ranks that are threads of one process, for what they compute and not for how they start and end.

Threads share torch's default generator, so what is drawn from it (a tiny flow's weights) is drawn beforehand.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from rlfr_cli.engines.ranks import Ranks

Result = TypeVar("Result")


class ThreadedRanks(Ranks):
    """One of several threads that meet at a barrier; sums are taken in rank order."""

    def __init__(self, rank: int, world_size: int, shared: dict[int, Any], meeting: threading.Barrier) -> None:
        super().__init__(rank, world_size, rank, torch.device("cpu"))
        self.shared, self.meeting = shared, meeting

    def all_gather(self, value: Any) -> list[Any]:
        self.shared[self.rank] = value
        self.meeting.wait(60)
        values = [self.shared[rank] for rank in range(self.world_size)]
        self.meeting.wait(60)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.all_gather(tensor.detach().clone())).sum(dim=0)

    def broadcast(self, value: Any) -> Any:
        return self.all_gather(value)[0]


def on_threads(world_size: int, work: Callable[[Ranks], Result]) -> list[Result]:
    """What each rank's work returns, in rank order; an error of one ends all."""
    shared: dict[int, Any] = {}
    meeting = threading.Barrier(world_size)

    def run(rank: int) -> Result:
        try:
            return work(ThreadedRanks(rank, world_size, shared, meeting))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))
