"""The outcome reward of a response. Reads its grade and how it ended; writes one number.

``published`` is the reward of the RLFR repository's rule server as it was meant, ``accuracy`` the plain one;
a user's own function comes from a Python file or an installed package.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from rlfr_cli.errors import ConfigError, InputError
from rlfr_cli.extensions import Kind, find_extension, finite_number, installed_names
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
    """The reward function that ``spec`` names.

    Args:
        spec: ``published``, ``accuracy``, ``path/to/file.py:function``, or a name that an installed package offers
            under the entry point group ``rlfr.rewards``. Such a function is run as the trusted code of the user
            that it is. It takes a list of :class:`RewardInput` and returns one finite number for each.

    Raises:
        ConfigError: no such reward, or no such function in the file.
        MissingInputError: no such file.
        InputError: the file or package does not import, or, when called, the values are not as many or not finite.
    """
    if spec == OutcomeReward.PUBLISHED:
        return published_reward
    if spec == OutcomeReward.ACCURACY:
        return accuracy_reward
    function = find_extension(spec, Kind.REWARD)
    if function is None:
        known = list(dict.fromkeys([*OutcomeReward, *installed_names(Kind.REWARD)]))
        close = difflib.get_close_matches(spec, known, n=1)
        raise ConfigError(
            f"no reward is called {spec!r}; there are {', '.join(known)} and FILE.py:FUNCTION",
            hint=f"did you mean {close[0]}?" if close else "name file and function, as in my_reward.py:score",
        )
    return _checked(function, spec)


def _checked(function: Callable[..., Any], spec: str) -> RewardFunction:
    """The user's function with its result checked, so that a slip is an error at once and not a bad run."""
    wanted = "return one finite number for each item of the list it is given, in order"

    def rewards(inputs: list[RewardInput]) -> list[float]:
        returned = function(list(inputs))
        if not isinstance(returned, Iterable):
            raise InputError(f"{spec} gave {returned!r} for {len(inputs)} responses", hint=wanted)
        values = list(returned)
        if len(values) != len(inputs):
            raise InputError(f"{spec} gave {len(values)} rewards for {len(inputs)} responses", hint=wanted)
        checked = []
        for index, value in enumerate(values):
            number = finite_number(value)
            if number is None:
                raise InputError(f"{spec} gave {value!r} for response {index}", hint=wanted)
            checked.append(number)
        return checked

    return rewards
