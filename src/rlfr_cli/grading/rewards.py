"""The outcome reward of a response. Reads its grade and how it ended; writes one number.

``published`` is the reward of the RLFR repository's rule server as it was meant, ``accuracy`` the plain one;
a user's own function comes from a Python file.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rlfr_cli.errors import ConfigError, InputError, MissingInputError
from rlfr_cli.grading.grades import Grade


class OutcomeReward(StrEnum):
    """The rewards that need no file."""

    PUBLISHED = "published"
    ACCURACY = "accuracy"


@dataclass(frozen=True)
class RewardInput:
    """What a reward function sees of one response."""

    problem: str
    answers: tuple[str, ...]
    response: str
    finish_reason: str
    """``stop`` or ``length``"""
    grade: Grade


RewardFunction = Callable[[list[RewardInput]], list[float]]


def is_accepted(grade: Grade | str, finish_reason: str) -> bool:
    """Whether a response may serve as reference: correct, and finished by itself."""
    return grade == Grade.CORRECT and finish_reason == "stop"


def published_reward(inputs: Sequence[RewardInput]) -> list[float]:
    """1 for correct, 0.5 for a box that is wrong or unreadable, else 0; 0 for whatever was cut off."""
    partial = (Grade.WRONG, Grade.UNPARSEABLE)
    return [
        0.0 if i.finish_reason != "stop" else 1.0 if i.grade == Grade.CORRECT else 0.5 * (i.grade in partial)
        for i in inputs
    ]


def accuracy_reward(inputs: Sequence[RewardInput]) -> list[float]:
    """1 for a correct answer in a response that finished by itself, else 0."""
    return [float(is_accepted(i.grade, i.finish_reason)) for i in inputs]


def load_reward(spec: str) -> RewardFunction:
    """The reward function that ``spec`` names: ``published``, ``accuracy`` or ``path/to/file.py:function``.

    A function from a file is run as the trusted code of the user that it is. It takes a list of
    :class:`RewardInput` and returns one finite number for each.

    Raises:
        ConfigError: no such reward, or no such function in the file.
        MissingInputError: no such file.
        InputError: the file does not import, or, when called, the values are not as many or not finite.
    """
    if spec == OutcomeReward.PUBLISHED:
        return published_reward
    if spec == OutcomeReward.ACCURACY:
        return accuracy_reward
    path, separator, name = spec.rpartition(":")
    if not separator or not path.endswith(".py"):
        close = difflib.get_close_matches(spec, list(OutcomeReward), n=1)
        raise ConfigError(
            f"no reward is called {spec!r}; there are {', '.join(OutcomeReward)} and FILE.py:FUNCTION",
            hint=f"did you mean {close[0]}?" if close else "name both, as in my_reward.py:score",
        )
    return _checked(_function_from_file(Path(path).expanduser(), name), spec)


def _function_from_file(path: Path, name: str) -> Callable[..., Any]:
    if not path.is_file():
        raise MissingInputError(f"there is no reward file {path}", hint="check the path")
    module_spec = importlib.util.spec_from_file_location(f"rlfr_reward_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # the user's file may fail in any way at import
        raise InputError(
            f"{path} cannot be imported: {type(error).__name__}: {error}", hint=f"try: python {path}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        there = sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_")
        close = difflib.get_close_matches(name, there, n=1)
        raise ConfigError(
            f"{path} has no function {name!r}; it has {', '.join(there) or 'none'}",
            hint=f"did you mean {path}:{close[0]}?" if close else f"define {name}(inputs) in {path}",
        )
    return function


def _checked(function: Callable[..., Any], spec: str) -> RewardFunction:
    """The user's function with its result checked, so that a slip is an error at once and not a bad run."""
    wanted = "return one finite number for each item of the list it is given, in order"

    def rewards(inputs: list[RewardInput]) -> list[float]:
        values = list(function(list(inputs)))
        if len(values) != len(inputs):
            raise InputError(f"{spec} gave {len(values)} rewards for {len(inputs)} responses", hint=wanted)
        checked = []
        for index, value in enumerate(values):
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise InputError(f"{spec} gave {value!r} for response {index}", hint=wanted)
            checked.append(number)
        return checked

    return rewards
