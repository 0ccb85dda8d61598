"""The fitting loss: by hand, where gradients go, and that chunks and micro-batches change nothing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from rlfr_cli.flow import matching
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.matching import (
    NOISE_AT_ONCE,
    TokenShare,
    accumulate_matching_gradients,
    choose_times,
    draw_noise_and_times,
    matching_errors,
    matching_loss,
    noised_latents,
    sample_times,
)
from rlfr_cli.flow.pairing import PairedLatents, Pairing, TappedLayers, pair_tokens
from rlfr_cli.flow.velocity import VelocityNetwork, VelocitySizes

SIZE = 6


def random_network() -> VelocityNetwork:
    torch.manual_seed(0)
    network = VelocityNetwork(VelocitySizes(latent_size=SIZE, condition_size=SIZE, width=8, depth=2))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def random_pairs(lengths: tuple[int, ...] = (5, 3, 7)) -> PairedLatents:
    torch.manual_seed(1)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    pairings = [Pairing(Context.NEXT), Pairing(Context.PREVIOUS)]
    latents = torch.randn(sum(lengths), 2, SIZE)
    return PairedLatents(latents, pair_tokens(offsets, 1, pairings), TappedLayers((1, 2), 4))


def gradients(network: VelocityNetwork) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in network.parameters()]


def test_zero_velocity_by_hand() -> None:
    """A new network has v = 0, so the error is the mean square of u = target - noise = (1, -3): 5."""
    network = VelocityNetwork(VelocitySizes(latent_size=2, condition_size=2, width=4, depth=1))
    errors = matching_errors(
        network,
        targets_ND=torch.tensor([[2.0, 1.0]]),
        conditions_NC=torch.zeros(1, 2),
        times_N=torch.tensor([0.3]),
        noise_ND=torch.tensor([[1.0, 4.0]]),
        layer_position=0.5,
    )
    assert errors.tolist() == [5.0]


def test_path_goes_from_noise_to_latent() -> None:
    target, noise = torch.tensor([[10.0]]), torch.tensor([[2.0]])
    assert float(noised_latents(target, noise, torch.tensor([0.0]))) == 2
    assert float(noised_latents(target, noise, torch.tensor([1.0]))) == 10
    assert float(noised_latents(target, noise, torch.tensor([0.75]))) == 8


def test_weighted_mean_by_hand() -> None:
    errors, weights = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([3.0, 1.0, 0.0])
    assert float(matching_loss(errors)) == 4.0
    assert float(matching_loss(errors, weights)) == 1.25  # (3 + 2) / 4
    assert float(matching_loss(errors, weights, total_weight=10)) == 0.5
    assert float(matching_loss(errors, torch.zeros(3))) == 0.0


def test_times() -> None:
    generator = torch.Generator().manual_seed(0)
    times = sample_times(20_000, generator)
    logits = times.logit()
    assert abs(float(logits.mean())) < 0.03
    assert abs(float(logits.std()) - 1) < 0.03
    chosen = choose_times([0.5, 0.8], 200, generator)
    assert chosen.unique().tolist() == pytest.approx([0.5, 0.8])


def test_gradients_reach_every_flow_parameter_and_no_latent() -> None:
    network, pairs = random_network(), random_pairs()
    pairs.latents_NJD.requires_grad_()
    accumulate_matching_gradients(network, pairs, torch.Generator().manual_seed(0))
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert pairs.latents_NJD.grad is None


def test_matching_errors_detach_targets_and_conditions() -> None:
    target, condition = torch.randn(3, SIZE, requires_grad=True), torch.randn(3, SIZE, requires_grad=True)
    errors = matching_errors(
        random_network(), target, condition, torch.rand(3), torch.randn(3, SIZE), layer_position=0.5
    )
    errors.sum().backward()
    assert target.grad is None
    assert condition.grad is None


@pytest.mark.parametrize("tokens_per_chunk", [1, 4, 1000])
def test_chunks_change_nothing(tokens_per_chunk: int) -> None:
    """The sum over chunks equals one autograd pass over a mean written out here."""
    network, pairs = random_network(), random_pairs()
    weights_M = torch.rand(pairs.paired.num_valid) + 0.1
    weights_M[2] = 0
    result = accumulate_matching_gradients(
        network,
        pairs,
        torch.Generator().manual_seed(3),
        weights_M=weights_M,
        noise_repeats=2,
        tokens_per_chunk=tokens_per_chunk,
    )
    ours = gradients(network)

    network.zero_grad()
    generator, kept = torch.Generator().manual_seed(3), weights_M > 0
    num_kept, losses = int(kept.sum()), []
    for column, position in enumerate((0.25, 0.5)):
        for p in range(2):
            for _ in range(2):
                noise = torch.randn(num_kept, SIZE, generator=generator)
                times = torch.randn(num_kept, generator=generator).sigmoid()
                target = pairs.latents_NJD[pairs.paired.targets_M[kept], column]
                condition = pairs.latents_NJD[pairs.paired.conditions_PM[p, kept], column]
                noised = times[:, None] * target + (1 - times)[:, None] * noise
                velocity = network(noised, times, condition, torch.tensor([position]))
                errors = (velocity - (target - noise)).square().mean(dim=1)
                losses.append((errors * weights_M[kept]).sum() / weights_M.sum())
    loss = torch.stack(losses).mean()
    loss.backward()
    torch.testing.assert_close(result.loss, loss.detach())
    torch.testing.assert_close(ours, gradients(network))
    assert float(result.errors_MJ[2].sum()) == 0.0


def test_micro_batches_add_up_to_the_batch() -> None:
    """With the weight of the whole batch, gradients of unequal micro-batches sum to those of their mean."""
    network, batches = random_network(), [random_pairs((5, 4)), random_pairs((9,))]
    total = float(sum(batch.paired.num_valid for batch in batches))
    parts = [
        accumulate_matching_gradients(network, batch, torch.Generator().manual_seed(i), total_weight=total)
        for i, batch in enumerate(batches)
    ]
    summed = gradients(network)
    wanted = [torch.zeros_like(gradient) for gradient in summed]
    for i, batch in enumerate(batches):
        network.zero_grad()
        accumulate_matching_gradients(network, batch, torch.Generator().manual_seed(i))
        share = batch.paired.num_valid / total
        wanted = [w + share * gradient for w, gradient in zip(wanted, gradients(network), strict=True)]
    torch.testing.assert_close(summed, wanted)
    mean = sum(float(part.loss) * batch.paired.num_valid for part, batch in zip(parts, batches, strict=True))
    assert sum(float(part.error_sum) for part in parts) == pytest.approx(mean)


def test_no_weight_gives_no_gradient_and_draws_nothing() -> None:
    network, pairs, generator = random_network(), random_pairs(), torch.Generator().manual_seed(0)
    before = generator.get_state()
    result = accumulate_matching_gradients(
        network, pairs, generator, weights_M=torch.zeros(pairs.paired.num_valid), total_weight=5.0
    )
    assert (float(result.loss), float(result.weight_sum), float(result.error_sum)) == (0.0, 0.0, 0.0)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(before, generator.get_state())


def test_the_loss_falls_and_measuring_adds_no_gradient() -> None:
    network, pairs = random_network(), random_pairs((9, 9))
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    measure = partial(accumulate_matching_gradients, network, pairs, noise_repeats=8, backward=False)
    first = measure(torch.Generator().manual_seed(99)).loss
    assert all(parameter.grad is None for parameter in network.parameters())
    for step in range(40):
        optimiser.zero_grad()
        accumulate_matching_gradients(network, pairs, torch.Generator().manual_seed(step), noise_repeats=2)
        optimiser.step()
    assert measure(torch.Generator().manual_seed(99)).loss < 0.8 * first


@pytest.mark.parametrize("at_once", [48, NOISE_AT_ONCE])
@pytest.mark.parametrize("counts", [(7, 0, 4), (1, 16, 2, 5), (23,)])
def test_shares_of_the_noise_are_rows_of_the_whole_draw(
    counts: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and later draws too; a share without tokens draws like the others."""
    monkeypatch.setattr(matching, "NOISE_AT_ONCE", at_once)
    whole, shared = [], [[] for _ in counts]
    generator = torch.Generator().manual_seed(5)
    for draw_times in (sample_times, partial(choose_times, [0.2, 0.7])):
        whole.append(draw_noise_and_times(sum(counts), SIZE, generator, draw_times))
    for place, parts in enumerate(shared):
        generator = torch.Generator().manual_seed(5)
        for draw_times in (sample_times, partial(choose_times, [0.2, 0.7])):
            share = TokenShare.of(counts, place)
            parts.append(draw_noise_and_times(counts[place], SIZE, generator, draw_times, share))
    for number, (noise, times) in enumerate(whole):
        assert torch.equal(torch.cat([parts[number][0] for parts in shared]), noise)
        assert torch.equal(torch.cat([parts[number][1] for parts in shared]), times)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(whole[0][0], torch.randn(sum(counts), SIZE, generator=generator))
    assert torch.equal(whole[0][1], torch.randn(sum(counts), generator=generator).sigmoid())
    assert not torch.equal(whole[0][0], whole[1][0])


