"""What torchrun and srun tell a process, and the part and GPU that follow."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rlfr_cli import console
from rlfr_cli.cli import app
from rlfr_cli.config.commands import COMMANDS
from rlfr_cli.config.common import ProblemsConfig
from rlfr_cli.config.engine import EngineConfig, EngineName
from rlfr_cli.config.extract_latents import ExtractLatentsConfig, ReadingConfig
from rlfr_cli.config.fields import leaf_options
from rlfr_cli.config.sample import SampleConfig
from rlfr_cli.errors import ConfigError
from rlfr_cli.ranks import Rank, rank_of, take_part

TORCHRUN = {"RANK": "2", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "1"}


def config(**options: Any) -> SampleConfig:
    return SampleConfig(model="m", problems=ProblemsConfig(data="d"), **options)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, None),
        (TORCHRUN, Rank("torchrun", 2, 8, 2)),
        (SRUN, Rank("srun", 5, 6, 1)),
        (SRUN | TORCHRUN, Rank("torchrun", 2, 8, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"} | SRUN, Rank("srun", 5, 6, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Rank("torchrun", 1, 2, None)),
        ({"WORLD_SIZE": "8"}, None),
        ({"RANK": "colonel", "WORLD_SIZE": "8"}, None),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, None),
    ],
)
def test_the_rank_is_what_the_launcher_says(environment: dict[str, str], rank: Rank | None) -> None:
    assert rank_of(environment) == rank


def test_the_batch_script_of_a_job_with_many_tasks_is_one_process() -> None:
    assert rank_of({"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}) is None


@pytest.mark.parametrize(
    ("device", "local", "count", "taken"),
    [
        ("auto", 2, 8, "cuda:2"),
        ("cuda", 2, 8, "cuda:2"),
        ("cuda:5", 2, 8, "cuda:5"),
        ("cpu", 2, 8, "cpu"),
        ("auto", 2, 0, "auto"),
        ("cuda", 2, 0, "cuda"),
        ("auto", 2, 1, "cuda:0"),
        ("auto", None, 8, "auto"),
    ],
)
def test_a_rank_takes_its_part_and_the_gpu_of_its_place_on_the_machine(
    gpus: Any, device: str, local: int | None, count: int, taken: str
) -> None:
    gpus(count)
    shared = take_part(config(device=device), Rank("torchrun", 10, 16, local))
    assert (shared.part, shared.device) == ("11/16", taken)


def test_a_vllm_of_several_gpus_keeps_those_that_its_process_is_shown(gpus: Any) -> None:
    gpus(4)
    engine = EngineConfig(engine=EngineName.VLLM, tensor_parallel_size=2)
    shared = take_part(config(device="cuda", generation=engine), Rank("srun", 1, 2, 1))
    assert (shared.part, shared.device) == ("2/2", "cuda")
    reading = ReadingConfig(engine=EngineName.VLLM, data_parallel_size=2)
    given = ExtractLatentsConfig(model="m", rollouts=Path("r"), device="cuda", reading=reading)
    assert take_part(given, Rank("srun", 1, 2, 1)).device == "cuda"
    assert take_part(dataclasses.replace(given, reading=ReadingConfig()), Rank("srun", 1, 2, 1)).device == "cuda:1"


def test_a_part_that_was_given_wins() -> None:
    given = config(part="1/1")
    assert take_part(given, Rank("torchrun", 2, 8, 2)) is given


def test_four_stages_work_in_parts() -> None:
    in_parts = {
        name for name, command in COMMANDS.items() if ("part",) in {x.path for x in leaf_options(command.config)}
    }
    assert in_parts == {"sample", "extract-latents", "score", "eval"}


def test_a_rank_beyond_the_last_is_refused() -> None:
    with pytest.raises(ConfigError, match="got '9/8'"):
        take_part(config(), Rank("torchrun", 8, 8, None))


@pytest.mark.parametrize(
    ("command", "arguments", "part", "said"),
    [
        ("sample", [], "3/8", "rank 2 of 8 under torchrun: --part 3/8 --device cuda:2\n"),
        ("sample", ["--part", "1/2"], "1/2", ""),
    ],
)
def test_the_command_line_takes_the_part_and_says_so(
    gpus: Any, monkeypatch: pytest.MonkeyPatch, command: str, arguments: list[str], part: str | None, said: str
) -> None:
    gpus(4)
    seen: list[Any] = []

    def run(config: Any) -> dict[str, Any]:
        seen.append(config)
        return {}

    monkeypatch.setitem(sys.modules, COMMANDS[command].stage, types.SimpleNamespace(run=run))
    needed = ["--model", "m", "--data", "d"] if command == "sample" else []
    result = CliRunner().invoke(app, [command, *needed, *arguments, "--json"], env=TORCHRUN)
    assert result.exit_code == 0, result.output
    assert getattr(seen[0], "part", None) == part
    assert result.stderr == said


@pytest.mark.parametrize(("missing", "code"), [([], 0), ([1], 1)])
def test_merge_exits_with_1_and_the_next_step_while_units_are_missing(
    monkeypatch: pytest.MonkeyPatch, missing: list[int], code: int
) -> None:
    from rlfr_cli.stages import merge

    def merged(path: Path, **options: Any) -> dict[str, Any]:
        return {
            "out": str(path),
            "kind": "eval",
            "complete": not missing,
            "units": 3,
            "units_missing": missing,
            "parts_missing": ["2/3"] if missing else [],
        }

    monkeypatch.setattr(merge, "merge", merged)
    result = CliRunner().invoke(app, ["merge", "out", "--json"])
    console.set_quiet(False)
    assert result.exit_code == code
    assert f'"units_missing": {missing}' in result.stdout
    assert ("run `rlfr eval` again with the same options and --part 2/3" in result.stderr) == bool(missing)
    assert ("out is complete: 3 units of eval" in result.stderr) == (not missing)
