"""Dynamic sampling (DAPO, Yu et al., 2025): draw on until enough groups have outcomes that differ.

Reads nothing but what it is called with. A round draws as many problems as groups are still missing, so none with
differing outcomes is drawn in vain; groups of equal outcomes are returned too, for the caller to keep or drop.
"""

from __future__ import annotations

from collections.abc import Callable

from rlfr_cli.artifacts.rollouts import RolloutRow
from rlfr_cli.rl.training_batch import uniform_groups


def draw_until_varied(
    draw: Callable[[int, int], list[RolloutRow]],
    *,
    wanted: int,
    group_size: int,
    max_rounds: int,
    total: Callable[[int], int] = lambda count: count,
) -> tuple[list[RolloutRow], int]:
    """Rows of all groups drawn, in order, and the number of rounds.

    Args:
        draw: the rows of so many further problems, in the round of that number (from 0).
        wanted: groups whose outcome rewards differ.
        max_rounds: after these, what there is must do.
        total: sums a count over the processes that each draw a part.
    """
    rows: list[RolloutRow] = []
    missing, rounds = wanted, 0
    while missing > 0 and rounds < max_rounds:
        drawn = draw(missing, rounds)
        rows += drawn
        rounds += 1
        varied = uniform_groups([row.reward or 0.0 for row in drawn], group_size).count(False) // group_size
        missing -= total(varied)
    return rows, rounds