def test_ranks_that_name_their_share_add_up_to_the_whole_batch() -> None:
    """Tokens of weight 0 have no noise, so a share counts the others alone."""
    network, pairs = random_network(), random_pairs((5, 3, 7))
    weights_M = torch.rand(pairs.paired.num_valid) + 0.1
    weights_M[[1, 4]] = 0
    whole = accumulate_matching_gradients(
        network, pairs, torch.Generator().manual_seed(3), weights_M=weights_M, noise_repeats=2
    )
    wanted = gradients(network)
    network.zero_grad()
    first_M = pairs.paired.sequence_M == 0
    counts = [int((weights_M[rows] > 0).sum()) for rows in (first_M, ~first_M)]
    parts = [
        accumulate_matching_gradients(
            network,
            pairs.select(rows),
            torch.Generator().manual_seed(3),
            weights_M=weights_M[rows],
            total_weight=float(weights_M.sum()),
            share=TokenShare.of(counts, place),
            noise_repeats=2,
        )
        for place, rows in enumerate((first_M, ~first_M))
    ]
    torch.testing.assert_close(gradients(network), wanted)
    torch.testing.assert_close(parts[0].error_sum + parts[1].error_sum, whole.error_sum)
    torch.testing.assert_close(torch.cat([part.errors_MJ for part in parts]), whole.errors_MJ)
