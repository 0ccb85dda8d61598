"""What rlfr says: words and progress for people on stderr, data on stdout.

Colour and live progress bars appear only on a terminal, and no colour where NO_COLOR is set; in a pipe or a
file progress is a plain line every ten seconds.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rlfr_cli.report.tables import format_duration, summary_lines

SECONDS_BETWEEN_LINES = 10.0
BOLD, RED, YELLOW = "1", "31", "33"

_quiet = False
_live: Any = None  # the bars on the terminal, shared by nested progress


def set_quiet(quiet: bool) -> None:
    """Leave out `log`, progress and summaries; warnings and errors stay."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether `set_quiet` was asked for."""
    return _quiet


def log(text: str) -> None:
    """Say something to the person at the terminal."""
    if not _quiet:
        _write(text)


def warn(text: str) -> None:
    """Say something that may be wrong."""
    _write(_styled("warning:", YELLOW) + " " + text)


def error(text: str, *, hint: str | None = None) -> None:
    """Say why a command ends, and the next step."""
    _write(_styled("error:", RED) + " " + text)
    if hint is not None:
        _write("\n" + _styled("hint:", BOLD) + " " + hint)


def print_summary(title: str, summary: Mapping[str, Any]) -> None:
    """Show what a command did, as a table on stderr."""
    log("\n".join([_styled(title, BOLD), *("  " + line for line in summary_lines(summary))]))


def emit_json(data: Any) -> None:
    """Write one JSON value to stdout; numbers that JSON does not know (NaN, infinity) become null."""
    emit(json.dumps(_json_value(data)))


def emit(text: str) -> None:
    """Write text that is a command's answer to stdout, and end quietly if its reader has gone."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes stdout again when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


class Progress:
    """A count of work done, with its rate and the time left; made by `progress`."""

    def __init__(self, description: str, *, total: int | None, unit: str, done: int) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = self.done_before = done
        self.note = ""
        self._owns_live = False
        self._task: Any = None

    def __enter__(self) -> Progress:
        global _live
        self._start = self._last_line = time.monotonic()
        if not _quiet and sys.stderr.isatty():
            if _live is None:
                _live, self._owns_live = _live_bars(), True
                _live.start()
            self._task = _live.add_task(self.description, total=self.total, completed=self.done, status=self.status())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _live
        if self._task is not None:
            _live.remove_task(self._task)
        if self._owns_live:
            _live.stop()
            _live = None
        took = format_duration(time.monotonic() - self._start)
        log(f"{self.description}: {'stopped at ' if kind else ''}{self._count()} in {took}{self._note()}")

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        """Count `amount` more as done; `note` stays on show until the next one, such as "reward 0.31"."""
        self.done += amount
        self.note = self.note if note is None else note
        now = time.monotonic()
        if self._task is not None:
            _live.update(self._task, completed=self.done, status=self.status())
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            log(f"{self.description}: {self.status()}")

    def status(self) -> str:
        """Return `128/512 responses, 3.2/s, 2 min 0 s left`; the rate leaves out what was done before."""
        elapsed = time.monotonic() - self._start
        fresh = self.done - self.done_before
        parts = [self._count()]
        if fresh > 0 and elapsed > 0:
            rate = fresh / elapsed
            parts.append(f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each")
            if self.total is not None:
                parts.append(f"{format_duration((self.total - self.done) / rate)} left")
        return ", ".join(parts) + self._note()

    def _count(self) -> str:
        return f"{self.done}/{self.total} {self.unit}" if self.total is not None else f"{self.done} {self.unit}"

    def _note(self) -> str:
        return f" ({self.note})" if self.note else ""


def progress(description: str, *, total: int | None, unit: str, done: int = 0) -> Progress:
    """Show progress while a `with` block runs.

    Args:
        description: what is being done, such as "sampling".
        total: how much there is; None when that is not known.
        unit: what is counted, in the plural.
        done: how much an earlier run had done already.
    """
    return Progress(description, total=total, unit=unit, done=done)


def _live_bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[status]}", markup=False),
    )
    # What is printed to stderr meanwhile appears above the bars; stdout is data and stays as it is.
    return RichProgress(*columns, console=Console(stderr=True), redirect_stdout=False, transient=True)


def _styled(text: str, code: str) -> str:
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text


def _write(text: str) -> None:
    # A reader of the log that went away must not cost the run its work.
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
