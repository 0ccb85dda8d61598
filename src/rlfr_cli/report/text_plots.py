"""Pictures of text for a terminal: intervals beside a mark, and bars to both sides of zero. Values in, lines out."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH = 41  # odd, so that there is a middle column


def interval_lines(
    rows: Sequence[tuple[str, float | None, float | None, float | None]], *, begin: float = 0.0, end: float = 1.0
) -> list[str]:
    """One line a row: a name, its value and 95 % interval on a scale with a mark in the middle, and the value.

    Args:
        rows: name, value, low, high; a row without a value has an empty scale. What lies beyond the scale is drawn
            at its end.
    """
    width = max((len(row[0]) for row in rows), default=0)
    middle = (begin + end) / 2
    scale = f"{begin:<{WIDTH // 2}g}{middle:<{WIDTH - WIDTH // 2}g}{end:g}"
    lines = [" " * (width + 2) + scale]
    for name, value, low, high in rows:
        cells = ["·"] * WIDTH
        cells[WIDTH // 2] = "|"
        if value is not None:
            left, at, right = (_column(x if x is not None else value, begin, end) for x in (low, value, high))
            for column in range(left, right + 1):
                cells[column] = "─"
            cells[left], cells[right] = "├", "┤"
            cells[at] = "●"
        lines.append(f"{name:<{width}}  {''.join(cells)}  {'-' if value is None else format(value, '.2f')}")
    return lines


def share_lines(rows: Sequence[tuple[str, float]]) -> list[str]:
    """One line a row: a bar from -100 % to 100 % around zero, and the share; a longer bar ends in an arrow."""
    width = max((len(name) for name, _ in rows), default=0)
    half = WIDTH // 2
    lines = [f"{' ' * (width + 2)}{'-100 %':<{half}}0{'100 %':>{half}}"]
    for name, share in rows:
        length = min(half, round(abs(share) * half)) if math.isfinite(share) else 0
        left, right = "", ""
        if share < 0:
            left = ("◀" + "█" * (length - 1) if share < -1 else "█" * length).rjust(half)
        else:
            right = "█" * length
        lines.append(f"{name:<{width}}  {left:>{half}}|{right:<{half}}  {share:.0%}")
    return lines


def _column(value: float, begin: float, end: float) -> int:
    share = (value - begin) / (end - begin)
    return round(min(1.0, max(0.0, share)) * (WIDTH - 1))
