"""Training in one process: float32 weights under a bfloat16 folder, saves that continue exactly, bad steps skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlfr_cli.engines.single import SingleProcessEngine
from rlfr_cli.policy.forward import response_logprobs
from rlfr_cli.policy.loading import Policy, load_policy
from tiny_policies import CPU, CPU_BF16, ModelFolders, random_sequences

SEQUENCES = random_sequences([(4, 6), (3, 9)])


def make_engine(policy: Policy, stored: torch.dtype = torch.bfloat16, **options: bool) -> SingleProcessEngine:
    return SingleProcessEngine(
        policy, stored_dtype=stored, betas=(0.9, 0.95), weight_decay=0.0, clip_norm=1.0, **options
    )


def train(engine: SingleProcessEngine, steps: int, rate: float = 1e-4) -> None:
    engine.policy.model.train()
    for _ in range(steps):
        for part in SEQUENCES:
            engine.backward(-response_logprobs(engine.policy, [part], 1.0)[0].mean())
        assert engine.step(rate).stepped


def weights(engine: SingleProcessEngine) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in engine.policy.model.named_parameters()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_saved_and_loaded_run_equals_one_that_went_on(
    stored: torch.dtype, tied: bool, model_folders: ModelFolders, tmp_path: Path
) -> None:
    whole = make_engine(model_folders.policy(tied=tied), stored)
    train(whole, 2)
    whole.save(tmp_path / "model", tmp_path / "trainer")
    saved = weights(whole)
    train(whole, 2)

    resumed = make_engine(load_policy(tmp_path / "model", CPU, weights_dtype=torch.float32), stored)
    resumed.load(tmp_path / "trainer")
    assert_same(weights(resumed), saved)
    train(resumed, 2)
    assert_same(weights(resumed), weights(whole))
    assert not torch.equal(weights(whole)["model.norm.weight"], saved["model.norm.weight"])


def test_a_bfloat16_folder_keeps_float32_weights_beside_it(model_folders: ModelFolders, tmp_path: Path) -> None:
    """At 1e-6 a bfloat16 weight would not move; the float32 ones do, and survive."""
    engine = make_engine(model_folders.policy())
    before = weights(engine)
    train(engine, 3, rate=1e-6)
    after = weights(engine)
    name = "model.layers.0.mlp.up_proj.weight"
    moved = float((after[name] != before[name]).float().mean())
    moved_in_bfloat16 = float((after[name].bfloat16() != before[name].bfloat16()).float().mean())
    assert moved > 0.9
    assert moved_in_bfloat16 < 0.05
    engine.save(tmp_path / "model", tmp_path / "trainer")
    assert {t.dtype for t in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.bfloat16}
    assert torch.equal(load_file(tmp_path / "trainer" / "weights.safetensors")[name], after[name])


def test_a_float32_folder_needs_no_second_copy_and_nothing_is_a_pickle(
    model_folders: ModelFolders, tmp_path: Path
) -> None:
    engine = make_engine(model_folders.policy(), torch.float32)
    train(engine, 1)
    engine.save(tmp_path / "model", tmp_path / "trainer")
    assert sorted(path.name for path in (tmp_path / "trainer").iterdir()) == ["engine.json", "optimiser.safetensors"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]


def test_parts_of_a_loss_add_up(model_folders: ModelFolders) -> None:
    engine = make_engine(model_folders.policy())
    for part in SEQUENCES:
        engine.backward(response_logprobs(engine.policy, [part], 1.0)[0].sum())
    in_parts = {name: p.grad.clone() for name, p in engine.policy.model.named_parameters()}
    engine.policy.model.zero_grad()
    engine.backward(response_logprobs(engine.policy, SEQUENCES, 1.0)[0].sum())
    for name, parameter in engine.policy.model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(in_parts[name], parameter.grad, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "phi3"])
def test_gradient_checkpointing_changes_no_gradient(family: str, model_folders: ModelFolders) -> None:
    found = []
    for checkpointing in (False, True):
        engine = make_engine(model_folders.policy(family), gradient_checkpointing=checkpointing)
        engine.policy.model.train()
        assert engine.policy.model.is_gradient_checkpointing is checkpointing
        engine.backward(response_logprobs(engine.policy, SEQUENCES, 1.0)[0].sum())
        found.append({name: p.grad for name, p in engine.policy.model.named_parameters()})
    assert all(gradient is not None for gradient in found[1].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


def test_a_loss_that_is_not_a_number_skips_one_step_only(model_folders: ModelFolders) -> None:
    engine = make_engine(model_folders.policy())
    before = weights(engine)
    loss = response_logprobs(engine.policy, SEQUENCES, 1.0)[0].sum()
    engine.backward(loss * float("nan"))
    engine.backward(response_logprobs(engine.policy, SEQUENCES, 1.0)[0].sum())
    assert not engine.step(1e-3).stepped
    assert_same(weights(engine), before)
    train(engine, 1)


def test_an_infinite_loss_with_finite_gradients_is_skipped(model_folders: ModelFolders) -> None:
    engine = make_engine(model_folders.policy())
    before = weights(engine)
    for offset in (float("inf"), 0.0):
        engine.backward(response_logprobs(engine.policy, SEQUENCES, 1.0)[0].sum() + offset)
    assert not engine.step(1e-3).stepped
    assert_same(weights(engine), before)
    train(engine, 1)


def test_bfloat16_compute_gives_float32_gradients(model_folders: ModelFolders) -> None:
    engine = make_engine(model_folders.policy(placement=CPU_BF16))
    engine.backward(response_logprobs(engine.policy, SEQUENCES, 1.0)[0].sum())
    assert {p.grad.dtype for p in engine.policy.model.parameters()} == {torch.float32}


def test_one_process_needs_nothing_around_a_pass_and_has_nobody_to_keep_up_with(model_folders: ModelFolders) -> None:
    engine = make_engine(model_folders.policy())
    assert engine.run(lambda: "result") == "result"
    engine.idle_backward(last=True)
    assert all(parameter.grad is None for parameter in engine.policy.model.parameters())
    with engine.whole_policy():
        assert_same(dict(engine.named_weights()), weights(engine))


def test_named_weights_name_a_tied_weight_once(model_folders: ModelFolders) -> None:
    tied, untied = (make_engine(model_folders.policy(tied=tied)) for tied in (True, False))
    assert {name for name, _ in untied.named_weights()} - {name for name, _ in tied.named_weights()} == {
        "lm_head.weight"
    }
