"""`rlfr plan` from the command line and from Python: what it reads, what it prints, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from planning.small_settings import LLAMA, QWEN_7B
from rlfr_cli import console
from rlfr_cli.cli import app
from rlfr_cli.config.plan import PLANNED, PlanConfig
from rlfr_cli.errors import ConfigError, InputError
from rlfr_cli.stages import plan

RECIPE = """
[common]
model = "models/policy"

[common.problems]
data = "problems.jsonl"
limit = 50

[sample]
group_size = 2

[train-rl]
flow = "flow.safetensors"

[train-rl.rollout]
steps = 3
"""


@pytest.fixture(autouse=True)
def _loud():
    yield
    console.set_quiet(False)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model folder with a config.json and nothing else."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN_7B))
    return str(tmp_path / "model")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def stages_of(summary: dict[str, Any]) -> list[str]:
    return [row["stage"] for row in summary["fit"]]


def test_the_command_prints_one_json_object(model: str, recipe: Path) -> None:
    arguments = ["plan", "--model", model, "--config", str(recipe), "--gpus", "8", "--gpu-memory", "80", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["parameters"] == 7_615_616_512
    assert stages_of(summary) == ["sample", "train-rl"]
    phases = [row["phase"] for row in summary["gpu_memory_gb"] if row["stage"] == "train-rl"]
    assert phases == ["generate", "measure", "update", "optimiser step", "flow update"]
    update = next(row for row in summary["gpu_memory_gb"] if row["phase"] == "update")
    parts = ("weights", "casts", "optimiser", "gradients", "activations", "logits", "kv_cache", "latents", "flow")
    assert update["total"] == pytest.approx(sum(update[part] for part in parts))
    assert update["weights"] == pytest.approx(2 * 7.615616512)


def test_people_get_tables_on_stderr(model: str) -> None:
    result = CliRunner().invoke(app, ["plan", "-m", model, "--gpus", "8", "--stage", "train-rl"])
    assert result.exit_code == 0
    assert result.stdout == ""
    for words in ("gpu_memory_gb", "optimiser step", "disk_gb", "hours", "--gradient-checkpointing", "(guesses)"):
        assert words in result.stderr


def test_only_what_the_recipe_names_is_planned_and_all_without_one(model: str, recipe: Path, tmp_path: Path) -> None:
    config = PlanConfig(model=model)
    assert stages_of(plan.run(config)) == list(PLANNED)
    assert stages_of(plan.run(config, recipe=recipe)) == ["sample", "train-rl"]
    common = tmp_path / "common.toml"
    common.write_text("[common]\nseed = 3\n")
    assert stages_of(plan.run(config, recipe=common)) == list(PLANNED)
    assert stages_of(plan.run(PlanConfig(model=model, stage=("eval",)), recipe=recipe)) == ["eval"]


def test_the_recipes_numbers_count(model: str, recipe: Path) -> None:
    work = {row["stage"]: row for row in plan.run(PlanConfig(model=model), recipe=recipe)["work"]}
    assert work["sample"]["million_tokens"] == 50 * 2 * 1024 / 1e6
    assert work["train-rl"]["million_tokens"] == 3 * 128 * 8 * 1024 / 1e6
    half = plan.run(PlanConfig(model=model, response_tokens=512), recipe=recipe)["work"]
    assert half[0]["million_tokens"] == work["sample"]["million_tokens"] / 2


def test_a_recipe_may_hold_options_of_plan_and_presets_count(model: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(f"[plan]\nmodel = '{model}'\ngpus = 4\nzero = 3\n[train-rl]\n")
    result = CliRunner().invoke(app, ["plan", "-c", str(path), "--preset", "paper", "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert stages_of(summary) == ["train-rl"]
    assert any("ZeRO stage 3" in row["assumption"] for row in summary["assumptions"])
    assert summary["work"][0]["gpus"] == 4


def test_hours_follow_the_machine(model: str) -> None:
    def hours(**options: Any) -> float:
        return plan.run(PlanConfig(model=model, stage=("extract-latents",), **options))["work"][0]["hours"]

    once = hours()
    assert hours(gpus=4) == pytest.approx(once / 4)
    assert hours(gpu_flops=2 * 989) == pytest.approx(once / 2)
    assert hours(utilisation=0.2) == pytest.approx(2 * once)


def test_generation_reaches_more_with_vllm_or_as_said(model: str) -> None:
    def hours(**options: Any) -> float:
        return plan.run(PlanConfig(model=model, stage=("sample",), **options))["work"][0]["hours"]

    assert hours() == pytest.approx(10 * hours(engine="vllm"))
    assert hours(generation_utilisation=0.5) == pytest.approx(hours(engine="vllm") / 5)


def test_what_does_not_fit_is_said_with_a_way_out(model: str) -> None:
    config = PlanConfig(model=model, gpus=8, stage=("train-rl", "extract-latents"), disk=100)
    rows = {row["stage"]: row for row in plan.run(config, preset="paper")["fit"]}
    assert rows["train-rl"]["fits"] is False
    assert rows["train-rl"]["would_fit_with"].startswith("--gradient-checkpointing: update takes ")
    assert rows["extract-latents"]["needs"].endswith("of 100 GB of disk")
    assert rows["extract-latents"]["would_fit_with"].startswith("for the disk: fit-flow --model")
    roomy = plan.run(PlanConfig(model=model, gpus=8, gpu_memory=500, disk=10**6), preset="paper")["fit"]
    assert all(row["fits"] and row["would_fit_with"] is None for row in roomy)


def test_what_the_process_takes_is_set_apart(model: str) -> None:
    def fits(**options: Any) -> bool:
        config = PlanConfig(model=model, stage=("sample",), gpu_memory=18, **options)
        return plan.run(config)["fit"][0]["fits"]

    assert fits(process_memory=1)
    assert not fits(process_memory=3)


def test_inputs_of_the_recipe_are_not_opened(model: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("[extract-latents]\nrollouts = 'nowhere'\n[score]\nlatents = 'nowhere'\nflow = 'nowhere'\n")
    assert stages_of(plan.run(PlanConfig(model=model), recipe=path)) == ["extract-latents", "score"]


def test_an_unknown_family_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"model_type": "new"}))
    plan.run(PlanConfig(model=str(tmp_path), stage=("sample",)))
    assert "a new model is counted as if its blocks were those of a llama" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero": 0, "offload_optimiser": True}, "--offload-optimiser"),
        ({"engine": "hf", "tensor_parallel": 2}, "tensor-parallel-size"),
    ],
)
def test_layouts_that_contradict_each_other_are_refused(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan.run(PlanConfig(model=model, **options))


def test_bad_input_ends_with_2(model: str, tmp_path: Path) -> None:
    nothing = CliRunner().invoke(app, ["plan", "--model", str(tmp_path / "nothing")])
    assert (nothing.exit_code, nothing.stdout) == (2, "")
    assert "no config.json there" in nothing.stderr
    stage = CliRunner().invoke(app, ["plan", "--model", model, "--stage", "diagnose"])
    assert stage.exit_code == 2
    assert "--stage must be one of sample" in stage.stderr
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="model_type"):
        plan.run(PlanConfig(model=str(tmp_path)))
