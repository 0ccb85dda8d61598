import subprocess
import sys
import threading
import time

import pytest

from rlfr_cli.errors import ConfigError, WorkError
from rlfr_cli.grading.grades import Grade
from rlfr_cli.grading.pool import GradingPool


def box(answer: str) -> str:
    return r"so \boxed{" + answer + "}"


@pytest.fixture(scope="module")
def pool():
    with GradingPool(timeout_s=1.5) as pool:
        yield pool


def test_grades_in_order(pool):
    responses = [
        box("x+1"),
        box("41"),
        "no box",
        box(r"\frac+"),
        box("5"),
        box(r"2\sqrt7"),
        box(r"\sqrt{12}"),
    ]
    answers = [["1+x"], ["42"], ["42"], ["42"], [], [r"2\sqrt3"], ["7", r"2\sqrt3"]]
    expected = ["correct", "wrong", "no_answer", "unparseable", "ungraded", "wrong", "correct"]
    assert pool.grade(responses, answers) == expected


def test_fallback_to_the_last_number():
    with GradingPool(fallback="last-number") as pool:
        assert pool.grade(["it is 42.", "nothing"], [["42"], ["42"]]) == [Grade.CORRECT, Grade.NO_ANSWER]


HOSTILE = [
    ("9^{9^{9^9}}", Grade.TIMEOUT),
    ("(10^8)!", Grade.TIMEOUT),
    ("{" * 1100 + "1" + "}" * 1100, Grade.UNPARSEABLE),
    (r"\frac{" * 200 + "1" + "}{2}" * 200, Grade.UNPARSEABLE),
    ("1" * 3_000_000, Grade.UNPARSEABLE),
    ("5\x005", Grade.UNPARSEABLE),
    ("\ud800", Grade.UNPARSEABLE),
    ("__import__('os').system('touch EXECUTED')", Grade.UNPARSEABLE),
    ("open('EXECUTED', 'w')", Grade.WRONG),  # read as a product of letters
]


@pytest.mark.parametrize(("answer", "grade"), HOSTILE, ids=[ascii(answer[:20]) for answer, _ in HOSTILE])
def test_hostile_boxes_get_a_verdict_in_time(pool, answer, grade, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    assert pool.grade([box(answer)], [["12"]]) == [grade]
    assert time.monotonic() - start < 1.5 + 5
    assert pool.grade([box("a+b")], [[f"b+a+{len(answer)}-{len(answer)}"]]) == [Grade.CORRECT]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "answer",
    [
        r"\text{__import__('os').system('touch EXECUTED')}",
        r"\operatorname{eval}(open('EXECUTED','w'))",
        "x_{open('EXECUTED','w')}",
        "{open('EXECUTED','w'), 1}",
        r"1 + 1; open('EXECUTED','w') 42",
    ],
)
def test_python_in_a_box_is_not_run(answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with GradingPool() as pool:
        assert pool.grade([box(answer)], [["42"]])[0] in (Grade.WRONG, Grade.UNPARSEABLE)
    assert list(tmp_path.iterdir()) == []


def test_two_workers_share_a_batch_with_a_slow_answer():
    with GradingPool(num_workers=2, timeout_s=1.5) as pool:
        easy = [(box(f"x+{i}"), [f"{i}+x"]) for i in range(20)]
        slow = (box("9^{9^{9^9}}"), ["12"])
        responses, answers = zip(*easy[:3], slow, *easy[3:], strict=True)
        grades = pool.grade(responses, answers)
        assert grades.index(Grade.TIMEOUT) == 3
        assert grades.count(Grade.CORRECT) == 20


def test_equal_pairs_are_judged_once_and_remembered(pool, monkeypatch):
    assert pool.grade([box("y+1")] * 50, [["1+y"]] * 50) == [Grade.CORRECT] * 50
    monkeypatch.setattr(pool, "_run", lambda requests: [str(Grade.TIMEOUT) for _ in requests])
    assert pool.grade([box("y+1"), box("y+2")], [["1+y"]] * 2) == [Grade.CORRECT, Grade.TIMEOUT]


def test_short_numbers_start_no_worker_and_take_milliseconds():
    with GradingPool() as pool:
        text = "Let us think step by step. " * 100
        start = time.perf_counter()
        grades = pool.grade([text + box(str(i)) for i in range(256)], [[str(i // 2 * 2)] for i in range(256)])
        assert time.perf_counter() - start < 0.1
        assert grades == [Grade.CORRECT, Grade.WRONG] * 128
        assert pool._idle == []


def test_a_dead_worker_is_replaced(pool):
    pool.grade([box("z+1")], [["1+z"]])
    pool._idle[0]._process.kill()
    pool._idle[0]._process.wait()
    assert pool.grade([box("z+2")], [["2+z"]]) == [Grade.CORRECT]


def test_a_worker_that_dies_at_work_counts_as_timeout():
    with GradingPool(timeout_s=60) as pool:
        pool.grade([box("z+1")], [["1+z"]])
        killer = threading.Timer(0.5, pool._idle[0]._process.kill)
        start = time.monotonic()
        killer.start()
        assert pool.grade([box("9^{9^{9^9}}"), box("z+2")], [["12"], ["2+z"]]) == ["timeout", "correct"]
        assert time.monotonic() - start < 30


def test_memory_of_a_worker_is_limited():
    with GradingPool(memory_limit_bytes=512 * 2**20) as pool:
        assert pool.grade([box("z+2")], [["2+z"]]) == [Grade.CORRECT]
        with open(f"/proc/{pool._idle[0]._process.pid}/limits") as limits:
            (line,) = [line for line in limits if line.startswith("Max address space")]
        assert line.split()[3] == str(512 * 2**20)


def test_works_from_a_thread():
    grades: list[Grade] = []
    with GradingPool() as pool:
        threads = [
            threading.Thread(target=lambda i=i: grades.extend(pool.grade([box(f"t+{i}")], [[f"{i}+t"]])))
            for i in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert grades == [Grade.CORRECT] * 3


def test_parse_failures(pool):
    answers = [["42"], [r"\frac{"], ["5", ""], [r"2\sqrt3"], [], ["1" * 5000]]
    assert pool.parse_failures(answers) == [1, 2, 5]


def test_parse_failures_of_the_problem_sets(pool, accepted_answers):
    assert pool.parse_failures(accepted_answers["gsm8k_train"]) == []
    rows = accepted_answers["minerva"]
    failures = pool.parse_failures(rows)
    assert len(failures) == 4
    assert all(any("E_" in gold or "frac{dM}{dt}" in gold for gold in rows[row]) for row in failures)


def test_close_twice_ends_the_worker_and_refuses_more():
    pool = GradingPool()
    pool.grade([box("x+1")], [["1+x"]])
    process = pool._idle[0]._process
    pool.close()
    pool.close()
    assert process.poll() is not None
    with pytest.raises(RuntimeError, match="closed"):
        pool.grade([box("x+1+1")], [["2+x"]])


def test_a_worker_that_cannot_start_says_why(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('this copy is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with GradingPool() as pool, pytest.raises(WorkError, match="this copy is broken") as error:
        pool.grade([box("x+1")], [["1+x"]])
    assert "import math_verify" in error.value.hint


def test_impossible_pools_are_refused():
    with pytest.raises(ConfigError):
        GradingPool(num_workers=0)


def test_workers_end_with_their_parent():
    code = (
        "import os, signal\nfrom rlfr_cli.grading.pool import GradingPool\n"
        "pool = GradingPool()\npool.grade([r'\\boxed{x+1}'], [['1+x']])\n"
        "print(pool._idle[0]._process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().split(")")[-1].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")
