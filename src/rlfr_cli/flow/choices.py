"""The named choices of the flow's mathematics. Standard library only, so that configs can use them."""

from __future__ import annotations

from enum import StrEnum


class Context(StrEnum):
    """Where the condition of the target h[k] comes from; the published names are in brackets."""

    NEXT = "next"  # h[k + shift] (token_pre)
    PREVIOUS = "previous"  # h[k - shift] (token_post)
    SELF = "self"  # h[k] (identity)


class Normalise(StrEnum):
    """How the scores of one response are scaled before thresholds."""

    MINMAX = "minmax"
    MINMAX_SIGNED = "minmax-signed"
    NONE = "none"
