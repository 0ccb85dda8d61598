import time

import pytest

from rlfr_cli.grading.answers import as_latex, extract_answer, last_boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{ \frac{1}{2} }", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\\boxed{7}", "7"),
        (r"a line\\\boxed{7}", "7"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{5} and cut \boxed{12", "5"),
        (r"\boxed{5} } } {", "5"),
        (r"{ \boxed{5}", "5"),
        (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"$\boxed 12$", "12"),
        (r"\boxed 1,250.", "1,250"),
        (r"\boxed5", "5"),
        (r"\boxed x", "x"),
        (r"\boxed{}", ""),
        (r"\boxed", None),
        (r"\boxed the answer", None),
        (r"\boxedfoo{5}", None),
        ("no box, 5", None),
        ("", None),
    ],
)
def test_last_box(text, answer):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "{" * 1_000_000 + r"\boxed{" * 200_000,
        r"\boxed{" + "{" * 500_000 + "1" + "}" * 500_000 + "}",
        r"\boxed{" + "\\" * 2_000_000,
        r"\boxed" + " " * 2_000_000 + "x" * 1_000_000,
        "1," * 1_000_000 + "-" * 1_000_000,
    ],
)
def test_hostile_text_takes_linear_time(text):
    start = time.perf_counter()
    extract_answer(text, "last-number")
    assert time.perf_counter() - start < 5


def test_thousand_nested_braces_come_back_whole():
    inner = "{" * 1000 + "1" + "}" * 1000
    assert last_boxed(r"\boxed{" + inner + "}") == inner


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 3, so 1,250.", "1,250"),
        ("x = -5", "-5"),
        ("10-3", "3"),
        ("the half, 1/2", "1/2"),
        ("$.50 each", ".50"),
        ("none", None),
    ],
)
def test_last_number_only_without_a_box(text, number):
    assert extract_answer(text) is None
    assert extract_answer(text, "last-number") == number
    assert extract_answer(text + r" \boxed{9}", "last-number") == "9"


@pytest.mark.parametrize(
    ("answer", "latex"),
    [
        ("42", "$42$"),
        ("$42$", "$42$"),
        ("$$42$$", "$42$"),
        (r"\$32,348", "$32,348$"),
        ("$5", "$5$"),
        ("{x}", "$x$"),
        ("{{x}}", "$x$"),
        ("{a}{b}", "${a}{b}$"),
        (r"{{a}+{b}}", "${a}+{b}$"),
        (r"\{1,2\}", r"$\{1,2\}$"),
        ("a\n b", "$a b$"),
        (r"\approx 8.0", "$8.0$"),
        ("5.", "$5$"),
        (r"\left[ 1 \right.", r"$\left[ 1 \right.$"),
        ("$x=1$ and $x=2$", "$x=1$ and $x=2$"),
    ],
)
def test_as_latex(answer, latex):
    assert as_latex(answer) == latex
