"""Rewards and rules of the user's own: found by ``FILE.py:FUNCTION``, or by a name that an installed package offers.

A package offers them under the entry point groups ``rlfr.rewards`` and ``rlfr.rules``, each name for one function.
What is found is the trusted code of the user: it is imported and run as it is, with every right that rlfr itself has.
Standard library only.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import sys
from collections.abc import Callable
from enum import StrEnum
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from rlfr_cli.artifacts.fingerprint import file_fingerprint
from rlfr_cli.errors import ConfigError, InputError, MissingInputError

FILE_SPEC = re.compile(r"(?P<path>.+\.py):(?P<function>[^\W\d]\w*)", re.DOTALL)


class Kind(StrEnum):
    """What a user may add."""

    REWARD = "reward"
    RULE = "rule"

    @property
    def group(self) -> str:
        """The entry point group that packages offer it in."""
        return f"rlfr.{self.value}s"


def find_extension(name: str, kind: Kind) -> Callable[..., Any] | None:
    """The user's function of that name; None where no file and no installed package is meant.

    Args:
        name: ``FILE.py:FUNCTION``, or an entry point's name.

    Raises:
        MissingInputError: there is no such file.
        InputError: the file or the package cannot be imported.
        ConfigError: the file has no such function, or several packages offer the name.
    """
    if match := FILE_SPEC.fullmatch(name):
        return _function_of_file(Path(match["path"]).expanduser(), match["function"], kind)
    entry = _entry_point(name, kind)
    return None if entry is None else _function_of_package(entry, kind)


def extension_fingerprint(name: str, kind: Kind) -> str | None:
    """What an artifact remembers of it: the digest of the file, or the package with its version.

    Raises:
        MissingInputError: there is no such file.
    """
    if match := FILE_SPEC.fullmatch(name):
        return file_fingerprint(Path(match["path"]).expanduser())
    entry = _entry_point(name, kind)
    return None if entry is None else _package(entry)


def installed_names(kind: Kind) -> list[str]:
    """The names that installed packages offer."""
    return sorted(entry_points(group=kind.group).names)


def warning_if_hidden(name: str, kind: Kind) -> str | None:
    """What to say where a package offers the name of one that is built in, which is the one that counts."""
    packages = sorted(map(_package, entry_points(group=kind.group, name=name)))
    if not packages:
        return None
    return f"{name} is the {kind} of rlfr itself; the one of that name in {' and '.join(packages)} is not used"


def finite_number(value: Any) -> float | None:
    """The number that a user's function returned; None for text, NaN, infinity, an array of several."""
    if isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is a tensor's, for several values
        return None
    return number if math.isfinite(number) else None


def _function_of_file(path: Path, name: str, kind: Kind) -> Callable[..., Any]:
    if not path.is_file():
        raise MissingInputError(f"there is no {kind} file {path}", hint="check the path")
    module = _module_of_file(path)
    function = getattr(module, name, None)
    if not callable(function):
        there = sorted(
            key
            for key, value in vars(module).items()
            if callable(value) and not isinstance(value, type) and not key.startswith("_")
        )
        close = difflib.get_close_matches(name, there, n=1)
        raise ConfigError(
            f"{path} has no function {name!r}; it has {', '.join(there) or 'none'}",
            hint=f"did you mean {path}:{close[0]}?" if close else f"define {name} in {path}",
        )
    return function


def _module_of_file(path: Path) -> ModuleType:
    """The file as a module; imported once as long as it does not change, so that its functions share it."""
    source = path.read_bytes()
    digest = hashlib.sha256(str(path.resolve()).encode() + b"\0" + source).hexdigest()
    name = f"rlfr_file_{path.stem}_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        # Compiled here and not by importlib, whose cached bytecode takes a file of equal size and second for unchanged.
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    except Exception as error:  # the user's file may fail in any way at import
        del sys.modules[name]
        raise InputError(
            f"{path} cannot be imported: {type(error).__name__}: {error}",
            hint=f"try: python -P {path} (it may import installed packages, and no files that lie beside it)",
        ) from error
    return module


def _entry_point(name: str, kind: Kind) -> EntryPoint | None:
    found = sorted(entry_points(group=kind.group, name=name), key=_package)
    if len(found) > 1:
        raise ConfigError(
            f"several packages offer a {kind} {name!r}: {', '.join(map(_package, found))}",
            hint="uninstall all but one, or name the function of one file: FILE.py:FUNCTION",
        )
    return found[0] if found else None


def _function_of_package(entry: EntryPoint, kind: Kind) -> Callable[..., Any]:
    try:
        function = entry.load()
    except Exception as error:  # a package may fail in any way at import
        raise InputError(
            f"the {kind} {entry.name!r} of the package {_package(entry)} cannot be loaded from {entry.value}: "
            f"{type(error).__name__}: {error}",
            hint="install the package again, or tell its authors",
        ) from error
    if not callable(function):
        raise InputError(
            f"the {kind} {entry.name!r} of the package {_package(entry)} is no function: {entry.value} is {function!r}",
            hint="tell its authors",
        )
    return function


def _package(entry: EntryPoint) -> str:
    assert entry.dist is not None  # found among the installed packages
    return f"{entry.dist.name} {entry.dist.version}"
