"""Reads the problems that a stage works on, and checks each before any work starts.

A problem has a text and accepted answers; expert data has a response too, or is a conversation whose last
assistant message is the response. Whatever is wrong with a row is one error that names the row.
"""

from __future__ import annotations

import decimal
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfr_cli.artifacts.problem_files import open_rows
from rlfr_cli.errors import ConfigError, InputError


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. ``row`` counts the rows of the source from zero."""

    problem_id: str
    problem: str
    answers: tuple[str, ...]
    response: str | None
    messages: list[dict[str, str]] | None
    """the conversation up to the response, which it leaves out; None where there is no such column"""
    row: int


@dataclass(frozen=True)
class ProblemSet:
    """Problems in the order of their source, and the SHA-256 of its bytes, or of a dataset's rows."""

    problems: tuple[Problem, ...]
    fingerprint: str
    name: str


def read_problems(
    source: str | Path,
    *,
    split: str | None = None,
    problem_column: str = "problem",
    answer_column: str = "answer",
    id_column: str | None = None,
    response_column: str | None = None,
    messages_column: str | None = None,
    limit: int | None = None,
    need_answer: bool = True,
) -> ProblemSet:
    """Read and check problems from a file, a folder of files or of ``datasets``, or a dataset's name.

    Args:
        source: ``.jsonl``, ``.json``, ``.csv``, ``.parquet``, ``.arrow``, a folder, ``owner/name`` or
            ``owner/name:configuration``.
        split: which part of a dataset; not needed where there is one.
        problem_column: the problem's text.
        answer_column: a string or number, or a list of accepted ones; 142.0 becomes "142".
        id_column: names a problem; by default its zero-based row does.
        response_column: the expert's response.
        messages_column: a list of ``{role, content}``, read in place of the problem and response columns: the
            last assistant message is the response, the last user message before it the problem.
        limit: read only the first rows. The fingerprint is of the whole source all the same.
        need_answer: False lets the answer be missing or null, which gives no accepted answers.

    Raises:
        MissingInputError: nothing is there.
        InputError: the source or a row of it cannot be used.
        ConfigError: a limit below 1, or a split that does not fit.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"a limit of {limit} leaves no problems; give 1 or more")
    texts = [messages_column] if messages_column else [problem_column, response_column]
    columns = [column for column in (*texts, answer_column, id_column) if column is not None]
    required = [column for column in columns if need_answer or column != answer_column]
    opened = open_rows(source, split=split, columns=columns)
    problems: list[Problem] = []
    places: dict[str, str] = {}
    for place, values in opened.rows:
        for column in required:
            if column not in values:
                raise _missing_column(column, list(values), place)
        if messages_column:
            problem, response, messages = _conversation(values[messages_column], place)
        else:
            problem, messages = _text(values[problem_column], problem_column, place), None
            response = _text(values[response_column], response_column, place) if response_column else None
        answers = _answers(values.get(answer_column), answer_column, place, need_answer)
        row = len(problems)
        problem_id = str(row) if id_column is None else _identifier(values[id_column], id_column, place)
        if problem_id in places:
            raise InputError(
                f"{place} has the id {problem_id!r} of {places[problem_id]}",
                hint="ids must differ; or leave them out",
            )
        if id_column is not None:
            places[problem_id] = place
        problems.append(Problem(problem_id, problem, answers, response, messages, row))
        if len(problems) == limit:
            break
    if not problems:
        raise InputError(f"{opened.name} has no rows", hint="check that the right file was written")
    return ProblemSet(tuple(problems), opened.fingerprint, opened.name)


def _missing_column(column: str, there: Sequence[str], place: str) -> InputError:
    close = difflib.get_close_matches(column, there, n=1)
    return InputError(
        f"{place} has no column {column!r}; it has {', '.join(map(str, there))}",
        hint=f"did you mean {close[0]!r}?" if close else "name it: --problem-column, --answer-column and so on",
    )


def _wrong_type(value: Any, column: str, place: str, wanted: str) -> InputError:
    kind = "null" if value is None else type(value).__name__
    return InputError(f"{place}: {column!r} is {kind}, not {wanted}", hint="correct it, or name another column")


def _text(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(value, column, place, "text")
    if not value.strip():
        raise InputError(f"{place}: {column!r} is empty", hint="fill it in, or remove the row")
    return value


def _identifier(value: Any, column: str, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _wrong_type(value, column, place, "text or a whole number")
    return _text(str(value), column, place)


def _answers(value: Any, column: str, place: str, need_answer: bool) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not need_answer and (value is None or not values):
        return ()
    if not values:
        raise InputError(f"{place}: {column!r} is an empty list", hint="give one accepted answer or more")
    return tuple(_answer(item, column, place) for item in values)


def _answer(value: Any, column: str, place: str) -> str:
    wanted = "text, a number, or a list of these"
    if isinstance(value, bool) or not isinstance(value, str | int | float | decimal.Decimal):
        raise _wrong_type(value, column, place, wanted)
    if isinstance(value, str):
        return _text(value, column, place).strip()
    if not math.isfinite(value):
        raise InputError(f"{place}: {column!r} is {value}, not a finite number", hint="correct the row")
    return str(int(value)) if value == int(value) else f"{value}"


def _conversation(value: Any, place: str) -> tuple[str, str | None, list[dict[str, str]]]:
    """The problem, the response if the conversation ends with one, and the messages before it."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise _wrong_type(value, "messages", place, "a list of {role, content}")
    messages = [
        {
            "role": _text(message.get("role"), "role", place),
            "content": _content(message.get("content"), place),
        }
        for message in value
    ]
    response = None
    if messages and messages[-1]["role"] == "assistant":
        response = _text(messages.pop()["content"], "content", place)
    questions = [message["content"] for message in messages if message["role"] == "user"]
    if not questions:
        raise InputError(f"{place} has no user message before the response", hint="a user message is the problem")
    return _text(questions[-1], "content", place), response, messages


def _content(value: Any, place: str) -> str:
    """A message's text, which may come as a list of text parts; other parts are refused."""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise _wrong_type(value, "content", place, "text")
    return value
