"""The accepted answers of the problem sets, as `read_problems` gives them."""

import logging

import pytest

from rlfr_cli.artifacts.problems import read_problems

SETS = (
    "math500",
    "aime24",
    "aime25",
    "amc23",
    "minerva",
    "olympiad_bench",
    "gsm8k_test",
    "mawps",
    "gsm8k_train",
)


@pytest.fixture(scope="session")
def accepted_answers(shared) -> dict[str, list[tuple[str, ...]]]:
    sets = {name: read_problems(shared / "data" / f"{name}.jsonl").problems for name in SETS}
    return {name: [problem.answers for problem in problems] for name, problems in sets.items()}


@pytest.fixture(autouse=True)
def _quiet_math_verify():
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time-outs are off
