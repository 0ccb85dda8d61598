"""How a learning rate goes down."""

from __future__ import annotations

from enum import StrEnum


class Schedule(StrEnum):
    """How the learning rate goes down after the warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"
