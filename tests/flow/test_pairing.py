"""Pairing: worked by hand, and against a plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlfr_cli.errors import ConfigError
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.normalisation import LatentStatistics
from rlfr_cli.flow.pairing import PairedLatents, Pairing, TappedLayers, pair_tokens, prompt_tokens_needed

NEXT, PREVIOUS, SELF = (Pairing(context) for context in Context)


def test_by_hand() -> None:
    """Two sequences of one prompt token, with three and two response tokens: rows 0 | 1 2 3 and 4 | 5 6."""
    offsets = torch.tensor([0, 4, 7])
    following = pair_tokens(offsets, 1, [NEXT])
    assert following.targets_M.tolist() == [1, 2, 5]
    assert following.conditions_PM.tolist() == [[2, 3, 6]]
    assert following.sequence_M.tolist() == [0, 0, 1]
    assert following.position_M.tolist() == [0, 1, 0]
    assert following.valid_K.tolist() == [True, True, False, True, False]
    assert following.response_offsets.tolist() == [0, 3, 5]
    before = pair_tokens(offsets, 1, [PREVIOUS])
    assert before.targets_M.tolist() == [1, 2, 3, 5, 6]
    assert before.conditions_PM.tolist() == [[0, 1, 2, 4, 5]]


def test_a_token_needs_all_its_neighbours() -> None:
    both = pair_tokens(torch.tensor([0, 4]), 1, [NEXT, PREVIOUS, SELF])
    assert both.targets_M.tolist() == [1, 2]
    assert both.conditions_PM.tolist() == [[2, 3], [0, 1], [1, 2]]


def test_shift_two_needs_two_prompt_tokens() -> None:
    pairing = Pairing(Context.PREVIOUS, 2)
    assert prompt_tokens_needed([pairing, SELF]) == 2
    assert prompt_tokens_needed([SELF]) == 1
    paired = pair_tokens(torch.tensor([0, 4]), 1, [pairing])
    assert paired.targets_M.tolist() == [2, 3]  # response token 0 would need a row before the sequence


@st.composite
def sequences(draw: st.DrawFn) -> tuple[list[int], list[int], list[Pairing]]:
    lengths = draw(st.lists(st.integers(0, 6), max_size=5))
    prompts = [draw(st.integers(0, 3)) for _ in lengths]
    pairing = st.builds(Pairing, st.sampled_from(Context), st.integers(1, 3))
    return lengths, prompts, draw(st.lists(pairing, min_size=1, max_size=3))


@given(sequences())
def test_against_a_loop(case: tuple[list[int], list[int], list[Pairing]]) -> None:
    lengths, prompts, pairings = case
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    paired = pair_tokens(offsets, torch.tensor(prompts, dtype=torch.int64), pairings)
    wanted, valid = [], []
    for sequence, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        for place in range(prompt, length):
            neighbours = [place + pairing.step for pairing in pairings]
            valid.append(all(0 <= neighbour < length for neighbour in neighbours))
            if valid[-1]:
                start = int(offsets[sequence])
                packed = [start + neighbour for neighbour in neighbours]
                wanted.append((start + place, packed, sequence, place - prompt))
    assert paired.valid_K.tolist() == valid
    columns = zip(
        paired.targets_M.tolist(),
        paired.conditions_PM.T.tolist(),
        paired.sequence_M.tolist(),
        paired.position_M.tolist(),
        strict=True,
    )
    assert list(columns) == wanted
    assert int(paired.valid_per_response_R.sum()) == len(wanted)


def test_over_responses_and_select() -> None:
    paired = pair_tokens(torch.tensor([0, 4, 7]), 1, [NEXT])
    values = torch.tensor([10.0, 20.0, 30.0])
    assert paired.over_responses(values).tolist() == [10, 20, 0, 30, 0]
    some = paired.select(torch.tensor([False, True, True]))
    assert some.over_responses(torch.tensor([20.0, 30.0])).tolist() == [0, 20, 0, 30, 0]
    assert some.targets_M.tolist() == [2, 5]
    assert some.valid_per_response_R.tolist() == [1, 1]


def test_reading_targets_and_conditions() -> None:
    latents = torch.arange(4 * 3 * 2.0).reshape(4, 3, 2).requires_grad_()
    statistics = LatentStatistics(torch.full((3, 2), 1.0), torch.full((3, 2), 2.0))
    own = PairedLatents(latents, pair_tokens(torch.tensor([0, 4]), 1, [NEXT]), TappedLayers((5, 7), 10))
    other = PairedLatents(latents, own.paired, TappedLayers((5, 7), 10, "final-norm"), statistics)
    rows = slice(0, 2)
    assert torch.equal(own.targets(1, rows), latents[1:3, 1])
    assert torch.equal(own.conditions(1, 0, rows), latents[2:4, 1])
    assert torch.equal(other.targets(1, rows), (latents[1:3, 1] - 1) / 2)
    assert torch.equal(other.conditions(1, 0, rows), (latents[2:4, 2] - 1) / 2)
    among = PairedLatents(latents, own.paired, TappedLayers((5, 7), 10, 7))
    assert torch.equal(among.targets(0, rows), latents[1:3, 0])
    assert torch.equal(among.conditions(0, 0, rows), latents[2:4, 1])
    assert (own.layers.tapped, other.layers.tapped, among.layers.tapped) == ((5, 7), (5, 7, "final-norm"), (5, 7))
    assert own.layers.positions == other.layers.positions == (0.5, 0.7)
    assert not own.targets(0, rows).requires_grad


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="shift of 0"):
        Pairing(Context.NEXT, 0)
    with pytest.raises(ConfigError, match="no context pairing"):
        pair_tokens(torch.tensor([0, 3]), 1, [])
