"""Parts as people run them: real commands that start at once, are killed, and are launched by torchrun."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlfr_cli.stages import sample
from stages.tiny_stages import TinyArtifacts, bytes_of, problems_of, rlfr, sample_config, start_rlfr

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def arguments(tiny: TinyArtifacts, out: Path, *more: object) -> list[object]:
    """The options of the fixture's rollouts: three units."""
    given: list[object] = ["sample", "--model", tiny.policy, "--data", tiny.problems, "--id-column", "id", "--out", out]
    given += ["--group-size", 4, "--max-new-tokens", 32, "--problems-per-shard", 2, "--device", "cpu", "--json"]
    return [*given, *more]


def wait_for(found: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not found() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def test_three_processes_at_once_give_the_bytes_of_one(tiny: TinyArtifacts, tmp_path: Path) -> None:
    processes = [start_rlfr(*arguments(tiny, tmp_path, "--part", f"{part}/3")) for part in (1, 2, 3)]
    results = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert any(json.loads(out)["complete"] for out, _ in results)
    assert bytes_of(tmp_path) == bytes_of(tiny.rollouts)


def test_a_part_killed_at_work_is_run_again_alone_while_another_is_at_work(tiny: TinyArtifacts, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ["--group-size", 64, "--problems-per-shard", 1]
    lost = start_rlfr(*arguments(tiny, out, *options, "--part", "2/3"))
    wait_for(lambda: (out / "shards" / "00001.arrow.json").exists(), lost)
    lost.kill()
    lost.communicate()
    assert lost.returncode == -signal.SIGKILL
    parts = [start_rlfr(*arguments(tiny, out, *options, "--part", part)) for part in ("1/3", "2/3")]
    for process in parts:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
    code, _, said = rlfr("merge", out)
    assert code == 1
    assert "of 6 units, 2 are missing: 2, 5; of the parts: 3/3" in said
    for folder, part in ((out, "3/3"), (tmp_path / "whole", None)):
        config = sample_config(tiny.policy, tiny.problems, folder, group_size=64, problems_per_shard=1, part=part)
        assert sample.run(config)["complete"]
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_under_torchrun_each_rank_does_one_part(tiny: TinyArtifacts, tmp_path: Path) -> None:
    command = [*TORCHRUN, "2", "-m", "rlfr_cli.cli", *map(str, arguments(tiny, tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "rank 1 of 2 under torchrun: --part 2/2 --device cpu" in done.stderr
    assert "part 1/2: 2 units to do" in done.stderr
    assert bytes_of(tmp_path) == bytes_of(tiny.rollouts)


def test_torchrun_stopped_by_sigterm_leaves_the_finished_units_of_all_ranks(
    tiny: TinyArtifacts, tmp_path: Path
) -> None:
    problems = tiny.policy.parent / "train.jsonl"
    more = ["--data", problems, "--limit", 30, "--group-size", 32, "--problems-per-shard", 1]
    command = [*TORCHRUN, "2", "-m", "rlfr_cli.cli", *map(str, arguments(tiny, tmp_path, *more))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    shards = tmp_path / "shards"
    wait_for(lambda: all((shards / f"{unit:05d}.arrow.json").exists() for unit in (0, 1)), process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert said.count("error: stopped") == 2, said
    assert "rlfr_cli" not in said.partition("Traceback")[2], "only torchrun itself has a traceback"
    kept = {name: data for name, data in bytes_of(tmp_path).items() if name.startswith("shards/0")}
    options = {"group_size": 32, "problems_per_shard": 1, "problems": problems_of(problems, limit=30)}
    summary = sample.run(sample_config(tiny.policy, problems, tmp_path, **options))
    assert summary["complete"]
    assert kept.items() <= bytes_of(tmp_path).items()
