"""The verdicts of the grader."""

from __future__ import annotations

from enum import StrEnum


class Grade(StrEnum):
    """What the text of one response is worth; how the response ended is judged elsewhere."""

    CORRECT = "correct"
    """the boxed answer equals an accepted answer"""
    WRONG = "wrong"
    """the boxed answer was read and equals none of them"""
    NO_ANSWER = "no_answer"
    """there is no complete box"""
    UNPARSEABLE = "unparseable"
    """the box is empty, too long, or not mathematics that math-verify reads"""
    TIMEOUT = "timeout"
    """the comparison took too long or too much memory, and its worker was replaced"""
    UNGRADED = "ungraded"
    """the problem has no accepted answer"""
