"""The page of tokens: hostile text stays text, its numbers are the scores', and it works in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from rlfr_cli.artifacts.fingerprint import model_fingerprint
from rlfr_cli.artifacts.flow_file import FlowHeader, save_flow
from rlfr_cli.artifacts.rollouts import RolloutRow, rollout_table
from rlfr_cli.artifacts.run_folder import RunFolder
from rlfr_cli.artifacts.scores import ScoreRow, score_table
from rlfr_cli.cli import app
from rlfr_cli.config.flow import FlowRewardConfig
from rlfr_cli.config.score import ScoreConfig
from rlfr_cli.errors import ConfigError, InputError
from rlfr_cli.policy.loading import load_tokenizer
from rlfr_cli.report.page import PageRow, make_page, short_numbers
from rlfr_cli.report.page_inputs import choose_groups, write_rollouts_page, write_scores_page
from rlfr_cli.report.token_texts import TokenTexts

ATTACK = '</script><img src=x onerror="document.documentElement.dataset.hacked=1"><!--<script>'
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=5000",
    "--dump-dom",
]


def response(sample: int, texts: list[str], **values: Any) -> PageRow:
    count = len(texts)
    row: dict[str, Any] = {
        "problem_id": "p0",
        "sample_index": sample,
        "problem": "1+1",
        "answer": ["2"],
        "prompt_token_ids": [0],
        "response_token_ids": list(range(count)),
        "response_logprobs": [-0.25] * count,
        "response": "".join(texts),
        "finish_reason": "stop",
        "reward": 1.0,
        "correct": True,
        "grade": "correct",
    }
    return PageRow(RolloutRow(**{**row, **values}), texts)


def trained(sample: int, *, correct: bool = True, **values: Any) -> PageRow:
    """Three tokens with everything that training adds; the last one is not valid."""
    numbers: dict[str, Any] = {
        "deviation": [0.5, 1.5, None],
        "score": [2.0, 6.123456, None],
        "flow_reward": [0.0, -0.01, 0.0],
        "advantage": [-1.0, -1.0, 0.5],
        "entropy": [0.125, 3.0, 0.5],
        "correct": correct,
        "grade": "correct" if correct else "wrong",
    }
    return response(sample, ["a", "\n", "<end>"], **{**numbers, **values})


def data_of(page: str) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def measures_of(page: str) -> dict[str, Any]:
    return {measure["key"]: measure for measure in data_of(page)["measures"]}


# What stands in the page


def test_hostile_text_is_nowhere_markup() -> None:
    row = response(0, [ATTACK, "&lt;{{DATA}}", "\u2028"], problem=ATTACK, answer=[ATTACK], problem_id=ATTACK)
    page = make_page({ATTACK: ATTACK}, [row], 1)
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page
    assert page.count("<!--") == 0
    data = data_of(page)
    (shown,) = data["responses"]
    assert [data["texts"][place] for place in shown["tokens"]] == [ATTACK, "&lt;{{DATA}}", "\u2028"]
    assert (shown["problem"], shown["answer"], shown["id"]) == (ATTACK, [ATTACK], ATTACK)


def test_the_page_holds_everything_that_it_needs() -> None:
    page = make_page({"flow": "f"}, [trained(0)], 1)
    assert re.findall(r"https?:|src=|href=|url\(|@import", page) == []
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    assert "{{" not in page


def test_numbers_are_those_of_the_rows() -> None:
    page = make_page({}, [trained(0), trained(1, correct=False, reward=0.0, score=None, finish_reason="length")], 9)
    first, second = data_of(page)["responses"]
    assert first["values"] == {
        "flow_reward": [0, -0.01, None],
        "score": [2, 6.123, None],
        "advantage": [-1, -1, 0.5],
        "entropy": [0.125, 3, 0.5],
        "surprise": [0.25, 0.25, 0.25],
        "deviation": [0.5, 1.5, None],
    }
    assert (first["score"], first["flowReward"], first["reward"], first["grade"]) == (4.062, -0.01, 1, "correct")
    assert (second["score"], second["flowReward"], second["reward"], second["finish"]) == (None, None, 0, "length")
    assert "2 of 9, whole groups evenly spread" in page
    assert "50.0 % of 2 valid tokens" in page


def test_centred_rewards_sum_to_zero_but_for_rounding() -> None:
    page = make_page({}, [trained(0, flow_reward=[0.01, -0.0100000001, 0.0])], 1)
    assert data_of(page)["responses"][0]["flowReward"] == 0


def test_only_what_the_rows_hold_can_be_shown() -> None:
    plain = trained(0, deviation=None, score=None, flow_reward=[0.0, 0.0, 0.0])
    # Without scores every flow reward is 0, which says nothing.
    assert list(measures_of(make_page({}, [plain], 1))) == ["advantage", "entropy", "surprise"]
    assert list(measures_of(make_page({}, [response(0, ["a"], response_logprobs=None)], 1))) == []


def test_colours_of_signed_numbers_are_even_about_zero() -> None:
    measures = measures_of(make_page({}, [trained(0)], 1))
    reward, score = measures["flow_reward"], measures["score"]
    assert (reward["low"], reward["high"], reward["min"], reward["max"]) == (-0.01, 0.01, -0.01, 0)
    assert score["min"] == 2
    assert score["min"] < score["low"] < score["high"] < score["max"]
    # Numbers that begin near 0 have colours that begin at 0.
    near = trained(0, entropy=[1e-4, 1e-4, 2.0])
    assert measures_of(make_page({}, [near], 1))["entropy"]["low"] == 0


def test_numbers_are_short() -> None:
    values = [0.123456, -0.0070674, 0.0, None, float("nan"), float("inf"), 123456.7, 0.99996, -2.0, 1e-45]
    assert short_numbers(values) == [0.1235, -0.007067, 0, None, None, None, 123500, 1, -2, 1e-45]
    assert json.dumps(short_numbers([0.1 + 0.2, 1 / 3, 4.0])) == "[0.3, 0.3333, 4]"


# Token texts


class ByteTokenizer:
    """A token a byte."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return bytes(ids).decode("utf-8", "replace")


