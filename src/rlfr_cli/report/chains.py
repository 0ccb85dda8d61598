"""Where a chain of sums goes wrong: the first wrong token of a step's result, or of a number copied wrongly.

Problems of this form are the embedded ones, such as ``(28+5)*2-38``: numbers and operations that are done from left
to right. Their one right chain is ``28+5=33;33*2=66;66-38=28;\\boxed{28}``, so what a response writes is right up to
the first character at which it leaves that chain. A response that does the operations in another order leaves it too,
so only wrong responses should be asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """Where a token stands in a chain, the same in chains of other numbers.

    Attributes:
        step: of the chain from 0; the boxed answer has the step after the last.
        part: ``left``, ``right`` or ``result``.
        offset: digit of the number from 0.
        is_digit: a digit was written; otherwise the number ended here.
    """

    step: int
    part: str
    offset: int
    is_digit: bool


def first_wrong_token(problem: str, token_texts: Sequence[str]) -> int | None:
    """Index of the token that holds the first wrong digit, or that stands where a digit is missing.

    Returns:
        None for a problem of another form, a response that never leaves the right chain, or one that leaves it
        elsewhere than in a number (another operation, a step left out).
    """
    place = first_wrong_place(problem, token_texts)
    return None if place is None else place[0]


def first_wrong_place(problem: str, token_texts: Sequence[str]) -> tuple[int, Place] | None:
    """The first wrong token as ``first_wrong_token`` gives it, and its place."""
    chain = right_chain(problem)
    if chain is None:
        return None
    start = 0
    for token, text in enumerate(token_texts):
        place = None
        for written, (wanted, step, part, offset) in zip(text, chain[start:], strict=False):
            if part and place is None:
                place = Place(step, part, offset, written.isdigit())
            if written != wanted:
                in_number = part and (written.isdigit() or (wanted.isdigit() and offset > 0))
                return (token, place) if in_number and place is not None else None
        start += len(text)
        if start >= len(chain):
            return None
    return None


def number_places(problem: str, token_texts: Sequence[str]) -> dict[int, Place] | None:
    """Tokens of the numbers of a response that is the right chain to its end, and their places; None for another."""
    chain = right_chain(problem)
    if chain is None:
        return None
    text = "".join(wanted for wanted, *_ in chain)
    if not "".join(token_texts).startswith(text):
        return None
    places, start = {}, 0
    for token, token_text in enumerate(token_texts):
        for wanted, step, part, offset in chain[start : start + len(token_text)]:
            if part:
                places[token] = Place(step, part, offset, wanted.isdigit())
                break
        start += len(token_text)
    return places


def right_chain(problem: str) -> list[tuple[str, int, str, int]] | None:
    """Characters of the right chain with step, part ("" outside numbers) and offset; None for another form.

    The character after a number is part of it: there one finds out that it has ended.
    """
    numbers, operations = re.findall(r"\d+", problem), re.findall(r"[-+*/]", problem)
    if not operations or len(numbers) != len(operations) + 1 or _write(numbers, operations) != problem:
        return None
    chain: list[tuple[str, int, str, int]] = []

    def add_number(text: str, end: str, step: int, part: str) -> None:
        chain.extend((character, step, part, offset) for offset, character in enumerate(text + end))

    value = int(numbers[0])
    for step, (operation, right) in enumerate(zip(operations, numbers[1:], strict=True)):
        result = _apply(value, operation, int(right))
        if result is None:
            return None
        add_number(str(value), operation, step, "left")
        add_number(right, "=", step, "right")
        add_number(str(result), ";", step, "result")
        value = result
    chain.extend((character, len(operations), "", 0) for character in r"\boxed{")
    add_number(str(value), "}", len(operations), "result")
    return chain


def _write(numbers: Sequence[str], operations: Sequence[str]) -> str:
    """The problem that means these operations from left to right, with no more parentheses than it takes."""
    text, is_sum = numbers[0], False
    for operation, number in zip(operations, numbers[1:], strict=True):
        binds = operation in "*/"
        text = (f"({text})" if binds and is_sum else text) + operation + number
        is_sum = not binds
    return text


def _apply(left: int, operation: str, right: int) -> int | None:
    """A whole result from 0 on, else None."""
    if operation == "/":
        return left // right if right and left % right == 0 else None
    result = {"+": left + right, "-": left - right, "*": left * right}[operation]
    return result if result >= 0 else None
