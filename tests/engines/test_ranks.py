"""Processes of one run: their collectives, where they meet, and what they do when one of them dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engines.launching import processes_environment
from rlfr_cli.engines.ranks import ALONE, meeting_place, open_ranks
from rlfr_cli.errors import ConfigError

COLLECTIVES = """
import os, sys, time, torch
from pathlib import Path
from rlfr_cli.engines.ranks import open_ranks
with open_ranks(torch.device("cpu")) as ranks:
    rank = ranks.rank
    assert (ranks.world_size, ranks.local_rank) == (3, rank)
    given = torch.tensor([1.0 + rank, 10.0])
    assert ranks.sum(given).tolist() == [6.0, 30.0]
    assert given.tolist() == [1.0 + rank, 10.0]
    assert ranks.max(-rank) == 0.0
    assert ranks.max(float("nan") if rank == 1 else 5.0) != ranks.max(5.0)
    assert ranks.any(rank == 2) and not ranks.any(False)
    assert ranks.all_gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert ranks.gather(rank) == ([0, 1, 2] if rank == 0 else None)
    assert ranks.broadcast([rank]) == [0]
    ranks.barrier()
"""
LEAVING = (
    COLLECTIVES
    + """
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = ranks.sum(given)
    torch.optim.AdamW([weight]).step()
    time.sleep(rank)  # each leaves in order, and the others stay for a while
threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
assert not [name for name in threads if "gloo" in name], threads
"""
)
WAITING = """
import sys, time, torch
from pathlib import Path
from rlfr_cli.engines.ranks import open_ranks
ranks = open_ranks(torch.device("cpu"))
Path(sys.argv[1], str(ranks.rank)).touch()
time.sleep(300)
"""
FAILING = """
import time, torch
from rlfr_cli.engines.ranks import open_ranks
with open_ranks(torch.device("cpu")) as ranks:
    if ranks.rank == 1:
        raise ValueError("an error of rank 1 alone")
    time.sleep(300)
"""
STOPPED = """
import time, torch
from rlfr_cli.engines.ranks import open_ranks
from rlfr_cli.errors import Stopped
try:
    with open_ranks(torch.device("cpu")) as ranks:
        time.sleep(7 * ranks.rank)  # longer than the grace
        raise Stopped("asked to")
except Stopped as stopped:
    raise SystemExit(stopped.exit_code)
"""
STOPPED_AT_ONCE = """
import time, torch
from rlfr_cli.engines.ranks import open_ranks
from rlfr_cli.errors import StoppedAtOnce
try:
    with open_ranks(torch.device("cpu")) as ranks:
        if ranks.rank == 1:
            raise StoppedAtOnce("Ctrl-C twice, here alone")
        time.sleep(300)
except StoppedAtOnce as stopped:
    raise SystemExit(stopped.exit_code)
"""
SAME_ERROR = """
import sys, time, torch
from rlfr_cli.engines.ranks import open_ranks
with open_ranks(torch.device("cpu")) as ranks:
    time.sleep(ranks.rank)
    sys.exit(2)
"""


def start(code: str, count: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """Processes with the environment of a launcher, and without one that would end them."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    shared = {**processes_environment(), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that do not outlive their test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def ends(processes: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str]]:
    """Exit code and standard error of each, which must end in time."""
    deadline = time.monotonic() + seconds
    found = []
    for process in processes:
        _, error = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        found.append((process.returncode, error))
    return found


@pytest.mark.slow
def test_collectives_of_three_processes_that_leave_one_by_one(started: list[subprocess.Popen[str]]) -> None:
    started += start(LEAVING, 3)
    for code, error in ends(started, 60):
        assert code == 0, error


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 2])
def test_a_killed_process_ends_the_others_within_seconds(
    killed: int, started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    started += start(WAITING, 3, str(tmp_path))
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(started[killed].pid, signal.SIGKILL)
    others = [process for rank, process in enumerate(started) if rank != killed]
    for code, error in ends(others, 10):
        assert code == 1
        assert f"rank {killed} of 3 has ended before its work was done" in error


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_others(started: list[subprocess.Popen[str]]) -> None:
    started += start(FAILING, 2)
    (first, message), (second, error) = ends(started, 60)
    assert (first, second) == (1, 1)
    assert "rank 1 of 2 has ended" in message
    assert "an error of rank 1 alone" in error


@pytest.mark.slow
def test_an_error_of_all_processes_keeps_its_exit_code(started: list[subprocess.Popen[str]]) -> None:
    started += start(SAME_ERROR, 2)
    assert [code for code, _ in ends(started, 60)] == [2, 2]


@pytest.mark.slow
def test_processes_that_stop_may_take_their_time(started: list[subprocess.Popen[str]]) -> None:
    started += start(STOPPED, 2)
    assert [code for code, _ in ends(started, 60)] == [130, 130]


@pytest.mark.slow
def test_a_process_that_stops_at_once_ends_the_others(started: list[subprocess.Popen[str]]) -> None:
    started += start(STOPPED_AT_ONCE, 2)
    (first, message), (second, _) = ends(started, 60)
    assert (first, second) == (1, 130)
    assert "rank 1 of 2 has ended" in message


def test_one_process_gets_back_what_it_puts_in() -> None:
    tensor = torch.tensor([1.0])
    assert ALONE.sum(tensor).tolist() == [1.0]
    assert (ALONE.max(-2), ALONE.any(True), ALONE.any(False)) == (-2.0, True, False)
    assert (ALONE.gather(3), ALONE.all_gather(3), ALONE.broadcast(3)) == ([3], [3], 3)
    ALONE.barrier()


def test_without_a_launcher_there_is_no_process_group() -> None:
    with open_ranks(torch.device("cpu"), environment={"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) as ranks:
        assert (ranks.rank, ranks.world_size, ranks.is_first) == (0, 1, True)
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("machines", "host"),
    [
        ("gpu07", "gpu07"),
        ("gpu[03-07,12]", "gpu03"),
        ("gpu[5,8]-ib,login1", "gpu5-ib"),
        ("a100-1,a100-2", "a100-1"),
    ],
)
def test_srun_meets_on_its_first_machine(machines: str, host: str) -> None:
    found = meeting_place({"SLURM_STEP_NODELIST": machines, "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0"})
    assert found == (host, 15000 + 41 * 31)
    other_step = meeting_place({"SLURM_STEP_NODELIST": machines, "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "1"})
    assert other_step[1] != found[1]


def test_a_named_meeting_place_wins() -> None:
    slurm = {"SLURM_STEP_NODELIST": "gpu07", "SLURM_JOB_ID": "41"}
    assert meeting_place({**slurm, "MASTER_ADDR": "head", "MASTER_PORT": "29500"}) == ("head", 29500)
    assert meeting_place({**slurm, "MASTER_ADDR": "head"})[0] == "head"


def test_processes_that_cannot_meet_are_told_how_to() -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR") as caught:
        open_ranks(torch.device("cpu"), environment={"RANK": "0", "WORLD_SIZE": "2"})
    assert "torchrun" in (caught.value.hint or "")