class WordTokenizer:
    """Words, each with the space before it, except that decoding drops the first one's, as SentencePiece does."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(f" w{token}" for token in ids).removeprefix(" ")


def test_a_character_of_several_tokens_belongs_to_the_last() -> None:
    texts = TokenTexts(ByteTokenizer()).of(list("a日\n".encode()))
    assert texts == ["a", "", "", "日", "\n"]
    assert TokenTexts(ByteTokenizer()).of(list("ab日".encode())[:-1]) == ["a", "b", "", "\N{REPLACEMENT CHARACTER}"]


def test_spaces_between_words_are_kept() -> None:
    assert TokenTexts(WordTokenizer()).of([3, 1, 3]) == ["w3", " w1", " w3"]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\N{REPLACEMENT CHARACTER}"), max_size=20))
def test_token_texts_joined_are_the_text(text: str) -> None:
    ids = list(text.encode())
    texts = TokenTexts(ByteTokenizer()).of(ids)
    assert "".join(texts) == text
    assert len(texts) == len(ids)


@given(st.binary(max_size=40))
def test_bytes_that_are_no_text_lose_no_token(data: bytes) -> None:
    texts = TokenTexts(ByteTokenizer()).of(list(data))
    assert len(texts) == len(data)
    assert [c for c in "".join(texts) if c.isascii()] == [chr(b) for b in data if b < 128]


# Which responses


def test_groups_are_spread_from_the_first_to_the_last() -> None:
    groups = [name for name in "abcdefgh" for _ in range(4)]
    assert choose_groups(groups, 100) == list(range(32))
    assert choose_groups(groups, 13) == [0, 1, 2, 3, 12, 13, 14, 15, 28, 29, 30, 31]
    assert choose_groups(groups, 3) == [0, 1, 2]


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 30))
def test_chosen_groups_are_whole_and_no_more_than_the_limit(groups: list[int], limit: int) -> None:
    chosen = choose_groups(groups, limit)
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= limit
    assert bool(chosen) == bool(groups)
    if chosen and len({groups[row] for row in chosen}) > 1:
        ends = [row for row in chosen if row + 1 < len(groups) and groups[row + 1] == groups[row]]
        assert all(row + 1 in chosen for row in ends)


# From artifacts


@pytest.fixture
def policy(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The embedded policy; its digest stays out of the home folder's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return repository / "data" / "policy"


def make_run(path: Path, policy: Path, *, scores: str = "flow") -> Path:
    """Three steps of two groups of two; the policy answers with tokens 5 and 4."""
    model = model_fingerprint(policy)
    config = {
        "seed": 0,
        "new_flow": False,
        "scores": scores,
        "online": {"online_steps": 1},
        "flow_reward": {
            "timestep": [0.8],
            "score_normalisation": "minmax",
            "power": 1.0,
            "threshold": 0.6,
            "top_k": 0,
            "coef": 0.01,
            "centre_reward": False,
        },
    }
    run = RunFolder.create(path, config=config, inputs={"model": model.to_dict(), "flow": "ab" * 32})
    for step in (1, 2, 3):
        rows = [trained(sample, problem_id=f"p{group}").row for group in range(2) for sample in range(2)]
        for row in rows:
            row.response_token_ids = [5, 5, 4]
        run.write_rollouts(step, rollout_table(rows, run=True))
    header = FlowHeader(
        latent_size=model.hidden_size,
        condition_size=model.hidden_size,
        width=4,
        depth=1,
        num_frequencies=4,
        rms_epsilon=1e-6,
        time_scale=1.0,
        layer_indices=(2, 5),
        num_blocks=model.num_blocks,
        pairings=({"context": "next", "shift": 1},),
    )
    with run.checkpoint(3) as folder:
        shutil.copytree(policy, folder / "model")
        save_flow(folder / "flow.safetensors", header, {})
    return path


def header_of(page: str) -> dict[str, str]:
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))


def test_a_run_shows_its_steps_and_says_what_paid_its_tokens(tmp_path: Path, policy: Path) -> None:
    run = make_run(tmp_path / "run", policy, scores="random")
    assert write_rollouts_page(run, tmp_path / "page.html", num_responses=5) == 4
    page = (tmp_path / "page.html").read_text()
    data = data_of(page)
    assert [(r["step"], r["id"], r["sample"]) for r in data["responses"]] == [
        (1, "p0", 0),
        (1, "p0", 1),
        (3, "p1", 0),
        (3, "p1", 1),
    ]
    assert [data["texts"][place] for place in data["responses"][0]["tokens"]] == ["0", "0", "<end>"]
    header = header_of(page)
    assert header["layers"] == "blocks 2, 5 of 8"
    assert (header["context"], header["timesteps"], header["run"]) == ("next 1", "0.8", "run")
    assert header["flow"] == "fingerprint abababababababab… at the start, it learns online"
    assert header["flow reward"] == "scaled by minmax, kept above 0.6, times −0.01; of random scores, the control"
    assert header["responses"] == "4 of 12, whole groups evenly spread"
    assert "weights" in header["model"]


def test_show_writes_the_page_of_a_run_of_its_rollouts_or_of_a_step(
    tmp_path: Path, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", policy)
    monkeypatch.chdir(tmp_path)
    for name, count in {"run": 12, "run/rollouts": 12, str(run / "rollouts" / "step-000002"): 4}.items():
        result = CliRunner().invoke(app, ["show", name, "--html", "pages/out.html"])
        assert result.exit_code == 0, result.output
        assert f"out.html: {count} responses" in result.stderr
        assert len(data_of(Path("pages/out.html").read_text())["responses"]) == count
    refused = CliRunner().invoke(app, ["show", "run", "--html", "run/config.json"])
    assert refused.exit_code == 2
    assert "ends with .html" in refused.stderr


def test_rollouts_of_no_run_need_a_tokenizer(tmp_path: Path, policy: Path) -> None:
    step = make_run(tmp_path / "run", policy) / "rollouts" / "step-000001"
    rollouts = step.rename(tmp_path / "rollouts")
    with pytest.raises(InputError, match="needs the tokenizer") as caught:
        write_rollouts_page(rollouts, tmp_path / "page.html")
    assert "--model" in str(caught.value.hint)
    assert write_rollouts_page(rollouts, tmp_path / "page.html", model=str(policy), num_responses=3) == 2


def test_scores_go_to_the_response_that_they_are_of(tmp_path: Path, policy: Path) -> None:
    rows = [trained(sample, problem_id=f"p{group}").row for group in range(2) for sample in range(2)]
    scores = [
        ScoreRow(
            problem_id=row.problem_id,
            sample_index=row.sample_index,
            deviation=[1.0, 2.0, None],
            score=[4.0 * place, 8.0, None],
            flow_reward=[0.0, -0.01, None],
        )
        for place, row in enumerate(rows)
    ]
    header = FlowHeader(
        latent_size=8,
        condition_size=8,
        width=8,
        depth=1,
        num_frequencies=4,
        rms_epsilon=1e-6,
        time_scale=1.0,
        layer_indices=(1,),
        num_blocks=4,
        pairings=({"context": "previous", "shift": 2},),
        context_layer="final-norm",
    )
    count = write_scores_page(
        tmp_path / "page.html",
        scores=[score_table(scores[:3]), score_table(scores[3:])],
        rollouts=rollout_table(rows),
        tokenizer=load_tokenizer(policy),
        header=header,
        flow=("flow.safetensors", "cd" * 32),
        model=model_fingerprint(policy),
        reward=FlowRewardConfig(timestep=(0.5, 0.8), threshold=0),
        num_responses=500,
    )
    page = (tmp_path / "page.html").read_text()
    responses = data_of(page)["responses"]
    assert count == 4
    assert [r["values"]["score"] for r in responses] == [[4 * place, 8, None] for place in range(4)]
    assert [r["values"]["flow_reward"] for r in responses] == [[0, -0.01, None]] * 4
    assert [(r["id"], r["sample"]) for r in responses] == [("p0", 0), ("p0", 1), ("p1", 0), ("p1", 1)]
    found = header_of(page)
    assert (found["context"], found["timesteps"]) == ("previous 2 of final-norm", "0.5, 0.8")
    assert found["flow"] == "flow.safetensors, fingerprint cdcdcdcdcdcdcdcd…"
    assert found["flow reward"] == "scaled by minmax, top 15 of a response, times −0.01"


def test_score_refuses_a_page_that_it_cannot_make() -> None:
    with pytest.raises(ConfigError, match="--latents does not hold"):
        ScoreConfig(flow=Path("f"), latents=Path("l"), html=Path("a.html"))
    with pytest.raises(ConfigError, match=r"ends with \.html"):
        ScoreConfig(flow=Path("f"), model="m", rollouts=Path("r"), html=Path("scores"))


# In a browser


@pytest.fixture
def open_page(tmp_path: Path):
    """Open a page in headless Chromium; its document after the script ran."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not on PATH")

    def opened(page: str, fragment: str = "") -> str:
        (tmp_path / "page.html").write_text(page)
        address = (tmp_path / "page.html").as_uri() + "#" + fragment
        command = [chromium, *CHROMIUM_FLAGS, f"--user-data-dir={tmp_path / 'profile'}", address]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout

    return opened


