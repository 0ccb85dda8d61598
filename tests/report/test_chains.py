"""The first wrong token of a chain, and the places that tokens are compared at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlfr_cli.report.chains import Place, first_wrong_place, first_wrong_token, number_places, right_chain

PROBLEM = "(28+5)*2-38"
RIGHT = r"28+5=33;33*2=66;66-38=28;\boxed{28}"


def tokens(text: str) -> list[str]:
    """One character a token, but for the box, and the end token."""
    return [{"#": "\\boxed{"}.get(character, character) for character in text.replace("\\boxed{", "#")] + ["<end>"]


@pytest.mark.parametrize(
    ("response", "wrong"),
    [
        ("28+5=34;34*2=68;68-38=30;\\boxed{30}", 6),  # the second digit of the first result
        ("28+5=33;33*2=76;76-38=38;\\boxed{38}", 13),  # the first digit of the second result
        ("28+5=33;38*2=76;76-38=38;\\boxed{38}", 9),  # the result copied wrongly
        ("28+6=34;34*2=68;68-38=30;\\boxed{30}", 3),  # the problem copied wrongly
        ("28+5=33;33*2=66;66-38=28;\\boxed{29}", 27),  # the answer copied wrongly, after one token for the box
        ("28+5=3;3*2=6;\\boxed{6}", 6),  # a digit is missing where the number ends
        ("28+5=333;\\boxed{3}", 7),  # a digit too many
        ("28+5=3", 6),  # ends where a digit is missing
    ],
)
def test_first_wrong_token(response: str, wrong: int) -> None:
    assert first_wrong_token(PROBLEM, tokens(response)) == wrong


@pytest.mark.parametrize(
    "response", [RIGHT, "28-5=23;23*2=46;46-38=8;\\boxed{8}", "28+5=33;33*2=66;\\boxed{66}", "28+5=33;;", "28+5=33"]
)
def test_a_response_that_leaves_no_number_wrongly_has_no_first_wrong_token(response: str) -> None:
    """Right; another operation; a step left out; a stray character; an end."""
    assert first_wrong_token(PROBLEM, tokens(response)) is None


@pytest.mark.parametrize("problem", ["How many?", "2+3*4", "(2)+3", "7/2+1", "3-5+9", "28", "2 + 3", "2+(3*4)"])
def test_problems_of_another_form_are_left_alone(problem: str) -> None:
    """Words; an order that is not from left to right; no whole or no positive value on the way; no operation."""
    assert right_chain(problem) is None
    assert first_wrong_token(problem, tokens("1+1=3;")) is None
    assert number_places(problem, tokens("1+1=3;")) is None


def test_a_token_of_several_digits_is_wrong_with_any_of_them() -> None:
    texts = ["28", "+", "5", "=", "34", ";"]
    assert first_wrong_place(PROBLEM, texts) == (4, Place(0, "result", 0, True))


def test_places_tell_step_number_digit_and_end() -> None:
    places = number_places(PROBLEM, tokens(RIGHT))
    assert places is not None
    assert (places[5], places[6]) == (Place(0, "result", 0, True), Place(0, "result", 1, True))
    assert places[7] == Place(0, "result", 2, False)
    assert places[11] == Place(1, "right", 0, True)
    assert places[26] == Place(3, "result", 0, True)
    assert 25 not in places  # the box
    assert first_wrong_place(PROBLEM, tokens("28+5=34;")) == (6, places[6])
    assert number_places(PROBLEM, tokens("28+5=34;34*2=68;68-38=30;\\boxed{30}")) is None


def test_the_chain_of_every_embedded_problem_is_its_solution(repository: Path) -> None:
    for line in (repository / "data" / "expert.jsonl").read_text().splitlines():
        row = json.loads(line)
        chain = right_chain(row["problem"])
        assert chain is not None
        assert "".join(character for character, *_ in chain) == row["solution"]
