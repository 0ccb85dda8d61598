"""The order of items: whole passes, whatever the size of a step, from the step's number alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlfr_cli.ordering import shuffled_items


def items_of(num_items: int, per_step: int, steps: int, *keys: int | str) -> list[int]:
    return [item for step in range(1, steps + 1) for item in shuffled_items(num_items, per_step, step, *keys)]


@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 5))
def test_every_pass_takes_every_item_once(num_items: int, per_step: int, steps: int) -> None:
    taken = items_of(num_items, per_step, steps, 0)
    assert len(taken) == per_step * steps
    for start in range(0, len(taken) - num_items + 1, num_items):
        assert sorted(taken[start : start + num_items]) == list(range(num_items))


@given(st.integers(1, 12), st.integers(1, 8))
def test_the_size_of_a_step_does_not_change_the_order(num_items: int, per_step: int) -> None:
    wanted = items_of(num_items, 1, 8 * per_step, 3, "problem order")
    assert items_of(num_items, per_step, 8, 3, "problem order") == wanted


def test_passes_and_keys_have_orders_of_their_own() -> None:
    first, second = (shuffled_items(50, 50, step, 0) for step in (1, 2))
    assert first != second
    assert first != sorted(first)
    assert shuffled_items(50, 50, 1, 1) != first
    assert shuffled_items(50, 50, 1, 0, "other") != first
    assert shuffled_items(50, 50, 1, 0) == first