def test_the_page_works_in_a_browser_and_runs_nothing_of_its_responses(open_page) -> None:
    rows = [
        trained(0, problem="easy"),
        trained(1, correct=False, problem="hard", response_logprobs=[-9.0, -1.0, -0.1]),
        response(2, [ATTACK, "b\n\nc", ""], problem=ATTACK, grade="no_answer", correct=False, entropy=[1.0, 2.0, 0.1]),
    ]
    page = make_page({"flow": ATTACK}, rows, 3)
    document = open_page(page)
    root = re.findall(r"<html[^>]*>", document)[0]
    assert 'data-ready="yes"' in root
    assert "data-error" not in root
    assert "data-hacked" not in root
    assert "<img" not in document
    assert document.count("<article") == 3
    assert "3 of 3 responses" in document
    # The first shade is the flow reward: a penalty below zero, none of 0, and a token that is not valid.
    assert '<span>a</span><span class="below s7"><i class="mark">↵</i>\n</span>' in document
    assert '<span class=" invalid">&lt;end&gt;</span>' in document
    assert "&lt;/script&gt;&lt;img src=x" in document
    assert '<span>b<i class="mark">↵</i>\n<i class="mark">↵</i>\nc</span>' in document

    changed = open_page(page, "shade=entropy&filter=wrong&sort=score&order=down&theme=dark")
    assert 'data-theme="dark"' in re.findall(r"<html[^>]*>", changed)[0]
    assert changed.count("<article") == 2
    assert "2 of 3 responses" in changed
    assert "✗ wrong" in changed
    assert "✗ no answer" in changed
    assert "✓ correct" not in changed
    assert '<span>a</span><span class="more s7"><i class="mark">↵</i>' in changed
    # The response without a score comes last.
    assert changed.index("✗ wrong") < changed.index("✗ no answer")

    found = open_page(page, "find=HARD&shade=nothing")
    assert found.count("<article") == 1
    assert "below s7" in found
