import json
import subprocess
import sys

import pytest

from rlfr_cli.grading.answers import last_boxed
from rlfr_cli.grading.grades import Grade
from rlfr_cli.grading.numbers import plain_number
from rlfr_cli.grading.worker import judge, parses


@pytest.mark.parametrize(
    ("answer", "gold", "grade"),
    [
        (r"2\sqrt7", r"2\sqrt3", "wrong"),
        ("2", r"2\sqrt3", "wrong"),
        (r"\sqrt{12}", r"2\sqrt3", "correct"),
        ("3+9i", "3+4i", "wrong"),
        ("3+4i", "3+4i", "correct"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}", "correct"),
        ("0.5", r"\frac{1}{2}", "correct"),
        (r"\left( 3, \frac{\pi}{7} \right)", r"\left( 3, \frac{\pi}{2} \right)", "wrong"),
        ("x = 3", "3", "correct"),
        (r"3.0 \times 10^8", "300000000", "correct"),
        (r"3.1 \times 10^8", "300000000", "wrong"),
        ("2", r"\hbar \omega(v+1 / 2)-\frac{E_{0}^{2} e^{2}}{2 m \omega^{2}}", "wrong"),
        ("", "5", "unparseable"),
        (r"\frac{", "5", "unparseable"),
    ],
)
def test_judge(answer, gold, grade):
    assert judge(answer, [gold]) is Grade(grade)


def test_any_accepted_answer_will_do():
    assert judge(r"\sqrt{12}", ["5", r"2\sqrt3"]) is Grade.CORRECT


def test_exact_copies_of_math500_are_correct(accepted_answers):
    golds = [gold for (gold,) in accepted_answers["math500"]]
    assert sum(judge(gold, [gold]) is Grade.CORRECT for gold in golds) == 500
    assert all(parses(gold) for gold in golds)


@pytest.mark.slow
def test_exact_copies_of_all_golds_are_correct(accepted_answers):
    golds = {gold for rows in accepted_answers.values() for accepted in rows for gold in accepted}
    golds = {gold for gold in golds if plain_number(gold) is None}
    assert [gold for gold in sorted(golds) if judge(gold, [gold]) is not Grade.CORRECT] == []


def test_recorded_rule_rewards(shared):
    """Family 08: as math-verify between dollars judges, and not as recorded (without them, fault B8)."""
    cases = json.loads((shared / "conformance" / "08_rule_reward.json").read_text())["cases"]
    changed = []
    for case in cases:
        answer = last_boxed(case["response"])
        correct = answer is not None and judge(answer, [case["gold"]]) is Grade.CORRECT
        if correct != bool(case["detail"]["dollar_wrapped_verdict"]):
            changed.append(case["tag"])
    # These two boxes the published code does not see at all.
    assert changed == ["fbox", "boxed with space"]
    surd = next(case for case in cases if case["tag"] == "surd wrong radicand")
    assert surd["reward"] == 1.0
    assert judge(last_boxed(surd["response"]), [surd["gold"]]) is Grade.WRONG


def test_recorded_evaluation_grades(shared):
    """Family 09: accepts what math-verify accepts, and five forms more, each meant as right."""
    cases = json.loads((shared / "conformance" / "09_eval_grader.json").read_text())["cases"]
    more, fewer, wrong_accepted = [], [], []
    for case in cases:
        golds = case["gold"] if isinstance(case["gold"], list) else [case["gold"]]
        answer = last_boxed(case["response"])
        correct = answer is not None and judge(answer, [str(gold).strip() for gold in golds]) is Grade.CORRECT
        if correct and not case["math_verify"]:
            more.append(case["kind"])
        if case["math_verify"] and not correct:
            fewer.append(case["kind"])
        if correct and case["what"] == "wrong":
            wrong_accepted.append((case["gold"], case["answer"]))
    assert sorted(more) == ["braced"] * 3 + ["fbox", "no braces"]
    assert fewer == []
    # math-verify drops units, exponent and all.
    assert wrong_accepted == [("15\\mbox{ cm}^2", "15\\mbox{ cm}^3")]


def test_importing_the_worker_leaves_heavy_libraries_out():
    code = "import sys, rlfr_cli.grading.worker; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_only_numbers_reach_the_evaluating_parser():
    import sympy

    assert sympy.Number("-12.5") == -12.5
    with pytest.raises(Exception, match="never evaluated"):
        sympy.sympify("__import__('os').getcwd()")


def test_libraries_that_print_do_not_touch_the_protocol():
    code = (
        "import sys; from rlfr_cli.grading import worker\n"
        "def loud(answer, accepted):\n    print('noise'); print('noise', file=sys.stderr); return 'wrong'\n"
        "worker.judge = loud\n"
        "sys.argv = ['worker', '--memory-bytes', str(2**31), '--timeout-s', '3']\n"
        "worker.main()"
    )
    request = json.dumps({"id": 7, "answer": "1", "accepted": ["2"]}) + "\n"
    done = subprocess.run([sys.executable, "-c", code], input=request * 2, capture_output=True, text=True)
    replies = [json.loads(line) for line in done.stdout.splitlines()[-3:]]
    assert replies == [{"ready": True}] + [{"id": 7, "result": "wrong"}] * 2
    assert done.returncode == 0
