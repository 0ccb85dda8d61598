"""DeepSpeed in 1, 2 and 4 processes: the same training as one process, the same files, and one step skipped by all.

Two launches do most tasks, since starting a process takes longer than training in it.
"""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from engines.deepspeed_script import Task, train, weights_of
from engines.launching import (
    Reference,
    Results,
    assert_same_steps,
    assert_same_update,
    launch,
    launch_well,
    make_reference,
    single_engine,
)
from rlfr_cli.engines.ranks import ALONE
from tiny_policies import ModelFolders

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed (tests/engines/install_deepspeed.sh)",
    ),
]

STAGES = [1, 2, 3]
# Tiny weights are split all the same, and passes gather them as large ones.
SPLIT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def settings_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("settings") / "deepspeed.json"
    path.write_text(json.dumps(SPLIT_ALL))
    return str(path)


@pytest.fixture(scope="module")
def tied(model_folders: ModelFolders, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Output head and embeddings share their weights; projections have biases."""
    return make_reference(model_folders.folder("qwen2", tied=True), tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def untied(model_folders: ModelFolders, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(model_folders.folder("llama", tied=False), tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def two(
    model_folders: ModelFolders,
    tied: Reference,
    untied: Reference,
    settings_file: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Results:
    """Everything that two processes do."""
    folder = tmp_path_factory.mktemp("two")
    tied_model = str(model_folders.folder("qwen2", tied=True))
    untied_model = str(model_folders.folder("llama", tied=False))

    def task(name: str, stage: int, model: str = tied_model, engine: dict[str, Any] | None = None, **rest: Any) -> Task:
        options = {"zero_stage": stage, "deepspeed_config": settings_file, **(engine or {})}
        return Task(name=f"{name}{stage}", model=model, engine=options, **rest)

    tasks = []
    for stage in STAGES:
        tasks += [
            task("trained", stage, save=str(folder / f"saved{stage}"), whole_policy=True),
            task("loaded", stage, str(tied.folder / "model"), load=str(tied.folder / "trainer"), steps=(4, 4)),
            task("nan", stage, spoil="nan"),
            task("inf", stage, spoil="inf", steps=(1, 0)),
            task(
                "bfloat16_",
                stage,
                untied_model,
                bfloat16=True,
                stored="bfloat16",
                rate=1e-6,
                save=str(folder / f"bfloat16_saved{stage}"),
                whole_policy=True,
            ),
            task("offloaded", stage, untied_model, {"offload_optimiser": True}, spoil="nan", whole_policy=True),
        ]
    tasks += [
        task("chunks", 3, untied_model, chunk_elements=400, whole_policy=True),
        task("checkpointing", 3, untied_model, chunk_elements=400, checkpointing=True),
        task("parameters", 3, untied_model, {"offload_optimiser": True, "offload_parameters": True}),
        task("float32_originals", 3, bfloat16=True, stored="float32", steps=(1, 0)),
        task("resumed", 1, str(folder / "saved3/model"), load=str(folder / "saved3/trainer"), steps=(4, 4)),
    ]
    model, trainer = (str(folder / "bfloat16_saved2" / name) for name in ("model", "trainer"))
    tasks.append(
        task("bfloat16_resumed", 3, model, load=trainer, bfloat16=True, stored="bfloat16", rate=1e-6, steps=(4, 4))
    )
    return launch_well(folder, tasks, 2)


# Steps


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one(stage: int, two: Results, tied: Reference) -> None:
    assert_same_steps(two.told(f"trained{stage}")["steps"], tied.steps)
    assert_same_update(two.weights(f"trained{stage}"), tied.third, tied.first)


@pytest.mark.slow
def test_four_processes_train_as_one(
    model_folders: ModelFolders, tied: Reference, settings_file: str, tmp_path: Path
) -> None:
    engine = {"zero_stage": 3, "deepspeed_config": settings_file}
    task = Task(name="four", model=str(model_folders.folder("qwen2", tied=True)), engine=engine, whole_policy=True)
    four = launch_well(tmp_path, [task], 4)
    assert_same_steps(four.told("four")["steps"], tied.steps)
    assert_same_update(four.weights("four"), tied.third, tied.first)


def test_one_process_offloads_without_a_launcher(model_folders: ModelFolders, tied: Reference, tmp_path: Path) -> None:
    model = str(model_folders.folder("qwen2", tied=True))
    one = launch_well(tmp_path, [Task(name="one", model=model, engine={"offload_optimiser": True})], 1)
    assert_same_steps(one.told("one")["steps"], tied.steps)
    assert_same_update(one.weights("one"), tied.third, tied.first)


@pytest.mark.parametrize("name", ["offloaded1", "offloaded2", "offloaded3", "parameters3"])
def test_offloading_changes_no_number(name: str, two: Results, untied: Reference) -> None:
    assert_same_steps(two.told(name)["steps"], untied.steps)
    assert_same_update(two.weights(name), untied.third, untied.first)


@pytest.mark.parametrize("name", ["chunks3", "checkpointing3"])
def test_ranks_may_run_the_output_head_unequally_often(name: str, two: Results, untied: Reference) -> None:
    """Three tokens a chunk: ranks have different numbers of chunks, an idle one has one."""
    assert_same_steps(two.told(name)["steps"], untied.steps)
    assert_same_update(two.weights(name), untied.third, untied.first)


@pytest.mark.parametrize("name", ["nan", "inf", "offloaded"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_of_one_rank_that_is_not_finite_skips_one_step_of_all(stage: int, name: str, two: Results) -> None:
    assert [step["stepped"] for step in two.told(f"{name}{stage}")["spoiled"]] == [False]
    before = two.weights(f"{name}{stage}", ".before")
    assert all(torch.equal(weight, before[key]) for key, weight in two.weights(f"{name}{stage}", ".spoiled").items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_step_leaves_nothing_behind(stage: int, two: Results, tied: Reference) -> None:
    assert_same_steps(two.told(f"nan{stage}")["steps"], tied.steps)
    assert_same_update(two.weights(f"nan{stage}"), tied.third, tied.first)


# bfloat16 compute


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_compute_steps_float32_weights(stage: int, two: Results) -> None:
    """At 1e-6 a bfloat16 weight would not move."""
    assert two.told(f"bfloat16_{stage}")["parameter_dtypes"] == ["torch.bfloat16"]
    before, after = two.weights(f"bfloat16_{stage}", ".before"), two.weights(f"bfloat16_{stage}")
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    read = [name for name in after if "embed_tokens" not in name]  # whose rows of other tokens have no gradient
    whole_before = torch.cat([before[name].flatten() for name in read])
    whole_after = torch.cat([after[name].flatten() for name in read])
    assert float((whole_after != whole_before).float().mean()) > 0.99
    assert float((whole_after.bfloat16() != whole_before.bfloat16()).float().mean()) < 0.05


def test_stages_agree_in_bfloat16(two: Results) -> None:
    start, theirs = two.weights("bfloat16_1", ".before"), two.weights("bfloat16_1")
    for stage in (2, 3):
        assert_same_update(two.weights(f"bfloat16_{stage}"), theirs, start)


def test_float32_weights_are_not_rounded_for_bfloat16_compute(two: Results, tied: Reference) -> None:
    kept = two.weights("float32_originals3")
    assert all(torch.equal(weight, tied.first[name]) for name, weight in kept.items())


# Whole policy


@pytest.mark.parametrize("name", ["trained1", "trained2", "trained3"])
def test_each_rank_runs_the_whole_policy_by_itself(name: str, two: Results, tied: Reference) -> None:
    """One pass on the first rank and three on the second, and training goes on as if there had been none."""
    logits = two.weights(name, ".logits")
    assert set(logits) == {"0", "1"}
    for found in logits.values():
        torch.testing.assert_close(found, tied.logits, rtol=1e-4, atol=1e-5)
    assert_same_steps(two.told(name)["after"], [tied.fourth_step])
    assert_same_update(two.weights(name, ".after"), tied.fourth, tied.third)


# Checkpoints


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_goes_on_from_two(stage: int, two: Results, tied: Reference) -> None:
    saved = two.folder / f"saved{stage}"
    engine = single_engine(saved / "model")
    engine.load(saved / "trainer")
    assert_same_update(weights_of(engine), tied.third, tied.first)
    assert_same_steps(train(engine, ALONE, (4, 4)), [tied.fourth_step])
    assert_same_update(weights_of(engine), tied.fourth, tied.third)


@pytest.mark.parametrize("name", ["loaded1", "loaded2", "loaded3", "resumed1"])
def test_two_processes_go_on_from_one_and_from_another_stage(name: str, two: Results, tied: Reference) -> None:
    assert_same_update(two.weights(name, ".before"), tied.third, tied.first)
    assert_same_steps(two.told(name)["steps"], [tied.fourth_step])
    assert_same_update(two.weights(name), tied.fourth, tied.third)


def test_a_bfloat16_run_goes_on_in_another_stage_as_if_unbroken(two: Results) -> None:
    third, fourth = two.weights("bfloat16_2"), two.weights("bfloat16_2", ".after")
    assert all(torch.equal(weight, third[name]) for name, weight in two.weights("bfloat16_resumed3", ".before").items())
    assert_same_update(two.weights("bfloat16_resumed3"), fourth, third)


@pytest.mark.parametrize("stage", STAGES)
def test_files_are_those_of_the_single_process_engine(stage: int, two: Results, tied: Reference) -> None:
    ours, theirs = two.folder / f"saved{stage}" / "trainer", tied.folder / "trainer"
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    state, expected = load_file(ours / "optimiser.safetensors"), load_file(theirs / "optimiser.safetensors")
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_the_model_folder_is_a_plain_one(stage: int, two: Results, tied: Reference) -> None:
    folder = two.folder / f"saved{stage}" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    weights = two.weights(f"trained{stage}")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in (tied.folder / "model").iterdir()}
    assert load_file(folder / "model.safetensors").keys() == load_file(tied.folder / "model/model.safetensors").keys()


def test_a_bfloat16_folder_keeps_float32_weights_beside_it(two: Results) -> None:
    saved, weights = two.folder / "bfloat16_saved3", two.weights("bfloat16_3")
    kept, stored = load_file(saved / "trainer/weights.safetensors"), load_file(saved / "model/model.safetensors")
    assert all(torch.equal(kept[name], weight) for name, weight in weights.items())
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(weight, weights[name].bfloat16()) for name, weight in stored.items())
    assert json.loads((saved / "model/config.json").read_text())["dtype"] == "bfloat16"


# A process that dies


def test_a_killed_process_ends_the_job(model_folders: ModelFolders, tmp_path: Path) -> None:
    model = str(model_folders.folder("qwen2", tied=True))
    task = Task(name="killed", model=model, engine={"zero_stage": 3}, steps=(1, 1), dies=1)
    started = time.monotonic()
    done = launch(tmp_path, [task, replace(task, name="never")], 2)
    assert time.monotonic() - started < 60
    assert done.returncode != 0
    assert "rank 1 of 2 has ended before its work was done" in done.stderr
    assert (tmp_path / "killed.json").exists()
    assert not (tmp_path / "never.json").exists()
