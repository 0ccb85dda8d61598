"""Which items a step takes, as a pure function, so that a resumed run needs no state."""

from __future__ import annotations

import torch

from rlfr_cli.flow.noise import Key, keyed_generator


def shuffled_items(num_items: int, items_per_step: int, step: int, *keys: Key) -> list[int]:
    """Items of step ``step`` (from 1): consecutive entries of one shuffled order after another.

    A step may end one pass over the items and begin the next; within a pass none is left out or taken twice.

    Args:
        keys: name the orders, seed included.
    """
    return shuffled_range(num_items, (step - 1) * items_per_step, step * items_per_step, *keys)


def shuffled_range(num_items: int, start: int, stop: int, *keys: Key) -> list[int]:
    """Entries ``start`` to ``stop`` − 1 of one shuffled order after another."""
    orders: dict[int, list[int]] = {}
    chosen = []
    for place in range(start, stop):
        episode, index = divmod(place, num_items)
        if episode not in orders:
            generator = keyed_generator("cpu", *keys, episode)
            orders[episode] = torch.randperm(num_items, generator=generator).tolist()
        chosen.append(orders[episode][index])
    return chosen
