"""Adapters in the training engines: the base stays, adapters move the right way, and every engine goes on from any."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engines.deepspeed_script import Task, policy_to_train, train, weights_of
from engines.launching import (
    Reference,
    Results,
    assert_same_steps,
    assert_same_update,
    launch_well,
    make_reference,
    single_engine,
)
from rlfr_cli.engines.ranks import ALONE
from rlfr_cli.engines.single import SingleProcessEngine
from rlfr_cli.policy.forward import response_logprobs
from rlfr_cli.policy.loading import Placement
from tiny_policies import CPU, CPU_BF16, ModelFolders, random_sequences

RANK = 3
STAGES = [1, 2, 3]
SEQUENCES = random_sequences([(4, 6), (3, 9)])
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed (tests/engines/install_deepspeed.sh)",
)


def make_engine(model: Path, placement: Placement = CPU, **options: Any) -> SingleProcessEngine:
    return SingleProcessEngine(
        policy_to_train(model, placement, RANK),
        **{
            "stored_dtype": torch.float32,
            "betas": (0.9, 0.95),
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            **options,
        },
    )


def own_weights(engine: SingleProcessEngine) -> dict[str, Tensor]:
    named = engine.policy.model.named_parameters()
    return {name: weight.detach().clone() for name, weight in named if not weight.requires_grad}


def step(engine: SingleProcessEngine, advantage: float, rate: float = 1e-2) -> None:
    """Raise or lower the log-probabilities of the first sequence."""
    logprobs, _ = engine.run(lambda: response_logprobs(engine.policy, SEQUENCES[:1], 1.0))
    engine.backward(-(advantage * logprobs).mean())
    assert engine.step(rate).stepped


@torch.no_grad()
def logprob(engine: SingleProcessEngine) -> float:
    return float(response_logprobs(engine.policy, SEQUENCES[:1], 1.0)[0].sum())


# One process


@pytest.mark.parametrize("placement", [CPU, CPU_BF16])
def test_steps_leave_every_bit_of_the_base_and_move_the_adapters(
    placement: Placement, model_folders: ModelFolders
) -> None:
    engine = make_engine(model_folders.folder("qwen2"), placement)
    before, adapters = own_weights(engine), {n: p.detach().clone() for n, p in engine.optimiser.parameters.items()}
    assert {weight.dtype for weight in before.values()} == {placement.dtype}
    assert {weight.dtype for weight in adapters.values()} == {torch.float32}
    for _ in range(2):
        step(engine, 1.0)
    assert all(torch.equal(weight, before[name]) for name, weight in own_weights(engine).items())
    assert not any(torch.equal(weight, adapters[name]) for name, weight in engine.optimiser.parameters.items())


@pytest.mark.parametrize("placement", [CPU, CPU_BF16])
def test_a_positive_advantage_raises_a_responses_probability_and_a_negative_one_lowers_it(
    placement: Placement, model_folders: ModelFolders
) -> None:
    for advantage in (1.0, -1.0):
        engine = make_engine(model_folders.folder("llama"), placement)
        before = logprob(engine)
        step(engine, advantage)
        assert (logprob(engine) - before) * advantage > 0.1


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "phi3"])
def test_gradients_reach_every_adapter_through_checkpointing(family: str, model_folders: ModelFolders) -> None:
    found = []
    for checkpointing in (False, True):
        engine = make_engine(model_folders.folder(family), gradient_checkpointing=checkpointing)
        step(engine, 1.0)  # before it, no gradient goes through B, which is zero, to A
        engine.policy.model.train()
        engine.backward(response_logprobs(engine.policy, SEQUENCES, 1.0)[0].sum())
        found.append({name: weight.grad for name, weight in engine.optimiser.parameters.items()})
    for name, gradient in found[0].items():
        assert float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("placement", [CPU, CPU_BF16])
def test_a_saved_and_loaded_run_equals_one_that_went_on(
    placement: Placement, model_folders: ModelFolders, tmp_path: Path
) -> None:
    folder = model_folders.folder("llama", tied=False)
    whole = make_engine(folder, placement)
    step(whole, 1.0)
    whole.save(tmp_path / "model", tmp_path / "trainer")
    assert not (tmp_path / "model").exists()
    resumed = make_engine(folder, placement)
    resumed.load(tmp_path / "trainer")
    for engine in (whole, resumed):
        step(engine, -1.0)
    mine, theirs = weights_of(resumed), weights_of(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_named_weights_are_those_of_a_plain_checkpoint(model_folders: ModelFolders) -> None:
    """W + alpha / rank B A under the base model's names, and the base itself before the first step."""
    folder = model_folders.folder("qwen2", tied=True)
    base = load_file(folder / "model.safetensors")
    engine = make_engine(folder)
    assert all(torch.equal(weight, base[name]) for name, weight in weights_of(engine).items())
    step(engine, 1.0)
    named = weights_of(engine)
    assert named.keys() == base.keys()
    layer = "model.layers.1.mlp.up_proj"
    a, b = (engine.optimiser.parameters[f"{layer}.lora_{matrix}.default.weight"] for matrix in "AB")
    torch.testing.assert_close(named[f"{layer}.weight"], base[f"{layer}.weight"] + 2 * (b @ a))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert torch.equal(named[name], base[name])


# Several processes


@pytest.fixture(scope="module")
def model(model_folders: ModelFolders) -> Path:
    return model_folders.folder("llama", tied=False)


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(model, tmp_path_factory.mktemp("reference"), RANK)


