"""Dynamic sampling: rounds draw what is missing, and stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlfr_cli.artifacts.rollouts import RolloutRow
from rlfr_cli.rl.rounds import draw_until_varied
from tiny_policies import rollout_rows

VARIED, UNIFORM = (0.0, 1.0), (1.0, 1.0)


def drawing(
    groups: Sequence[tuple[float, float]],
) -> tuple[Callable[[int, int], list[RolloutRow]], list[tuple[int, int]]]:
    """A source of groups of two with these rewards, and the calls it saw."""
    calls: list[tuple[int, int]] = []
    left = list(groups)

    def draw(count: int, round_number: int) -> list[RolloutRow]:
        calls.append((count, round_number))
        rewards = [reward for group in left[:count] for reward in group]
        del left[:count]
        rows = rollout_rows([(3, 4)] * len(rewards))
        for row, reward in zip(rows, rewards, strict=True):
            row.reward = reward
        return rows

    return draw, calls


def test_rounds_draw_as_many_groups_as_are_missing() -> None:
    draw, calls = drawing([VARIED, UNIFORM, UNIFORM, UNIFORM, VARIED, UNIFORM, VARIED])
    rows, rounds = draw_until_varied(draw, wanted=3, group_size=2, max_rounds=9)
    assert calls == [(3, 0), (2, 1), (1, 2), (1, 3)]
    assert rounds == 4
    assert len(rows) == 14
    assert [row.reward for row in rows[-2:]] == [0.0, 1.0]


def test_one_round_is_enough_where_all_outcomes_differ() -> None:
    draw, calls = drawing([VARIED] * 4)
    assert draw_until_varied(draw, wanted=4, group_size=2, max_rounds=9)[1] == 1
    assert calls == [(4, 0)]


def test_the_last_round_is_the_last_whatever_is_missing() -> None:
    draw, calls = drawing([UNIFORM] * 20)
    rows, rounds = draw_until_varied(draw, wanted=4, group_size=2, max_rounds=3)
    assert (rounds, len(rows)) == (3, 24)
    assert calls == [(4, 0), (4, 1), (4, 2)]
