"""A flow in memory: what it pairs, and that scores are finite and belong to the response."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlfr_cli.errors import WorkError
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.flow import Flow, response_key
from rlfr_cli.flow.matching import accumulate_matching_gradients
from rlfr_cli.flow.noise import response_noise
from rlfr_cli.flow.normalisation import LatentStatistics
from rlfr_cli.flow.pairing import Pairing, TappedLayers
from tiny_policies import HIDDEN, tiny_flow


def sequences(num_prompt: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num_prompt + length, 2, HIDDEN, generator=generator) for length in (4, 1, 6)]


def scores(flow: Flow, latents: list[Tensor], keys: list[str], seed: int = 0) -> list[Tensor]:
    pairs = flow.pair(latents)
    result = flow.deviations(pairs, keys, seed=seed, timesteps=(0.8,))
    lengths = [len(sequence) - flow.num_prompt for sequence in latents]
    return list(pairs.paired.over_responses(result.score_M, torch.nan).split(lengths))


@pytest.mark.parametrize(
    ("pairings", "num_prompt"),
    [
        ((Pairing(Context.SELF),), 1),
        ((Pairing(Context.NEXT, 3),), 3),
        ((Pairing(Context.PREVIOUS, 2), Pairing(Context.NEXT)), 2),
    ],
)
def test_prompt_tokens_reach_as_far_as_the_largest_shift(pairings: tuple[Pairing, ...], num_prompt: int) -> None:
    flow = tiny_flow()
    flow.pairings = pairings
    assert flow.num_prompt == num_prompt


def test_only_response_tokens_with_a_neighbour_are_targets() -> None:
    pairs = tiny_flow(context=Context.NEXT).pair(sequences())
    assert pairs.paired.valid_K.tolist() == [True] * 3 + [False] + [False] + [True] * 5 + [False]
    assert pairs.paired.targets_M.tolist() == [1, 2, 3, 8, 9, 10, 11, 12]
    assert pairs.paired.conditions_PM.tolist() == [[2, 3, 4, 9, 10, 11, 12, 13]]
    previous = tiny_flow(context=Context.PREVIOUS).pair(sequences())
    assert previous.paired.conditions_PM.tolist() == [[0, 1, 2, 3, 5, 7, 8, 9, 10, 11, 12]]


def test_more_prompt_tokens_than_needed_change_no_target() -> None:
    flow = tiny_flow(context=Context.PREVIOUS)
    longer = sequences(num_prompt=3)
    ours, wanted = flow.pair(longer, num_prompt=3), flow.pair([sequence[2:] for sequence in longer])
    for column in (0, 1):
        torch.testing.assert_close(ours.targets(column, slice(None)), wanted.targets(column, slice(None)))
        torch.testing.assert_close(ours.conditions(column, 0, slice(None)), wanted.conditions(column, 0, slice(None)))


def test_statistics_normalise_targets_and_conditions() -> None:
    flow = tiny_flow(context=Context.PREVIOUS)
    flow.statistics = LatentStatistics(torch.full((2, HIDDEN), 3.0), torch.full((2, HIDDEN), 2.0))
    latents = sequences()
    pairs = flow.pair(latents)
    torch.testing.assert_close(pairs.targets(1, slice(0, 1))[0], (latents[0][1, 1] - 3) / 2)
    torch.testing.assert_close(pairs.conditions(1, 0, slice(0, 1))[0], (latents[0][0, 1] - 3) / 2)


@pytest.mark.parametrize("context", list(Context))
def test_a_context_layer_conditions_every_target_on_its_own_column(context: Context) -> None:
    """By hand, and unlike the same flow conditioned on the targets' layers."""
    flow, twin = tiny_flow(context=context), tiny_flow(context=context)
    flow.layers = TappedLayers((1, 2), 4, "final-norm")
    assert flow.tapped == (1, 2, "final-norm")
    step, t = flow.pairings[0].step, 0.8
    latents = [torch.randn(length, 3, HIDDEN, generator=torch.Generator().manual_seed(length)) for length in (5, 2, 7)]
    keys = ["a", "b", "c"]
    own = scores(twin, [sequence[:, :2] for sequence in latents], keys)
    for sequence, key, ours, others in zip(latents, keys, scores(flow, latents, keys), own, strict=True):
        tokens = len(sequence) - 1  # one prompt token
        places = [k for k in range(tokens) if 1 + k + step < len(sequence)]
        errors = []
        for column, block in enumerate((1, 2)):
            noise = response_noise(0, key, block, 0, num_tokens=tokens, size=HIDDEN)[places]
            target = sequence[1:, column][places]
            condition = torch.stack([sequence[1 + k + step, 2] for k in places]) if places else target
            with torch.no_grad():
                velocity = flow.network(
                    t * target + (1 - t) * noise, torch.tensor([t]), condition, torch.tensor([block / 4])
                )
            errors.append((velocity - (target - noise)).square().mean(-1))
        torch.testing.assert_close(ours[places], 4 * torch.stack(errors).mean(0), rtol=1e-4, atol=1e-4)
        assert bool(((ours - others)[places].abs() > 1e-4).all())


def test_a_context_among_the_targets_takes_their_column() -> None:
    flow = tiny_flow()
    flow.layers = TappedLayers((1, 2), 4, 1)
    pairs = flow.pair(sequences())
    assert flow.tapped == (1, 2)
    for column in (0, 1):
        assert torch.equal(
            pairs.conditions(column, 0, slice(None)), pairs.latents_NJD[pairs.paired.conditions_PM[0], 0]
        )
    with pytest.raises(AssertionError):
        flow.pair([torch.zeros(3, 3, HIDDEN)])


def test_the_fitting_loss_depends_on_the_context_column() -> None:
    flow = tiny_flow()
    flow.layers = TappedLayers((1, 2), 4, "final-norm")
    latents = [torch.cat([sequence, sequence[:, :1]], dim=1) for sequence in sequences()]
    other = [torch.cat([sequence, -sequence[:, :1]], dim=1) for sequence in sequences()]
    losses = [
        float(
            accumulate_matching_gradients(
                flow.network, flow.pair(chosen), torch.Generator().manual_seed(0), backward=False
            ).loss
        )
        for chosen in (latents, latents, other)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_scores_belong_to_the_response_whatever_it_is_scored_with() -> None:
    flow, latents, keys = tiny_flow(), sequences(), ["a", "b", "c"]
    together = scores(flow, latents, keys)
    backwards = scores(flow, latents[::-1], keys[::-1])[::-1]
    for index in range(3):
        alone = scores(flow, [latents[index]], [keys[index]])[0]
        torch.testing.assert_close(alone, together[index], equal_nan=True)
        torch.testing.assert_close(backwards[index], together[index], equal_nan=True)
    assert float((scores(flow, latents, ["x", "b", "c"])[0] - together[0]).nan_to_num().abs().max()) > 0
    assert float((scores(flow, latents, keys, seed=1)[0] - together[0]).nan_to_num().abs().max()) > 0


def test_a_score_that_is_not_finite_is_an_error_with_a_hint() -> None:
    latents = sequences()
    latents[0][2, 0, 5] = float("inf")
    with pytest.raises(WorkError, match="not finite") as caught:
        scores(tiny_flow(), latents, ["a", "b", "c"])
    assert caught.value.hint


def test_response_keys_differ_between_problems_and_samples() -> None:
    keys = {response_key(problem, sample) for problem in ("1", "11", "2") for sample in (0, 1, 11)}
    assert len(keys) == 9
    assert response_key("1", 11) != response_key("11", 1)
