r"""Finds the final answer in the text of a response. Reads and writes strings only.

The answer is what stands in the last complete ``\boxed{}`` or ``\fbox{}``, as the prompts of this field ask
for it. One pass over the text with a stack of open braces keeps the work linear in its length, however many
braces a response opens and never closes.
"""

from __future__ import annotations

import re
from enum import StrEnum


class AnswerFallback(StrEnum):
    """What counts as the answer of a response without a box."""

    NONE = "none"
    LAST_NUMBER = "last-number"


# Escaped braces are text, not grouping. A doubled backslash is a line break, except before a box: models that
# have read a lot of JSON write \\boxed.
_TOKEN = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{)?|\\\\(?!boxed|fbox)|\\[{}]|[{}]")
_UNBRACED_ANSWER = re.compile(r"[-+]?[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?(?:/[0-9]+)?|[A-Za-z](?![A-Za-z])")
_NUMBER = re.compile(r"(?:(?<![\w)\]}])-)?(?:[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?(?:/[0-9]+)?|\.[0-9]+)")
_LEADING_RELATION = re.compile(r"^(?:=|\\approx(?![A-Za-z]))\s*")
_FULL_STOP = re.compile(r"(?<![A-Za-z\\])\.$")  # \right. ends in a delimiter


def last_boxed(text: str) -> str | None:
    r"""The stripped content of the complete box that opens last, or None.

    Of nested boxes this is the inner one. A box that is never closed does not count. ``\boxed 12`` without
    braces holds the number, or the single letter, that follows.
    """
    first = min((at for at in (text.find(r"\boxed"), text.find(r"\fbox")) if at >= 0), default=None)
    if first is None:
        return None
    open_braces: list[int] = []  # where a box's content starts, -1 for any other brace
    best_start, best = -1, None
    for token in _TOKEN.finditer(text, first):
        if token[0] == "{":
            open_braces.append(-1)
        elif token[0] == "}":
            start = open_braces.pop() if open_braces else -1
            if start > best_start:
                best_start, best = start, text[start : token.start()]
        elif token[1]:
            open_braces.append(token.end())
        elif token[0][1] in "bf" and (unbraced := _UNBRACED_ANSWER.match(text, token.end())):
            best_start, best = token.end(), unbraced[0]
    return None if best is None else best.strip()


def last_number(text: str) -> str | None:
    """The last number written in digits, with its sign, thousands separators, decimals or denominator."""
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007 (only the last match is wanted)
        pass
    return None if last is None else last[0]


def extract_answer(text: str, fallback: AnswerFallback | str = AnswerFallback.NONE) -> str | None:
    """The final answer of a response: its last box, or by ``fallback`` its last number; None without one."""
    answer = last_boxed(text)
    if answer is None and AnswerFallback(fallback) is AnswerFallback.LAST_NUMBER:
        return last_number(text)
    return answer


def as_latex(answer: str) -> str:
    r"""The answer as one line of LaTeX between dollars, the form in which math-verify reads all of it.

    Without the dollars it reads plain numbers and fractions only, and takes ``2\sqrt7`` for 2. Currency signs
    and braces around the whole answer mean nothing and go. Text that holds several formulas between dollars
    of its own stays as it is. A leading ``=`` or ``\approx`` and a full stop at the end go too.
    """
    text = _LEADING_RELATION.sub("", " ".join(answer.replace(r"\$", "").split()))
    text = _FULL_STOP.sub("", text)
    dollars = text.count("$")
    if dollars % 2 or text.strip("$").count("$") == 0:
        text = text.replace("$", "")
    elif dollars:
        return text
    return f"${_without_outer_braces(text.strip())}$"


def _without_outer_braces(text: str) -> str:
    layers = 0
    while text[layers : layers + 1] == "{" and text[len(text) - layers - 1 :][:1] == "}":
        layers += 1
    depth = lowest = layers
    for token in _TOKEN.finditer(text, layers, len(text) - layers):
        depth += {"{": 1, "}": -1}.get(token[0], 1 if token[1] else 0)
        lowest = min(lowest, depth)
    # Each layer may go only if the brace that closes it is the one at the end: {a}{b} keeps both.
    return text[lowest : len(text) - lowest].strip() if lowest > 0 else text
