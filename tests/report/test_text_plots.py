"""Pictures of text: what is larger lies further right, and nothing runs off the scale."""

from __future__ import annotations

from rlfr_cli.report.text_plots import WIDTH, interval_lines, share_lines


def test_an_interval_lies_where_its_numbers_say() -> None:
    head, above, below, nothing = interval_lines(
        [("score", 0.75, 0.5, 1.0), ("length", 0.25, 0.2, 0.3), ("none", None, None, None)]
    )
    assert head.split() == ["0", "0.5", "1"]
    assert head.index("0.5") == above.index("├") == nothing.index("|")
    start = len("length") + 2
    assert above[start:].index("●") == round(0.75 * (WIDTH - 1))
    assert above[start:].index("┤") == WIDTH - 1
    assert below.index("●") < below.index("|")
    assert above.endswith("0.75")
    assert nothing.endswith("-")


def test_what_lies_beyond_the_scale_is_drawn_at_its_end() -> None:
    _, line = interval_lines([("a", 2.0, -1.0, 3.0)])
    assert line[3] == "├"
    assert line[3 + WIDTH - 1] == "●"


def test_bars_go_to_the_side_of_their_sign() -> None:
    head, more, less, far = share_lines([("a", 0.5), ("b", -0.5), ("c", -4.0)])
    assert head.index(" 0 ") + 1 == more.index("|") == less.index("|") == far.index("|")
    assert more.split("|")[1].count("█") == less.split("|")[0].count("█") == WIDTH // 4
    assert "█" not in more.split("|")[0] + less.split("|")[1]
    assert far[3] == "◀"
    assert [line.split()[-1] for line in (more, less, far)] == ["50%", "-50%", "-400%"]
