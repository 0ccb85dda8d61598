"""`fit-flow` in several processes (gloo): what one process gives, stopped, killed and gone on with."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engines.launching import processes_environment
from rlfr_cli.config.fit_flow import FitFlowConfig
from rlfr_cli.errors import Stopped
from rlfr_cli.flow.flow import Flow
from rlfr_cli.stages import fit_flow, fitting
from rlfr_cli.stages.flows import load_flow, new_flow
from stages.fit_ranks_script import KILLED, STEPS_BEFORE_THE_END, fits
from stages.tiny_stages import TinyArtifacts, interrupt_after

SCRIPT = Path(__file__).parent / "fit_ranks_script.py"
CPU = torch.device("cpu")


def in_processes(count: int, tiny: TinyArtifacts, out: Path, *tasks: str) -> list[tuple[int, str]]:
    """Exit code and standard error of each process, without a launcher that would end the others."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    shared = {**processes_environment(), "NO_COLOR": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    given = [tiny.policy, tiny.rollouts, tiny.latents, out, *tasks]
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, given)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        return [(process.returncode, error) for process in processes for error in [process.communicate(timeout=240)[1]]]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def fits_of(tiny: TinyArtifacts, out: Path) -> dict[str, FitFlowConfig]:
    return fits(tiny.policy, tiny.rollouts, tiny.latents, out)


@pytest.fixture(scope="module")
def alone(tiny: TinyArtifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All fits of the script in one process."""
    out = tmp_path_factory.mktemp("alone")
    for config in fits_of(tiny, out).values():
        fit_flow.run(config)
    return out


def metrics_of(fit: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (fit / "flow.fit" / "metrics.jsonl").read_text().splitlines()]


def last_step(fit: Path) -> int:
    return max(line["step"] for line in metrics_of(fit))


def weights_of(flow: Flow) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in flow.network.parameters()])


def assert_same_fit(ours: Path, theirs: Path, name: str) -> None:
    """Statistics to 1e-6, losses to 1e-5, weights to 1e-4 of the update, and the same facts."""
    mine, other = ours / name / "flow.fit", theirs / name / "flow.fit"
    assert (mine / "stage.json").read_bytes() == (other / "stage.json").read_bytes()
    for key, values in load_file(other / "statistics.safetensors").items():
        torch.testing.assert_close(load_file(mine / "statistics.safetensors")[key], values, rtol=1e-6, atol=1e-6)
    logged = metrics_of(ours / name)
    assert len(logged) >= 3
    for line, wanted_line in zip(logged, metrics_of(theirs / name), strict=True):
        assert line == pytest.approx(wanted_line, rel=1e-5)
    for file in (f"{name}/flow.safetensors", f"{name}/flow.fit/last.safetensors"):
        (header, flow), (wanted, wanted_flow) = (load_flow(folder / file, CPU) for folder in (ours, theirs))
        assert (header.steps, header.tokens_seen) == (wanted.steps, wanted.tokens_seen)
        weights, wanted_weights, begin = map(weights_of, (flow, wanted_flow, new_flow(header, 0, CPU)))
        assert (weights - wanted_weights).norm() <= 1e-4 * (wanted_weights - begin).norm()
        assert (header.steps == 0) == torch.equal(weights, begin)
    judged, wanted_judged = (json.loads((folder / "evaluation.json").read_text()) for folder in (mine, other))
    assert judged["best_step"] == wanted_judged["best_step"]
    for row, wanted_row in zip(judged["velocity_error"], wanted_judged["velocity_error"], strict=True):
        assert row == pytest.approx(wanted_row, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_two_processes_fit_as_one_does_and_one_goes_on_where_they_were_stopped(
    tiny: TinyArtifacts, alone: Path, tmp_path: Path
) -> None:
    """Steps that do not divide, a rank without a sequence, latents on the fly; SIGTERM reaches rank 1 alone."""
    (code, said), (other_code, other_said) = in_processes(2, tiny, tmp_path, "single", "live", "stop:uneven")
    assert (code, other_code) == (0, 0), said + other_said
    for name in ("single", "live"):
        assert_same_fit(tmp_path, alone, name)
    assert "rank 0: stopped; the state of the last evaluation is kept" in said
    assert said.count("fitting a flow of") == 3
    assert other_said == ""
    assert last_step(tmp_path / "uneven") == STEPS_BEFORE_THE_END
    fit_flow.run(fits_of(tiny, tmp_path)["uneven"])
    assert_same_fit(tmp_path, alone, "uneven")


@pytest.mark.slow
def test_four_processes_go_on_where_one_was_stopped(
    tiny: TinyArtifacts, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, fitting.Fit, "_train_step", STEPS_BEFORE_THE_END)
        with pytest.raises(Stopped):
            fit_flow.run(fits_of(tiny, tmp_path)["uneven"])
    for code, error in in_processes(4, tiny, tmp_path, "uneven", "single"):
        assert code == 0, error
    for name in ("uneven", "single"):
        assert_same_fit(tmp_path, alone, name)


@pytest.mark.slow
def test_a_killed_rank_ends_the_other_within_seconds_and_nothing_is_lost_or_counted_twice(
    tiny: TinyArtifacts, alone: Path, tmp_path: Path
) -> None:
    (code, said), (other_code, _) = in_processes(2, tiny, tmp_path, "kill:uneven")
    assert (code, other_code) == (1, -9)
    assert "rank 1 of 2 has ended before its work was done" in said
    assert time.time() - (tmp_path / KILLED).stat().st_mtime < 30
    assert last_step(tmp_path / "uneven") == STEPS_BEFORE_THE_END
    fit_flow.run(fits_of(tiny, tmp_path)["uneven"])
    assert_same_fit(tmp_path, alone, "uneven")
