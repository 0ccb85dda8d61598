"""AdamW by name: equal to torch's, bit for bit after a save, and unmoved by what is not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlfr_cli.engines.adamw import NamedAdamW

BETAS, DECAY, CLIP = (0.9, 0.95), 0.1, 0.5


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def named(model: nn.Module) -> NamedAdamW:
    return NamedAdamW(model.named_parameters(), betas=BETAS, weight_decay=DECAY, clip_norm=CLIP)


def fill_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * (0.01 if step == 2 else 1.0)


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def all_equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_steps_are_those_of_torch_with_clipping() -> None:
    ours, theirs = make_model(), make_model()
    optimiser = named(ours)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1.0, betas=BETAS, weight_decay=DECAY)
    for step, rate in enumerate([1e-2, 3e-2, 2e-2, 1e-3]):
        fill_gradients(ours, step)
        fill_gradients(theirs, step)
        norm = float(nn.utils.clip_grad_norm_(theirs.parameters(), CLIP))
        reference.param_groups[0]["lr"] = rate
        reference.step()
        outcome = optimiser.step(rate)
        assert outcome.stepped
        assert outcome.gradient_norm == norm  # before clipping
        assert (norm > CLIP) == (step != 2)
        assert all_equal(weights(ours), weights(theirs))
        assert all(parameter.grad is None for parameter in ours.parameters())


def test_state_by_name_continues_bit_for_bit(tmp_path: Path) -> None:
    whole, stopped = make_model(), make_model()
    optimisers = named(whole), named(stopped)
    for step in range(3):
        for model, optimiser in zip((whole, stopped), optimisers, strict=True):
            fill_gradients(model, step)
            optimiser.step(1e-2)
    state = optimisers[1].state_tensors()
    assert set(state) == {
        f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq", "step") for name, _ in stopped.named_parameters()
    }
    save_file(state, tmp_path / "state.safetensors")

    resumed = make_model()
    resumed.load_state_dict(stopped.state_dict())
    # Parameters in another order: the state goes by name.
    optimiser = NamedAdamW(reversed(list(resumed.named_parameters())), betas=BETAS, weight_decay=DECAY, clip_norm=CLIP)
    optimiser.load_state_tensors(load_file(tmp_path / "state.safetensors"))
    for step in (3, 4):
        fill_gradients(whole, step)
        fill_gradients(resumed, step)
        for parameter in (*whole.parameters(), *resumed.parameters()):
            parameter.grad.mul_(1e-2)  # below the clip norm, whose sum would depend on the order
        optimisers[0].step(1e-2)
        optimiser.step(1e-2)
    assert all_equal(weights(resumed), weights(whole))


def test_a_fresh_state_would_not_continue() -> None:
    """The test above would pass without moments if they did not matter."""
    whole = make_model()
    optimiser = named(whole)
    for step in range(3):
        fill_gradients(whole, step)
        optimiser.step(1e-2)
    fresh = make_model()
    fresh.load_state_dict(whole.state_dict())
    for model, chosen in ((whole, optimiser), (fresh, named(fresh))):
        fill_gradients(model, 3)
        chosen.step(1e-2)
    assert not all_equal(weights(whole), weights(fresh))


def test_before_the_first_step_there_is_no_state() -> None:
    model = make_model()
    assert named(model).state_tensors() == {}
    named(model).load_state_tensors({})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    model = make_model()
    optimiser = named(model)
    fill_gradients(model, 0)
    optimiser.step(1e-2)
    before, moments = weights(model), {k: v.clone() for k, v in optimiser.state_tensors().items()}
    fill_gradients(model, 1)
    model[0].weight.grad[0, 0] = value
    assert not optimiser.step(1e-2).stepped
    assert all_equal(weights(model), before)
    assert all(torch.equal(v, moments[k]) for k, v in optimiser.state_tensors().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    fill_gradients(model, 1)
    assert optimiser.step(1e-2).stepped


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    model = make_model()
    before = weights(model)
    fill_gradients(model, 0)
    assert not named(model).step(1e-2, loss_is_finite=False).stepped
    assert all_equal(weights(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_parameters_are_left_alone_and_stepped_ones_are_float32() -> None:
    model = make_model()
    model[0].requires_grad_(False).to(torch.bfloat16)
    assert set(named(model).parameters) == {"2.weight", "2.bias"}
    with pytest.raises(AssertionError, match="float32"):
        named(make_model().to(torch.bfloat16))
