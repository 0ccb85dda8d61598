"""Batches hold every item once and stay within the budget; padding stands on the named side."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlfr_cli.policy.batching import pad_left, pad_right, token_budget_batches

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_every_item_once_and_the_budget_held(lengths: list[int], budget: int) -> None:
    batches = token_budget_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * max(lengths[index] for index in batch) <= budget or len(batch) == 1


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_no_batch_could_take_the_next_ones_longest_item(lengths: list[int], budget: int) -> None:
    batches = token_budget_batches(lengths, budget)
    for batch, _ in pairwise(batches):
        assert (len(batch) + 1) * max(lengths[index] for index in batch) > budget


def test_longest_first_and_equal_lengths_in_order() -> None:
    assert token_budget_batches([2, 5, 2, 5, 1], 10) == [[1, 3], [0, 2, 4]]
    assert token_budget_batches([], 10) == []


def test_padding_stands_on_the_named_side() -> None:
    assert pad_right([[5, 6, 7], [8]], 0, CPU).tolist() == [[5, 6, 7], [8, 0, 0]]
    ids, mask = pad_left([[5, 6, 7], [8]], 0, CPU)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
