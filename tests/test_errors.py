"""Errors: each of a standard kind too, with its hint on a line of its own."""

from __future__ import annotations

import pickle

import pytest

from rlfr_cli import errors
from rlfr_cli.errors import InputError, RlfrError, Stopped, WorkError, during_work

KINDS = {
    "ConfigError": (ValueError, 2),
    "InputError": (ValueError, 2),
    "MissingInputError": (FileNotFoundError, 2),
    "ArtifactError": (ValueError, 2),
    "MismatchError": (ValueError, 2),
    "OutputInUseError": (FileExistsError, 2),
    "OutputSpaceError": (OSError, 2),
    "MissingPackageError": (ImportError, 2),
    "WorkError": (RuntimeError, 1),
    "Stopped": (InterruptedError, 130),
    "StoppedAtOnce": (InterruptedError, 130),
}


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(child) for child in kind.__subclasses__()))


def test_every_error_is_listed_here() -> None:
    assert {kind.__name__ for kind in subclasses(RlfrError)} == {*KINDS, "RlfrError"}


@pytest.mark.parametrize("name", KINDS)
def test_an_error_is_of_a_standard_kind_and_has_an_exit_code(name: str) -> None:
    error = getattr(errors, name)("went wrong", hint="turn round")
    standard, exit_code = KINDS[name]
    assert isinstance(error, standard)
    assert error.exit_code == exit_code
    assert (error.message, error.hint) == ("went wrong", "turn round")


@pytest.mark.parametrize("name", KINDS)
def test_the_hint_stands_on_a_line_of_its_own(name: str) -> None:
    kind = getattr(errors, name)
    assert str(kind("went wrong", hint="turn round")) == "went wrong\n\nhint: turn round"
    assert str(kind("went wrong")) == "went wrong"


@pytest.mark.parametrize("name", KINDS)
def test_errors_survive_the_way_between_processes(name: str) -> None:
    error = pickle.loads(pickle.dumps(getattr(errors, name)("went wrong", hint="turn round")))
    assert type(error).__name__ == name
    assert str(error) == "went wrong\n\nhint: turn round"


def test_a_failure_during_work_has_exit_code_1() -> None:
    with pytest.raises(InputError) as caught, during_work():
        raise InputError("a shard is cut")
    assert caught.value.exit_code == 1
    assert InputError("before work").exit_code == 2


def test_stops_and_other_errors_keep_theirs() -> None:
    with pytest.raises(Stopped) as caught, during_work():
        raise Stopped("saved")
    assert caught.value.exit_code == 130
    with pytest.raises(WorkError) as failed, during_work():
        raise WorkError("NaN")
    assert failed.value.exit_code == 1
    with pytest.raises(ZeroDivisionError), during_work():
        raise ZeroDivisionError
