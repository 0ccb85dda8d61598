"""A package as pip leaves it, with entry points, for tests of what packages add to rlfr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest


def install(
    monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, entry_points: str, code: str = "", version: str = "1.2"
) -> None:
    """Put a package on the path, with one module of its name.

    Args:
        entry_points: what its ``entry_points.txt`` holds.
        code: the module's.
    """
    site = folder / f"site-{name}"
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)
    (site / f"{name}.py").write_text(code)
    # Another test may have imported a package of that name.
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(site))


def group(name: str, lines: Sequence[str]) -> str:
    """A group of entry points: ``[name]`` and lines such as ``short = package:short``."""
    return "\n".join([f"[{name}]", *lines, ""])