def tasks_of(model: Path, reference: Reference, folder: Path, engine: dict[str, Any], name: str) -> list[Task]:
    """Training from the start, and from what one process has saved."""
    common: dict[str, Any] = {"model": str(model), "engine": engine, "lora_rank": RANK}
    return [
        Task(name=f"trained{name}", save=str(folder / f"saved{name}"), whole_policy=True, **common),
        Task(name=f"loaded{name}", load=str(reference.folder / "trainer"), steps=(4, 4), **common),
    ]


def assert_trained_as_one(results: Results, name: str, model: Path, reference: Reference) -> None:
    """Steps, weights, the whole policy on each rank, and files; one process goes on from them."""
    assert_same_steps(results.told(f"trained{name}")["steps"], reference.steps)
    assert_same_update(results.weights(f"trained{name}"), reference.third, reference.first)
    for logits in results.weights(f"trained{name}", ".logits").values():
        torch.testing.assert_close(logits, reference.logits, rtol=1e-4, atol=1e-5)
    assert_same_update(results.weights(f"trained{name}", ".after"), reference.fourth, reference.third)
    assert_same_steps(results.told(f"loaded{name}")["steps"], [reference.fourth_step])
    assert_same_update(results.weights(f"loaded{name}"), reference.fourth, reference.third)
    saved = results.folder / f"saved{name}"
    assert [path.name for path in saved.iterdir()] == ["trainer"]
    for file in ("weights.safetensors", "optimiser.safetensors"):
        ours, theirs = load_file(saved / "trainer" / file), load_file(reference.folder / "trainer" / file)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert ours[key].dtype == tensor.dtype
            torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-6)
    engine = single_engine(model, RANK)
    engine.load(saved / "trainer")
    assert_same_steps(train(engine, ALONE, (4, 4)), [reference.fourth_step])
    assert_same_update(weights_of(engine), reference.fourth, reference.third)


@pytest.mark.slow
def test_two_copies_train_as_one_process(model: Path, reference: Reference, tmp_path: Path) -> None:
    two = launch_well(tmp_path, tasks_of(model, reference, tmp_path, {"zero_stage": 0}, ""), 2)
    assert_trained_as_one(two, "", model, reference)


@pytest.fixture(scope="module")
def sharded(model: Path, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Everything that two processes of DeepSpeed do."""
    folder = tmp_path_factory.mktemp("sharded")
    settings = folder / "deepspeed.json"
    # Tiny weights are split all the same, and passes gather them as large ones.
    settings.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    tasks = []
    for stage in STAGES:
        engine = {"zero_stage": stage, "deepspeed_config": str(settings)}
        tasks += tasks_of(model, reference, folder, engine, str(stage))
        common: dict[str, Any] = {"model": str(model), "engine": engine, "lora_rank": RANK}
        tasks += [
            Task(name=f"checkpointing{stage}", checkpointing=True, **common),
            Task(name=f"resumed{stage}", load=str(folder / f"saved{stage - 1}/trainer"), steps=(4, 4), **common)
            if stage > 1
            else Task(name="offloaded1", **{**common, "engine": {**engine, "offload_optimiser": True}}),
            Task(
                name=f"bfloat16_{stage}",
                bfloat16=True,
                stored="bfloat16",
                rate=1e-6,
                save=str(folder / f"bfloat16_saved{stage}"),
                whole_policy=True,
                **common,
            ),
        ]
    tasks.append(
        Task(
            name="parameters3",
            **{**common, "engine": {**engine, "offload_optimiser": True, "offload_parameters": True}},
        )
    )
    return launch_well(folder, tasks, 2)


@needs_deepspeed
@pytest.mark.engines
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_of_deepspeed_train_as_one(
    stage: int, sharded: Results, model: Path, reference: Reference
) -> None:
    assert_trained_as_one(sharded, str(stage), model, reference)


@needs_deepspeed
@pytest.mark.engines
@pytest.mark.parametrize("name", [*(f"checkpointing{stage}" for stage in STAGES), "offloaded1", "parameters3"])
def test_saving_memory_changes_no_number(name: str, sharded: Results, reference: Reference) -> None:
    assert_same_steps(sharded.told(name)["steps"], reference.steps)
    assert_same_update(sharded.weights(name), reference.third, reference.first)


@needs_deepspeed
@pytest.mark.engines
@pytest.mark.parametrize("stage", [2, 3])
def test_a_stage_goes_on_from_another(stage: int, sharded: Results, reference: Reference) -> None:
    assert_same_update(sharded.weights(f"resumed{stage}"), reference.fourth, reference.third)


@needs_deepspeed
@pytest.mark.engines
@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_compute_steps_float32_adapters_and_leaves_the_base(stage: int, sharded: Results, model: Path) -> None:
    """At 1e-6 a bfloat16 adapter would not move."""
    assert sharded.told(f"bfloat16_{stage}")["parameter_dtypes"] == ["torch.bfloat16"]
    first = {
        name: weight.detach()
        for name, weight in policy_to_train(model, CPU_BF16, RANK).model.named_parameters()
        if ".lora_A." in name
    }
    after = load_file(sharded.folder / f"bfloat16_saved{stage}" / "trainer" / "weights.safetensors")
    moved = torch.cat([(after[name] != weight).flatten() for name, weight in first.items()])
    rounded = torch.cat([(after[name].bfloat16() != weight.bfloat16()).flatten() for name, weight in first.items()])
    assert float(moved.float().mean()) > 0.95
    assert float(rounded.float().mean()) < 0.05
    base = load_file(model / "model.safetensors")
    named = sharded.weights(f"bfloat16_{stage}")
    assert torch.equal(named["model.embed_tokens.weight"], base["model.embed_tokens.weight"].bfloat16().float())
    assert not torch.equal(named["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])
