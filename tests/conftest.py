"""Fixtures that every test module may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recorded vectors and problem sets; a test that asks for it is skipped without it."""
    folder = Path(os.environ.get("RLFR_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "conformance").is_dir():
        pytest.skip(f"no recorded vectors: {folder} does not exist (set RLFR_SHARED)")
    return folder
