"""One self-contained HTML page of responses, each token shaded by what a flow or training says of it.

Takes rows in memory and gives text; reads nothing but its template, ``page_template.html``. Responses are written by
models and problems by anyone, so both are hostile: they enter the page as JSON in which no ``<`` is left, the script
shows them as text only, and the page's content policy lets no script run but the template's own, by its digest.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import numpy as np

from rlfr_cli.artifacts.rollouts import RolloutRow

TITLE = "Tokens and what they were paid"
# Colours end at this quantile of the tokens, so that a few extreme ones do not drown the rest.
COLOUR_QUANTILE = 0.98
SIGNIFICANT_DIGITS = 4

Numbers = Sequence[float | None]


@dataclass(frozen=True)
class PageRow:
    """A response, what its tokens add to its text, and the training step that it belongs to, if any."""

    row: RolloutRow
    token_texts: Sequence[str]
    step: int | None = None


@dataclass(frozen=True)
class Measure:
    """One number a token, and how it is shown.

    Attributes:
        key: its name in the page's data and address.
        scale: ``diverging`` about 0 or ``sequential``; None is not a shade, but a number shown beside a token.
        values: its numbers of a response, None where the row holds none.
    """

    key: str
    name: str
    scale: Literal["diverging", "sequential"] | None
    help: str
    values: Callable[[RolloutRow], Numbers | None]


def _flow_reward(row: RolloutRow) -> Numbers | None:
    """None where a token is not valid, and without scores, where every reward is 0 and means nothing."""
    if row.score is None or row.flow_reward is None:
        return None
    return [None if score is None else reward for score, reward in zip(row.score, row.flow_reward, strict=True)]


def _surprise(row: RolloutRow) -> Numbers | None:
    return None if row.response_logprobs is None else [-value for value in row.response_logprobs]


MEASURES = (
    Measure(
        "flow_reward",
        "Flow reward",
        "diverging",
        "What the flow pays a token, after scaling, threshold and top-k: orange takes away, blue adds, no colour is "
        "nothing.",
        _flow_reward,
    ),
    Measure(
        "score",
        "Raw score",
        "sequential",
        "How far a token's hidden state deviates from the flow's velocity field, before any shaping: darker is "
        "further.",
        lambda row: row.score,
    ),
    Measure(
        "advantage",
        "Advantage",
        "diverging",
        "Where training pushed a token, by the outcome and the flow rewards from it to the end: orange less likely, "
        "blue more likely.",
        lambda row: row.advantage,
    ),
    Measure(
        "entropy",
        "Entropy",
        "sequential",
        "How open the policy's choice of a token was, in nats: darker is more open.",
        lambda row: row.entropy,
    ),
    Measure(
        "surprise",
        "Surprise",
        "sequential",
        "Negative log-probability of a token when it was drawn, in nats: darker is less likely. The control for the "
        "score: it needs no flow.",
        _surprise,
    ),
    Measure("deviation", "Deviation", None, "Mean squared error of the flow's velocity.", lambda row: row.deviation),
)


def make_page(facts: Mapping[str, str], rows: Sequence[PageRow], num_total: int) -> str:
    """The page.

    Args:
        facts: what is known of all responses, in the order of the header: flow, model, layers and so on.
        rows: responses, in the order of the artifact.
        num_total: responses of the artifact, of which ``rows`` are some.
    """
    template = files("rlfr_cli.report").joinpath("page_template.html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    shown = f"{len(rows):,}" + ("" if len(rows) == num_total else f" of {num_total:,}, whole groups evenly spread")
    header = {**facts, "responses": shown, **_rewarded(rows)}
    parts = {
        "TITLE": html.escape(TITLE),
        "SCRIPT_SHA256": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "FACTS": "\n".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in header.items()
        ),
        "DATA": script_json(_data(rows)),
    }
    # One pass, so that a placeholder's name in a response stays what it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def script_json(value: object) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _rewarded(rows: Sequence[PageRow]) -> dict[str, str]:
    """The share of valid tokens that earn a flow reward."""
    rewards = [value for entry in rows for value in _flow_reward(entry.row) or () if value is not None]
    if not rewards:
        return {}
    share = sum(value != 0 for value in rewards) / len(rewards)
    return {"tokens rewarded": f"{100 * share:.1f} % of {len(rewards):,} valid tokens"}


def _data(rows: Sequence[PageRow]) -> dict[str, Any]:
    """Everything that the script needs; token texts are numbered, since most come back often."""
    places: dict[str, int] = {}
    values = [{measure.key: measure.values(entry.row) for measure in MEASURES} for entry in rows]
    present = [measure for measure in MEASURES if any(of_row[measure.key] is not None for of_row in values)]
    responses = []
    for entry, of_row in zip(rows, values, strict=True):
        row = entry.row
        responses.append(
            {
                "id": row.problem_id,
                "sample": row.sample_index,
                "step": entry.step,
                "problem": row.problem,
                "answer": list(row.answer),
                "grade": row.grade,
                "finish": row.finish_reason,
                "reward": _total(None if row.reward is None else [row.reward], mean=True),
                "score": _total(row.score, mean=True),
                "flowReward": _total(of_row["flow_reward"], mean=False),
                "tokens": [places.setdefault(text, len(places)) for text in entry.token_texts],
                "values": {key: short_numbers(numbers) for key, numbers in of_row.items() if numbers is not None},
            }
        )
    return {
        "measures": [
            {"key": measure.key, "name": measure.name, "scale": measure.scale, "help": measure.help}
            | _bounds(measure, [of_row[measure.key] or () for of_row in values])
            for measure in present
        ],
        "texts": list(places),
        "responses": responses,
    }


def _bounds(measure: Measure, values: Sequence[Numbers]) -> dict[str, float | None]:
    """Where the colours end, and the smallest and largest number of any token."""
    known = np.concatenate([np.array(of_row, dtype=float) for of_row in values])  # None becomes NaN
    known = known[np.isfinite(known)]
    if measure.scale is None or not len(known):
        return {}
    if measure.scale == "sequential":
        low, high = np.quantile(known, [1 - COLOUR_QUANTILE, COLOUR_QUANTILE])
        low = 0.0 if 0 <= low < 0.01 * high else low
    else:
        sizes = np.abs(known[known != 0])
        high = np.quantile(sizes, COLOUR_QUANTILE) if len(sizes) else 0.0
        low = -high
    ends = short_numbers([low, high, known.min(), known.max()])
    return dict(zip(("low", "high", "min", "max"), ends, strict=True))


def short_numbers(values: Numbers) -> list[float | None]:
    """Numbers of four significant digits, which halves the page; None for what JSON does not know."""
    exact = np.array(values, dtype=float)  # None becomes NaN
    known = np.isfinite(exact) & (exact != 0)
    sizes = np.abs(exact, where=known, out=np.ones_like(exact))
    digits = np.minimum(SIGNIFICANT_DIGITS - 1 - np.floor(np.log10(sizes)), 300)  # what is smaller becomes 0
    # Powers of ten above 1 are exact, so each way of scaling back gives the nearest number to the decimal.
    up, down = 10.0 ** np.maximum(digits, 0), 10.0 ** np.maximum(-digits, 0)
    rounded = np.round(exact * up / down) / up * down
    return [
        None if not math.isfinite(value) else int(value) if value.is_integer() else value for value in rounded.tolist()
    ]


def _total(values: Numbers | None, *, mean: bool) -> float | None:
    known = [value for value in values or () if value is not None]
    if not known:
        return None
    total = sum(known)
    # Centred rewards sum to 0 but for rounding.
    total = 0.0 if abs(total) < 1e-6 * sum(map(abs, known)) else total
    return short_numbers([total / len(known) if mean else total])[0]
