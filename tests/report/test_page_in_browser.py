"""The page of tokens as a reader uses it, in headless Chromium: hover, switches, filters, sorting, 500 responses."""

from __future__ import annotations

import itertools
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from report.chromium import Chromium
from report.test_page import ATTACK, response, trained
from rlfr_cli.report.page import PageRow, make_page

# Shapes and positions by names of the page's own markup.
SHADES = "[...document.querySelectorAll('article:first-of-type .tokens > span')].map(s => s.className.trim())"
ORDER = "[...document.querySelectorAll('article')].map(a => a.querySelector('.asked').textContent)"
TIP = "document.getElementById('tip').hidden ? null : document.getElementById('tip').innerText"
TIP_ROWS = (
    "Object.fromEntries([...document.querySelectorAll('#tip div')].map(r => [...r.children].map(c => c.innerText)))"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def show(browser: Chromium, folder: Path, rows: list[PageRow]) -> None:
    (folder / "page.html").write_text(make_page({"flow": "f"}, rows, len(rows)))
    browser.open(folder / "page.html")


def choose(browser: Chromium, name: str, value: str) -> None:
    browser.evaluate(f"document.querySelector('#{name} input[value={value}]').click()")


def centre_of(browser: Chromium, token: int) -> tuple[float, float]:
    found = browser.evaluate(
        f"(() => {{ const b = document.querySelectorAll('.tokens > span')[{token}].getClientRects()[0];"
        " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    return float(found[0]), float(found[1])


def test_hovering_a_token_shows_its_numbers_and_leaving_hides_them(browser: Chromium, tmp_path: Path) -> None:
    show(browser, tmp_path, [trained(0)])
    assert browser.evaluate(TIP) is None
    browser.move_mouse(*centre_of(browser, 1))
    assert browser.evaluate(TIP).startswith('"\\n"')
    # The numbers of the second token, and not of its neighbours.
    assert browser.evaluate(TIP_ROWS) == {
        "Token": "2 of 3",
        "Flow reward": "−0.01",
        "Raw score": "6.123",
        "Advantage": "−1",
        "Entropy": "3",
        "Surprise": "0.25",
        "Deviation": "1.5",
    }
    browser.move_mouse(*centre_of(browser, 2))
    assert browser.evaluate(TIP).startswith('"<end>"')
    invalid = browser.evaluate(TIP_ROWS)
    assert invalid["Raw score"] == invalid["Flow reward"] == "not valid"
    assert (invalid["Token"], invalid["Advantage"], invalid["Entropy"]) == ("3 of 3", "0.5", "0.5")
    browser.move_mouse(2, 2)
    assert browser.evaluate(TIP) is None


def test_the_switch_shades_by_each_number_with_its_sign(browser: Chromium, tmp_path: Path) -> None:
    show(browser, tmp_path, [trained(0), trained(1, entropy=[0.0, 1.5, 3.0])])
    wanted = {
        "flow_reward": ["", "below s7", "invalid"],
        "score": ["", "more s7", "invalid"],
        "advantage": ["below s7", "below s7", "above s4 invalid"],
        "entropy": ["", "more s7", "more s1 invalid"],
    }
    labels = browser.evaluate("[...document.querySelectorAll('#shade input')].map(i => i.value)")
    assert labels[:4] == list(wanted)
    for shade, classes in wanted.items():
        choose(browser, "shade", shade)
        assert browser.evaluate(SHADES) == classes, shade
    colours = browser.evaluate(
        "['below s7', 'below s3', 'above s7', 'more s7', ''].map(name => { const s = document.createElement('span');"
        " s.className = name; document.querySelector('.tokens').append(s);"
        " const c = getComputedStyle(s).backgroundColor; s.remove(); return c; })"
    )
    assert len(set(colours)) == 5
    assert colours[-1] == "rgba(0, 0, 0, 0)"


def scored(sample: int, score: float, **values: Any) -> PageRow:
    texts = ["a"] * (3 + sample)
    count = len(texts)
    return response(
        sample, texts, score=[score] * count, flow_reward=[-0.01 * score] * count, problem=f"s{sample}", **values
    )


def order_of(browser: Chromium) -> list[str]:
    return [text.removeprefix("Problem")[:2] for text in browser.evaluate(ORDER)]


def test_sorting_goes_both_ways_and_what_has_no_number_is_last(browser: Chromium, tmp_path: Path) -> None:
    rows = [scored(0, 2.0, reward=0.5), scored(1, 9.0, reward=0.0), scored(2, 1.0, reward=1.0)]
    show(browser, tmp_path, [*rows, response(3, ["a", "b"], problem="s3", reward=None)])
    assert order_of(browser) == ["s0", "s1", "s2", "s3"]
    wanted = {
        "score": ["s1", "s0", "s2", "s3"],
        "flow": ["s2", "s0", "s1", "s3"],  # least penalised first
        "reward": ["s2", "s0", "s1", "s3"],
        "length": ["s2", "s1", "s0", "s3"],
    }
    for key, names in wanted.items():
        browser.evaluate(
            f"(() => {{ const s = document.getElementById('sort'); s.value = '{key}';"
            " s.dispatchEvent(new Event('change')); })()"
        )
        assert order_of(browser) == names, key
        browser.evaluate("document.getElementById('order').click()")
        turned = ["s3", *names[2::-1]] if key == "length" else [*names[2::-1], "s3"]
        assert order_of(browser) == turned, key


def test_filters_by_verdict_and_by_problem_together(browser: Chromium, tmp_path: Path) -> None:
    rows = [
        trained(0, problem="easy one"),
        trained(1, problem="easy two", correct=False),
        trained(2, problem="Hard", correct=False, problem_id="train-7"),
        trained(3, problem="Hard", correct=False, grade="ungraded"),
    ]
    show(browser, tmp_path, rows)
    count = "document.querySelector('.count').textContent"

    def search(text: str) -> None:
        browser.evaluate(
            f"(() => {{ const f = document.getElementById('find'); f.value = '{text}';"
            " f.dispatchEvent(new Event('input')); })()"
        )

    choose(browser, "filter", "wrong")
    assert browser.evaluate(count) == "2 of 4 responses"
    assert browser.evaluate("[...document.querySelectorAll('.about > b')].map(b => b.textContent)") == ["✗ wrong"] * 2
    search("hard")
    assert browser.evaluate(count) == "1 of 4 responses"
    search("TRAIN-7")
    assert browser.evaluate(count) == "1 of 4 responses"
    choose(browser, "filter", "correct")
    assert browser.evaluate("document.getElementById('list').textContent") == "No response fits."
    search("")
    assert browser.evaluate(ORDER) == ["Problemeasy oneAnswer2"]
    # The view is kept in the address.
    assert "filter=correct" in browser.evaluate("location.hash")


def test_hostile_text_stays_text_whatever_is_done_with_it(browser: Chromium, tmp_path: Path) -> None:
    rows = [
        response(0, [ATTACK, "b"], problem=ATTACK, answer=[ATTACK], problem_id=ATTACK, entropy=[2.0, 1.0]),
        trained(1, problem="other"),
    ]
    show(browser, tmp_path, rows)
    browser.move_mouse(*centre_of(browser, 0))
    assert "onerror" in browser.evaluate(TIP)
    choose(browser, "shade", "entropy")
    browser.evaluate(
        "(() => { const f = document.getElementById('find'); f.value = '</script><img';"
        " f.dispatchEvent(new Event('input')); })()"
    )
    assert browser.evaluate("document.querySelector('.count').textContent") == "1 of 2 responses"
    assert browser.evaluate("document.querySelectorAll('img, iframe, object, embed, a, form').length") == 0
    assert browser.evaluate("document.querySelectorAll('script').length") == 1  # the data's element has gone
    assert browser.evaluate("document.documentElement.dataset.hacked === undefined")
    assert browser.evaluate("document.documentElement.dataset.error === undefined")


def test_a_response_that_asks_for_the_network_gets_none(browser: Chromium, tmp_path: Path) -> None:
    """Were markup ever let through, the page's policy would still let nothing be loaded and no script run."""
    show(browser, tmp_path, [trained(0)])
    browser.evaluate(
        "(() => { const box = document.createElement('div');"
        ' box.innerHTML = \'<img src="https://example.invalid/x.png" onerror="window.ran = 1">\';'
        " document.body.append(box); })()"
    )
    violated = "new Promise(done => setTimeout(() => done(document.documentElement.dataset.error || ''), 300))"
    assert "blocked" in browser.evaluate(violated)
    assert browser.evaluate("window.ran === undefined")


# Many responses


def long_rows(count: int, num_tokens: int) -> list[PageRow]:
    drawn = random.Random(0)
    words = [f" word{index}" for index in range(400)]
    rows = []
    for number in range(count):
        score = [drawn.expovariate(0.2) for _ in range(num_tokens)]
        rows.append(
            response(
                number,
                drawn.choices(words, k=num_tokens),
                problem_id=f"p{number // 8}",
                problem=f"problem {number // 8}",
                correct=number % 2 == 0,
                grade="correct" if number % 2 == 0 else "wrong",
                score=score,
                deviation=score,
                flow_reward=[-0.01 if value > 12 else 0.0 for value in score],
                advantage=[drawn.gauss(0, 1) for _ in score],
                entropy=[drawn.random() for _ in score],
            )
        )
    return rows


def test_500_responses_of_400_tokens_stay_smooth(browser: Chromium, tmp_path: Path) -> None:
    """What is near the window is in the document and the rest is not, so each change and each scroll is quick.

    The bounds are those of a busy machine: a page that held all 200,000 tokens would take many seconds.
    """
    show(browser, tmp_path, long_rows(500, 400))
    assert (tmp_path / "page.html").stat().st_size < 20e6
    tokens = "document.querySelectorAll('.tokens > span').length"
    assert browser.evaluate("document.querySelectorAll('article').length") == 500
    assert 400 <= browser.evaluate(tokens) < 30 * 400
    took = (
        "(action => new Promise(done => {{ const begun = performance.now(); ({action})();"
        " document.body.offsetHeight; requestAnimationFrame(() => done(performance.now() - begun)); }}))()"
    )
    actions = [
        *(
            f"document.querySelector('#shade input[value={name}]').click()"
            for name in ("score", "entropy", "advantage")
        ),
        "(document.getElementById('sort').value = 'score', document.getElementById('sort')"
        ".dispatchEvent(new Event('change')))",
        "document.querySelector('#filter input[value=wrong]').click()",
        "document.querySelector('#filter input[value=all]').click()",
    ]
    times = [browser.evaluate(took.format(action=f"() => {action}")) for action in actions]
    assert max(times) < 2000, times

    frames = browser.evaluate(
        "new Promise(done => { const times = []; let last = performance.now(), step = 0; (function next() {"
        " requestAnimationFrame(now => { times.push(performance.now() - last); last = performance.now();"
        " scrollBy(0, 700); if (++step < 60) next(); else done(times); }); })(); })"
    )
    assert sorted(frames)[len(frames) // 2] < 250, frames

    assert max(frames) < 2000, frames
    assert browser.evaluate("scrollY") > 20_000
    # What was left behind is dropped again, and what is in the window now is there.
    assert browser.evaluate(tokens) < 30 * 400
    visible = (
        "new Promise(done => setTimeout(() => done([...document.querySelectorAll('article')].filter(a => {"
        " const b = a.getBoundingClientRect(); return b.bottom > 0 && b.top < innerHeight; })"
        ".every(a => a.querySelectorAll('.tokens > span').length === 400)), 300))"
    )
    assert browser.evaluate(visible)


# The picture


def colours_of(png: bytes) -> set[tuple[int, int, int]]:
    """All colours of a PNG of 8 bits a channel."""
    width, _, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert depth == 8
    channels = {2: 3, 6: 4}[kind]
    packed, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            packed += png[at + 8 : at + 8 + length]
        at += 12 + length
    raw, stride = zlib.decompress(packed), width * channels
    before = bytearray(stride)
    colours: set[tuple[int, int, int]] = set()
    for start in range(0, len(raw), stride + 1):
        line = unfiltered(raw[start], bytearray(raw[start + 1 : start + 1 + stride]), before, channels)
        colours.update(zip(line[0::channels], line[1::channels], line[2::channels], strict=True))
        before = line
    return colours


def unfiltered(kind: int, line: bytearray, above: bytearray, channels: int) -> bytearray:
    for place in range(len(line)):
        left = line[place - channels] if place >= channels else 0
        corner = above[place - channels] if place >= channels else 0
        up = above[place]
        guess = left + up - corner
        nearest = min((left, up, corner), key=lambda value: abs(guess - value))
        line[place] = (line[place] + (0, left, up, (left + up) // 2, nearest)[kind]) % 256
    return line


def test_the_picture_shows_the_shades(browser: Chromium, tmp_path: Path) -> None:
    """Seven steps of the reward's colour are seen, and none of them once tokens are shaded by another number."""
    texts = [f"token{index} " for index in range(8)]
    rewards = [-0.01 * index / 7 for index in range(8)]
    show(
        browser,
        tmp_path,
        [response(0, texts, score=[1.0] * 8, flow_reward=rewards, entropy=[1.0] * 8, deviation=[1.0] * 8)],
    )
    boxes = browser.evaluate(
        "[...document.querySelectorAll('.tokens > span')].map(s => { const c = document.createElement('canvas');"
        " c.width = c.height = 1; const p = c.getContext('2d'); p.fillStyle = '#fff'; p.fillRect(0, 0, 1, 1);"
        " p.fillStyle = getComputedStyle(s).backgroundColor; p.fillRect(0, 0, 1, 1);"
        " return [...p.getImageData(0, 0, 1, 1).data].slice(0, 3); })"
    )
    assert boxes[0] == [255, 255, 255]
    # From white to the reward's orange: blue falls from step to step.
    assert all(a[2] > b[2] for a, b in itertools.pairwise(boxes))
    seen = colours_of(browser.screenshot("article"))
    near = [any(max(abs(x - y) for x, y in zip(box, c, strict=True)) <= 3 for c in seen) for box in boxes]
    assert all(near)
    choose(browser, "shade", "entropy")
    after = colours_of(browser.screenshot("article"))
    darkest = boxes[-1]
    assert not any(max(abs(x - y) for x, y in zip(darkest, colour, strict=True)) <= 3 for colour in after)
