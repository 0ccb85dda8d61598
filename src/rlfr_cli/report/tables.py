"""Plain-text tables for people: values in, lines out. Nothing is printed here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class Drawing(list[str]):
    """Lines of a picture in a summary: shown to people as they are, and left out of JSON."""


def format_value(value: Any) -> str:
    """Write a value shortly: four significant digits, thousands apart, yes and no, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(format_value(item) for item in value) or "-"
    return str(value)


def format_duration(seconds: float) -> str:
    """Write a duration in its two largest units: `42 s`, `3 min 7 s`, `2 h 5 min`, `1 d 4 h`."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60} min"
    return f"{total // 86400} d {total % 86400 // 3600} h"


def text_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> list[str]:
    """Return a header and one aligned line a row; numbers sit at the right of their column.

    Args:
        columns: which keys to show, in this order; those of all rows, as first met, by default.
    """
    names = list(columns) if columns is not None else list(dict.fromkeys(key for row in rows for key in row))
    cells = [[format_value(row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    numeric = [
        all(isinstance(row.get(name), (int, float, type(None))) for row in rows) and bool(rows) for name in names
    ]

    def line(texts: Sequence[str]) -> str:
        aligned = zip(texts, widths, numeric, strict=True)
        return "  ".join(text.rjust(w) if right else text.ljust(w) for text, w, right in aligned).rstrip()

    return [line(names), *(line(row) for row in cells)]


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return a nested summary as aligned lines, keys joined by a slash; lists of dicts become tables."""
    flat = list(_flatten(summary, ""))
    width = max((len(key) for key, value in flat if not (_is_table(value) or isinstance(value, Drawing))), default=0)
    lines: list[str] = []
    for key, value in flat:
        if isinstance(value, Drawing):
            lines += ["", key, *("  " + line for line in value)]
        elif _is_table(value):
            lines += ["", key, *("  " + line for line in text_table(value))]
        else:
            lines.append(f"{key.ljust(width)}  {format_value(value)}")
    return lines


def _is_table(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _flatten(summary: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in summary.items():
        if isinstance(value, Mapping) and value.keys() == {"value", "low", "high", "count"}:
            yield f"{prefix}{key}", _estimate_text(value)
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _estimate_text(estimate: Mapping[str, Any]) -> str:
    """``0.631 (0.573 to 0.69, n = 44)``: a value, its 95 % interval and the number of independent units."""
    value, low, high = (format_value(estimate[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high}, n = {estimate['count']})" if estimate["value"] is not None else "-"
