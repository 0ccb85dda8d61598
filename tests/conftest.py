"""Fixtures that every test module may use."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tiny_policies import ModelFolders

REPOSITORY = Path(__file__).resolve().parent.parent

# A shell without job control starts what runs in its background deaf to Ctrl-C, and programs started by tests with it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> ModelFolders:
    """Tiny models, each made once a session."""
    from tiny_policies import ModelFolders  # here, so that tests of the rest start without transformers

    return ModelFolders(tmp_path_factory.mktemp("models"))
