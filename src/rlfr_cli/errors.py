"""Errors that a user can act on.

Every error says what is wrong, the value seen, what is allowed, and, in ``hint``, the next step. Only the
command line turns them into text and an exit code: 2 for anything found before work starts, 1 for a failure
during work, 130 for a stop that saved first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class RlfrError(Exception):
    """Base of every error meant for the user.

    Args:
        message: what is wrong, with the value seen and what is allowed.
        hint: the next step, printed on a line of its own.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


class ConfigError(RlfrError, ValueError):
    """A command line, recipe or config that cannot be meant."""


class InputError(RlfrError, ValueError):
    """An input (problems, responses, model folder) that cannot be used."""


class MissingInputError(InputError, FileNotFoundError):
    """An input path that does not exist."""

    __str__ = RlfrError.__str__


class ArtifactError(RlfrError, ValueError):
    """An artifact that is missing a piece, cut, altered, or of another format version."""


class MismatchError(RlfrError, ValueError):
    """Two artifacts that do not belong together, such as a flow and another model."""


class OutputInUseError(RlfrError, FileExistsError):
    """An output folder that holds another config's work."""

    __str__ = RlfrError.__str__


class OutputSpaceError(RlfrError, OSError):
    """Too little free disk for what would be written."""

    __str__ = RlfrError.__str__


class MissingPackageError(RlfrError, ImportError):
    """An optional package that the chosen option needs."""

    __str__ = RlfrError.__str__


class WorkError(RlfrError, RuntimeError):
    """A failure during work, such as a loss that stays NaN."""

    exit_code = 1


class Stopped(RlfrError, InterruptedError):
    """Ctrl-C or SIGTERM; everything was saved before this was raised."""

    exit_code = 130
    __str__ = RlfrError.__str__


class StoppedAtOnce(Stopped):
    """Ctrl-C twice: what was saved before stays, and processes that work with this one were not asked."""


@contextmanager
def during_work() -> Iterator[None]:
    """Give errors raised inside the exit code of a failure during work."""
    try:
        yield
    except RlfrError as error:
        if error.exit_code == 2:
            error.exit_code = 1
        raise
