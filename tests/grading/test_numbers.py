from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlfr_cli.grading.grades import Grade
from rlfr_cli.grading.numbers import MAX_ANSWER_CHARACTERS, plain_number, quick_grade
from rlfr_cli.grading.worker import judge, parses


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", Decimal(42)),
        ("-1,250.50", Decimal("-1250.5")),
        ("033", Decimal(33)),
        ("1,25", None),
        ("0,250", None),
        ("1250,000", None),
        (".5", None),
        ("5.", None),
        ("1e3", None),
        ("٣", None),
        ("", None),
        ("1" * 41, None),
    ],
)
def test_plain_number(text, value):
    assert plain_number(text) == value


@pytest.mark.parametrize(
    ("answer", "accepted", "grade"),
    [
        ("42.0", ["42"], Grade.CORRECT),
        ("41", ["42"], Grade.WRONG),
        ("-42", ["42"], Grade.WRONG),
        ("7", ["8", "7"], Grade.CORRECT),
        (r"E_1, E_2", [r"E_1, E_2"], Grade.CORRECT),
        ("", ["42"], Grade.UNPARSEABLE),
        ("1" * (MAX_ANSWER_CHARACTERS + 1), ["42"], Grade.UNPARSEABLE),
        ("0.3333333", ["0.3333334"], None),
        ("0.5", [r"\frac{1}{2}"], None),
        ("x", ["42"], None),
    ],
)
def test_quick_grade(answer, accepted, grade):
    assert quick_grade(answer, accepted) is grade


NUMBERS = st.one_of(
    st.integers(-(10**12), 10**12).map(str),
    st.integers(-(10**12), 10**12).map("{:,}".format),
    st.decimals(-(10**6), 10**6, places=3).map(str),
    st.integers(0, 999).map("{:05d}".format),
)


@given(NUMBERS, NUMBERS, st.sampled_from([0, 1, -1]))
@settings(max_examples=150, deadline=None)
def test_quick_grade_agrees_with_math_verify(first, second, offset):
    near = str(Decimal(first.replace(",", "")) + offset)
    for answer, accepted in ((first, second), (near, first), (first, near)):
        grade = quick_grade(answer, [accepted])
        assert grade is None or grade is judge(answer, [accepted])


def test_numbers_of_the_problem_sets_agree_with_math_verify(accepted_answers):
    numbers = {
        gold for rows in accepted_answers.values() for golds in rows for gold in golds if plain_number(gold) is not None
    }
    assert len(numbers) > 1000
    for gold in sorted(numbers):
        assert parses(gold)
        changed = str(plain_number(gold) + 1)
        for answer in (gold, changed, f"{plain_number(gold):.2f}"):
            grade = quick_grade(answer, [gold])
            assert grade is None or grade is judge(answer, [gold]), (answer, gold)
