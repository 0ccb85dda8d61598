r"""The process that runs math-verify: ``python -m rlfr_cli.grading.worker --memory-bytes N --timeout-s S``.

Reads one JSON object a line from standard input and writes one a line to standard output:

- ``{"id": 1, "answer": "2\\sqrt7", "accepted": ["2\\sqrt3"]}`` gives ``{"id": 1, "result": "wrong"}``,
- ``{"id": 2, "parse": "2\\sqrt3"}`` gives ``{"id": 2, "result": "parsed"}`` or ``"unparseable"``.

It imports no torch, is killed by its parent when a comparison takes too long (a signal could not interrupt a
power of a billion digits), and ends when its standard input does.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import resource
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sympy.parsing.sympy_parser
from math_verify import LatexExtractionConfig, parse, verify

from rlfr_cli.grading.answers import as_latex
from rlfr_cli.grading.grades import Grade

PARSED = "parsed"

# LaTeX only: math-verify's other reader picks a number out of text that it cannot read, so that 2 would be
# right for "\hbar \omega(v + 1 / 2)", and it is the one that hands text to sympy's evaluating parser.
_LATEX_ONLY = [LatexExtractionConfig()]


# sympy's own string parser evaluates Python, and every number passes through it as "Integer (42 )".
_NUMBER_CODE = re.compile(r"[-+\s]*(?:Integer|Float)\s*\(\s*'?[0-9.eE+-]+'?\s*\)\s*")
_evaluate = sympy.parsing.sympy_parser.eval_expr


def _evaluate_numbers_only(code: str, *scopes: dict[str, Any]) -> Any:
    if not _NUMBER_CODE.fullmatch(code):
        raise ValueError("text from an answer is never evaluated as Python")
    return _evaluate(code, *scopes)


sympy.parsing.sympy_parser.eval_expr = _evaluate_numbers_only


@lru_cache(maxsize=256)
def read(text: str) -> list[Any]:
    """math-verify's reading of an answer: sympy expressions, and the text itself as a string."""
    try:
        return parse(as_latex(text), _LATEX_ONLY, parsing_timeout=None)  # type: ignore[arg-type]
    except MemoryError:
        raise
    except Exception:  # math-verify and antlr raise anything on hostile text, RecursionError included
        return []


def parses(text: str) -> bool:
    """Whether math-verify reads the text as mathematics."""
    return any(not isinstance(reading, str) for reading in read(text))


def judge(answer: str, accepted: Sequence[str]) -> Grade:
    """Compares an answer with the accepted ones, each of which math-verify wants as its first argument."""
    golds = [read(gold) for gold in accepted]
    if "." in answer:
        # sympy finds 3.0 * 10**8 unequal to the integer and equal to the decimal.
        golds += [read(f"{gold}.0") for gold in accepted if gold.isdecimal()]
    for gold in golds:
        try:
            if verify(gold, read(answer), timeout_seconds=None):
                return Grade.CORRECT
        except MemoryError:
            raise
        except Exception:  # a comparison that sympy cannot finish is not an equality
            continue
    return Grade.WRONG if parses(answer) else Grade.UNPARSEABLE


def _answer_request(request: dict[str, Any]) -> str:
    if "parse" in request:
        return PARSED if parses(request["parse"]) else Grade.UNPARSEABLE
    return judge(request["answer"], request["accepted"])


def _take_pipes() -> tuple[int, int]:
    """Keep the pipes under new numbers, so that nothing a library reads or prints touches the protocol."""
    requests, replies = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    return requests, replies


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _limit_processor_time(timeout_s: float) -> None:
    # A worker in the middle of a huge power never sees that its parent is gone; the kernel ends it instead.
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime + timeout_s) + 5)


def main() -> None:
    """Serve requests until standard input ends."""
    parser = argparse.ArgumentParser(description="math-verify behind JSON lines")
    parser.add_argument("--memory-bytes", type=int, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    judge("x+1", ["1+x"])  # loads what sympy and antlr load on first use, before the clock of a pair runs
    _limit(resource.RLIMIT_AS, options.memory_bytes)
    _limit(resource.RLIMIT_CORE, 0)
    requests, replies = _take_pipes()
    with os.fdopen(requests, "rb") as lines, os.fdopen(replies, "wb", buffering=0) as out:
        out.write(b'\n{"ready": true}\n')
        for line in lines:
            request = json.loads(line)
            _limit_processor_time(options.timeout_s)
            try:
                result = _answer_request(request)
            except MemoryError:
                os._exit(1)  # the parent starts a fresh worker
            out.write(json.dumps({"id": request["id"], "result": str(result)}).encode() + b"\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
