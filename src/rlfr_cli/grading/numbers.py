"""Judges plain numbers without math-verify. Reads strings; follows math-verify 0.9's rules for them.

Most answers are short integers, and comparing those needs no worker process. Decimals are equal to
math-verify when they agree after rounding to six places, so a near miss is left to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from rlfr_cli.grading.grades import Grade

MAX_NUMBER_CHARACTERS = 40
MAX_ANSWER_CHARACTERS = 2000
"""Longer answers are unparseable; the longest accepted one of the usual problem sets has 204."""

_PLAIN_NUMBER = re.compile(r"-?(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")
_NEAR = Decimal("0.000002")


def plain_number(text: str) -> Decimal | None:
    """The value of a short integer or decimal, thousands separators allowed; None for anything else."""
    if len(text) > MAX_NUMBER_CHARACTERS or not _PLAIN_NUMBER.fullmatch(text):
        return None
    return Decimal(text.replace(",", ""))


def quick_grade(answer: str, accepted: Sequence[str]) -> Grade | None:
    """The verdict where it takes no algebra: exact copies, empty or overlong answers, plain numbers.

    An exact copy of an accepted answer is correct even if math-verify cannot read it. None: ask math-verify.
    """
    if answer and answer in accepted:
        return Grade.CORRECT
    if not answer or len(answer) > MAX_ANSWER_CHARACTERS:
        return Grade.UNPARSEABLE
    value = plain_number(answer)
    if value is None:
        return None
    golds = [plain_number(gold) for gold in accepted]
    if value in golds:
        return Grade.CORRECT
    if any(gold is None or abs(gold - value) < _NEAR for gold in golds):
        return None
    return Grade.WRONG
