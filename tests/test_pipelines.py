"""The pipelines for Qwen2.5-Math and Llama-3.1: recipes, a dry run, and a run end to end on the embedded policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rlfr_cli.config.commands import COMMANDS
from rlfr_cli.config.evaluate import EvalConfig
from rlfr_cli.config.fit_flow import FitFlowConfig
from rlfr_cli.config.recipe import read_recipe, resolve
from rlfr_cli.config.train_rl import TrainRlConfig

PIPELINES = Path(__file__).resolve().parent.parent / "pipelines"
DEPTHS = {"qwen2.5-math-1.5b": 4, "qwen2.5-math-7b": 6, "llama-3.1-8b": 6}
EVALUATIONS = ("math500", "aime24", "aime25", "amc23", "minerva", "olympiad_bench")
GIVEN = {
    "model": {("model",): "m"},
    "data": {("problems", "data"): "d"},
    "expert": {("data",): "e"},
    "flow": {("flow",): "f"},
    "rollouts": {("rollouts",): "r"},
}
# What the script gives each command.
INPUTS = {
    "plan": ("model",),
    "sample": ("model", "data"),
    "extract-latents": ("model", "expert"),
    "fit-flow": ("model", "expert"),
    "score": ("model", "flow", "rollouts"),
    "diagnose": ("model", "flow", "rollouts"),
    "train-rl": ("model", "data", "flow"),
    "eval": ("model", "data"),
}
TRIAL = {
    "GATE": "off",
    "LIMIT": "4",
    "STEPS": "1",
    "FIT_STEPS": "2",
    "EVALUATIONS": "math500",
    "ARMS": "rlfr",
    "EXTRA_SAMPLE": "--max-new-tokens 32 --group-size 2",
    "EXTRA_FIT_FLOW": "--width 16",
    "EXTRA_TRAIN_RL": "--prompts-per-step 2 --group-size 2 --max-new-tokens 32",
    "EXTRA_EVAL": "--max-new-tokens 32",
}


def resolved(recipe: str, command: str) -> object:
    flags = {path: value for name in INPUTS[command] for path, value in GIVEN[name].items()}
    return resolve(
        COMMANDS[command].config, command=command, flags=flags, recipe=PIPELINES / f"{recipe}.toml", preset="paper"
    )


@pytest.mark.parametrize("recipe", DEPTHS)
def test_every_table_of_a_recipe_resolves_with_the_paper_preset(recipe: str) -> None:
    read_recipe(PIPELINES / f"{recipe}.toml")
    tables = set(tomllib.loads((PIPELINES / f"{recipe}.toml").read_text(encoding="utf-8")))
    assert {"sample", "fit-flow", "train-rl", "eval"} <= tables
    for command in COMMANDS:
        assert isinstance(resolved(recipe, command), COMMANDS[command].config)


@pytest.mark.parametrize("recipe", DEPTHS)
def test_the_published_numbers_hold_for_every_recipe(recipe: str) -> None:
    fit, train, evaluation = (resolved(recipe, command) for command in ("fit-flow", "train-rl", "eval"))
    assert isinstance(fit, FitFlowConfig)
    assert isinstance(train, TrainRlConfig)
    assert isinstance(evaluation, EvalConfig)
    assert fit.network.depth == DEPTHS[recipe]
    assert [context.value for context in fit.network.context] == ["next"]
    assert fit.layer_fraction == (0.25, 0.5, 0.75)
    assert (train.rollout.prompts_per_step, train.rollout.group_size, train.rollout.episodes) == (128, 8, 5.0)
    assert (train.sampling.max_new_tokens, train.optimiser.learning_rate) == (1024, 1e-6)
    assert (train.policy_loss.ratio_cap, train.grading.reward) == (3.0, "published")
    assert (evaluation.sampling.temperature, evaluation.sampling.max_new_tokens) == (0.0, 8192)


@pytest.mark.parametrize("script", sorted([*PIPELINES.glob("*.sh"), *PIPELINES.glob("*.slurm")]), ids=lambda p: p.name)
def test_every_script_is_valid_bash(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0


@pytest.fixture
def pipeline_environment(tmp_path: Path, repository: Path) -> dict[str, str]:
    """The embedded policy, problem files of four rows, and this Python as the environment, with nothing to install."""
    data = tmp_path / "data"
    data.mkdir()
    sources = {"math_level3to5": "train", "openr1_math": "expert"} | dict.fromkeys(EVALUATIONS, "heldout")
    for name, source in sources.items():
        lines = (repository / "data" / f"{source}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (data / f"{name}.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    write_program(programs / "python", f'[ "${{2:-}}" = pip ] || exec "{sys.executable}" "$@"')
    write_program(programs / "rlfr", f'exec "{sys.executable}" -c \'from rlfr_cli.cli import main; main()\' "$@"')
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "EXTRA_"))}
    return kept | {
        "RLFR_VENV": str(tmp_path / "venv"),
        "MODEL": str(repository / "data" / "policy"),
        "DATA": str(data),
        "OUT": str(tmp_path / "out"),
        "GPUS": "1",
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
    }


def write_program(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def call(script: str, environment: dict[str, str], folder: Path = PIPELINES.parent) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(PIPELINES / script)], env=environment, cwd=folder, capture_output=True, text=True, timeout=500
    )


def record_commands(environment: dict[str, str], calls: Path) -> None:
    """Make `rlfr` and `srun` and their launchers programs that only write down how they were called."""
    programs = Path(environment["RLFR_VENV"]) / "bin"
    write_program(programs / "rlfr", f'echo "rlfr $*" >> "{calls}"')
    write_program(programs / "srun", f'echo "srun $*" >> "{calls}"')
    write_program(programs / "torchrun", f'echo "torchrun $*" >> "{calls}"')
    write_program(programs / "python", f'[ "${{2:-}}" = pip ] || echo "python $*" >> "{calls}"')
    out = Path(environment["OUT"])
    (out / "rlfr").mkdir(parents=True)
    (out / "rlfr" / "latest").write_text("step-000001", encoding="utf-8")


@pytest.mark.parametrize("missing", ["openr1_math", "minerva"])
def test_a_missing_problem_file_stops_the_pipeline_before_any_stage(
    pipeline_environment: dict[str, str], missing: str
) -> None:
    Path(pipeline_environment["DATA"], f"{missing}.jsonl").unlink()
    done = call("qwen2.5-math-7b.sh", pipeline_environment)
    assert done.returncode == 2
    assert f"no {missing}.jsonl in" in done.stderr
    assert not Path(pipeline_environment["OUT"]).exists()


def test_with_several_gpus_all_stages_but_the_diagnosis_go_through_torchrun(
    pipeline_environment: dict[str, str], tmp_path: Path
) -> None:
    record_commands(pipeline_environment, tmp_path / "calls")
    done = call("qwen2.5-math-1.5b.sh", pipeline_environment | {"GPUS": "4", "ARMS": "rlfr", "EVALUATIONS": "math500"})
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    launched = [line.split(" rlfr ")[1].split()[0] for line in lines if line.startswith("torchrun")]
    alone = [line.split()[1] for line in lines if line.startswith("rlfr")]
    assert launched == ["extract-latents", "fit-flow", "sample", "train-rl", "eval", "eval"]
    assert alone == ["diagnose", "show"]
    assert all("--nproc-per-node 4" in line for line in lines if line.startswith("torchrun"))


def test_the_slurm_script_starts_the_same_stages_by_srun(
    pipeline_environment: dict[str, str], tmp_path: Path, repository: Path
) -> None:
    record_commands(pipeline_environment, tmp_path / "calls")
    slurm = {"RECIPE": "llama-3.1-8b", "SLURM_SUBMIT_DIR": str(repository), "SLURM_NTASKS_PER_NODE": "8"}
    del pipeline_environment["GPUS"]
    done = call("reasoning.slurm", pipeline_environment | slurm | {"ARMS": "rlfr", "EVALUATIONS": "math500"}, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in (tmp_path / "calls").read_text(encoding="utf-8").splitlines() if line.startswith("srun")]
    assert [line.split(" rlfr ")[1].split()[0] for line in lines] == ["fit-flow", "sample", "train-rl", "eval", "eval"]
    assert all("--ntasks-per-node 8" in line and "pipelines/llama-3.1-8b.toml" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", DEPTHS)
def test_a_dry_run_checks_what_it_can_names_what_it_skips_and_writes_nothing(
    pipeline_environment: dict[str, str], recipe: str
) -> None:
    done = call(f"{recipe}.sh", pipeline_environment | {"DRY_RUN": "1", "EVALUATIONS": "aime24"})
    assert done.returncode == 0, done.stderr
    first = "extract-latents" if recipe == "qwen2.5-math-1.5b" else "fit-flow"
    checked = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("rlfr ")]
    assert checked == [first, "sample", "train-rl", "eval"]
    for skipped in ("diagnose", "train-rl (rlfr)", "eval (rlvr)", "eval (rlfr)"):
        assert f"dry run: {skipped} is skipped" in done.stderr
    assert not Path(pipeline_environment["OUT"]).exists()


@pytest.mark.slow
def test_the_7b_pipeline_runs_end_to_end_on_the_embedded_policy(pipeline_environment: dict[str, str]) -> None:
    done = call("qwen2.5-math-7b.sh", pipeline_environment | TRIAL)
    assert done.returncode == 0, done.stderr
    out = Path(pipeline_environment["OUT"])
    assert (out / "rlfr" / "checkpoints" / "step-000001" / "model" / "config.json").exists()
    assert (out / "flow.safetensors").exists()
    assert not (out / "latents").exists(), "the flow is fitted on the fly"
    for name in ("base", "rlfr"):
        assert json.loads((out / "eval" / "math500" / name / "results.json").read_text())["samples"] == 1
    assert "rlfr - base" in done.stdout


@pytest.mark.slow
def test_the_gate_stops_before_training_when_the_diagnosis_cannot_tell(pipeline_environment: dict[str, str]) -> None:
    done = call("qwen2.5-math-7b.sh", pipeline_environment | TRIAL | {"GATE": "on"})
    assert done.returncode == 1
    assert "stopped before training" in done.stderr
    assert not (Path(pipeline_environment["OUT"]) / "rlfr").exists()
