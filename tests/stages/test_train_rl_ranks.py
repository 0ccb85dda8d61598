"""`train-rl` in several processes (plain PyTorch, gloo): what one process gives, and one flow on all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlfr_cli.artifacts.flow_file import read_flow
from rlfr_cli.artifacts.rollouts import iter_rollouts
from stages.tiny_stages import TinyArtifacts, bytes_of, rows_of_metrics

SCRIPT = Path(__file__).parent / "ranks_script.py"


def train(tiny: TinyArtifacts, out: Path, processes: int, steps: int = 2, **options: Any) -> str:
    """A run in so many processes; returns what they said."""
    with begin(tiny, out, processes, steps, **options) as started:
        said = started.communicate(timeout=280)[1]
    assert started.returncode == 0, said[-3000:]
    return said


def begin(tiny: TinyArtifacts, out: Path, processes: int, steps: int, **options: Any) -> subprocess.Popen[str]:
    """A run in so many processes, each of which writes its number into ``OUT.pid-RANK``."""
    command = [sys.executable, str(SCRIPT)]
    if processes > 1:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
        command = [sys.executable, *launcher, str(SCRIPT)]
        options = {**options, "training": {"zero_stage": 0, **options.get("training", {})}}
    given = [tiny.policy, tiny.problems, tiny.flow, out, steps, json.dumps(options)]
    return subprocess.Popen(
        [*command, *map(str, given)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "model" / "model.safetensors")


def assert_same_training(one: Path, two: Path, base: Path, step: int) -> None:
    """Losses to 1e-5, weights to 1e-4 of the update, and the same responses in the same order."""
    for mine, theirs in zip(rows_of_metrics(one), rows_of_metrics(two), strict=True):
        for name in ("policy/loss", "policy/gradient_norm", "rollout/reward", "advantage/std", "policy/ratio_max"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    a, b, start = weights_of(one, step), weights_of(two, step), load_file(base / "model.safetensors")
    update = sum(float((a[name] - start[name].float()).square().sum()) for name in a) ** 0.5
    gap = sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5
    assert update > 0
    assert gap <= 1e-4 * update, gap / update
    for number in range(1, step + 1):
        rows = [list(iter_rollouts(run / "rollouts" / f"step-{number:06d}")) for run in (one, two)]
        assert [row.response_token_ids for row in rows[0]] == [row.response_token_ids for row in rows[1]]
        for mine, theirs in zip(*rows, strict=True):
            assert mine.advantage == pytest.approx(theirs.advantage, abs=1e-4)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tiny: TinyArtifacts, tmp_path: Path) -> None:
    """Three groups over two processes, minibatches that cut across them, and whitening over both."""
    options = {"policy_loss": {"estimator": "reinforce-baseline"}}
    said = [train(tiny, tmp_path / str(count), count, **options) for count in (1, 2)]
    assert_same_training(tmp_path / "1", tmp_path / "2", tiny.policy, 2)
    # Rank 0 speaks for both.
    assert said[1].count("training for 2 steps") == 1
    # A resumed run may have another number of processes.
    train(tiny, tmp_path / "2", 1, steps=3, resume=True, **options)
    train(tiny, tmp_path / "1", 1, steps=3, resume=True, **options)
    assert_same_training(tmp_path / "1", tmp_path / "2", tiny.policy, 3)


@pytest.mark.slow
def test_two_processes_train_adapters_as_one_does(tiny: TinyArtifacts, tmp_path: Path) -> None:
    """And two go on from one, and one from two: a checkpoint holds the same."""
    options = {"lora": {"rank": 4}}
    for count in (1, 2):
        train(tiny, tmp_path / str(count), count, **options)
    assert_same_training(tmp_path / "1", tmp_path / "2", tiny.policy, 2)
    for count in (1, 2):
        train(tiny, tmp_path / str(count), 3 - count, steps=3, resume=True, **options)
    assert_same_training(tmp_path / "1", tmp_path / "2", tiny.policy, 3)


@pytest.mark.slow
def test_the_flow_learns_from_the_accepted_responses_of_all_processes(tiny: TinyArtifacts, tmp_path: Path) -> None:
    """A run itself checks after each update that all processes hold the same flow.

    The first step learns from the accepted responses alone, in the order of the problems however they are shared out;
    the second from a buffer too, which each process has of its own responses.
    """
    options: dict[str, Any] = {"online": {"online_steps": 1, "buffer_responses": 4}}
    for count in (1, 2):
        train(tiny, tmp_path / str(count), count, **options)
    one, two = (rows_of_metrics(tmp_path / str(count)) for count in (1, 2))
    assert [line["flow/accepted_fraction"] for line in one] == [line["flow/accepted_fraction"] for line in two]
    for name in ("flow/loss", "flow/gradient_norm"):
        assert one[0][name] == pytest.approx(two[0][name], rel=1e-5)
    # In another order a token meets another noise, which is averaged over a few hundred tokens.
    assert one[1]["flow/loss"] == pytest.approx(two[1]["flow/loss"], rel=0.15)
    before = read_flow(tiny.flow)[1]
    after = read_flow(tmp_path / "2" / "checkpoints" / "step-000002" / "flow.safetensors")[1]
    assert any(not torch.equal(after[name], before[name]) for name in before)


def kill_one_and_go_on(tiny: TinyArtifacts, folder: Path, dead: int, **options: Any) -> None:
    """Kill a rank between checkpoints: all end within a minute and say which, and a resumed run is the whole one."""
    options = {"run": {"save_every": 2}, "online": {"online_steps": 1}, **options}
    broken, whole = folder / "broken", folder / "whole"
    with begin(tiny, broken, 2, 4, **options) as started:
        try:
            wait_for_steps(broken, 3, started)
            os.kill(int(Path(f"{broken}.pid-{dead}").read_text()), signal.SIGKILL)
            said = started.communicate(timeout=60)[1]
        finally:
            started.kill()
    assert started.returncode == 1
    assert f"rank {dead} of 2 has ended before its work was done" in said
    assert "--resume" in said
    assert rows_of_metrics(broken)[-1]["step"] == 3  # one step past the checkpoint, to be done again
    train(tiny, broken, 2, 4, resume=True, **options)
    train(tiny, whole, 2, 4, **options)
    assert [line["step"] for line in rows_of_metrics(broken)] == [1, 2, 3, 4]
    assert bytes_of(broken / "rollouts") == bytes_of(whole / "rollouts")
    for name in ("model", "flow.safetensors", "trainer"):
        last = [run / "checkpoints" / "step-000004" / name for run in (broken, whole)]
        assert bytes_of(last[0]) == bytes_of(last[1]), name


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen[str]) -> None:
    """Until so many steps are in the metrics."""
    file = run / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not file.exists() or file.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_nothing_is_lost_or_counted_twice(
    tiny: TinyArtifacts, tmp_path: Path
) -> None:
    kill_one_and_go_on(tiny, tmp_path, dead=1)


@pytest.mark.slow
def test_dynamic_sampling_counts_the_groups_of_all_processes(tiny: TinyArtifacts, tmp_path: Path) -> None:
    rollout = {"dynamic_sampling": True, "max_sampling_rounds": 3, "uniform_groups": "drop"}
    for count in (1, 2):
        train(tiny, tmp_path / str(count), count, steps=1, rollout=rollout)
    one, two = (rows_of_metrics(tmp_path / str(count))[0] for count in (1, 2))
    for name in ("rollout/responses", "rollout/sampling_rounds", "rollout/trained_fraction", "rollout/reward"):
        assert one[name] == two[name]


@pytest.mark.engines
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_as_one_process_does(stage: int, rank: int, tiny: TinyArtifacts, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; tests/run.sh --engines installs it")
    train(tiny, tmp_path / "1", 1, lora={"rank": rank})
    train(tiny, tmp_path / "2", 2, lora={"rank": rank}, training={"zero_stage": stage})
    assert_same_training(tmp_path / "1", tmp_path / "2", tiny.policy, 2)


@pytest.mark.engines
def test_a_killed_first_process_of_deepspeed_ends_the_run_and_nothing_is_lost(
    tiny: TinyArtifacts, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; tests/run.sh --engines installs it")
    kill_one_and_go_on(tiny, tmp_path, dead=0, training={"zero_stage": 2})


@pytest.mark.engines
def test_a_run_goes_on_in_another_stage_with_four_processes(tiny: TinyArtifacts, tmp_path: Path) -> None:
    """One step in ZeRO 3 with two processes, one in ZeRO 2 with four of which one has nothing, one in plain PyTorch."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; tests/run.sh --engines installs it")
    rollout = {"prompts_per_step": 4}
    for processes, stage, steps in ((2, 3, 1), (4, 2, 2), (1, 0, 3)):
        resume = steps > 1
        train(tiny, tmp_path / "many", processes, steps, training={"zero_stage": stage}, rollout=rollout, resume=resume)
        train(tiny, tmp_path / "one", 1, steps, rollout=rollout, resume=resume)
    assert_same_training(tmp_path / "one", tmp_path / "many", tiny.policy, 3)
