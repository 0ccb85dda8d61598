"""Ctrl-C and SIGTERM where several processes work together: all of them stop at the same place.

One that left alone, between two collectives, would leave the others waiting in the next.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self

from rlfr_cli import console
from rlfr_cli.engines.ranks import Ranks


class StopTogether:
    """Remembers the signal until all processes look; a second Ctrl-C stops at once. One process stops at once too.

    Attributes:
        together: all processes stop, or there is one alone.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.requested, self.together = ranks, False, ranks.alone

    def check(self) -> None:
        """To be called by all processes side by side.

        Raises:
            KeyboardInterrupt: in all of them, if one was told to stop.
        """
        if not self.ranks.alone and self.ranks.any(self.requested):
            self.together = True
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        if not self.ranks.alone:
            self._earlier = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.ranks.alone:
            for number, handler in self._earlier.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self.ranks.is_first:
            console.log("stopping when all processes have done their step (Ctrl-C again stops at once)")
