"""Does this flow carry signal beyond simple quantities? The answer in words, by rules that can be read here.

For an area under the curve and its 95 % interval:

- ``above``: the whole interval is above 0.5; ``below``: all of it is below.
- ``none``: it holds 0.5 and lies within 0.5 ± ``SMALL``: whatever there is, is too little to matter.
- ``unclear``: it holds 0.5 and reaches further; or there are fewer than ``MIN_PROBLEMS`` problems behind it, since a
  bootstrap over so few is not to be trusted; or there is no number.

The question is put twice: of whole responses (wrong against correct, within problems), and of tokens (the first wrong
token against tokens at the same place in correct responses). Each time by two areas: of the score, and of the score
once the controls are taken out (negative log-probability, entropy, length of a response, latent norm, token identity).

- ``yes``: both are above.
- ``no``: one of the two is below, or none.
- ``cannot tell``: everything else.

``yes`` says that the interval excludes chance on these responses; it says nothing of what training would gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlfr_cli.report.diagnosis import PARTIAL

SMALL = 0.03
MIN_PROBLEMS = 10
# Below it, which tokens are paid for is much a matter of the noise draw.
ENOUGH_AGREEMENT = 0.95
NAMES = {
    "score": "the flow's score",
    "negative_logprob": "negative log-probability",
    "entropy": "entropy",
    "length": "response length",
    "latent_norm": "latent norm",
    "token_identity": "token identity alone",
    "random_latents": "the flow on random latents",
    "shuffled_context": "the flow with shuffled context",
    PARTIAL: "the score less all controls",
}


def side(value: float | None, low: float | None, high: float | None, problems: int) -> str:
    """``above``, ``below``, ``none`` or ``unclear``, by the rules above."""
    if value is None or low is None or high is None or problems < MIN_PROBLEMS:
        return "unclear"
    if low > 0.5 or high < 0.5:
        return "above" if low > 0.5 else "below"
    return "none" if low >= 0.5 - SMALL and high <= 0.5 + SMALL else "unclear"


def answer(score: str, beyond: str) -> str:
    """``yes``, ``no`` or ``cannot tell``, from the sides of the score and of the score less all controls."""
    if score == beyond == "above":
        return "yes"
    if {score, beyond} & {"below", "none"}:
        return "no"
    return "cannot tell"


def conclude(results: Mapping[str, Any]) -> dict[str, str]:
    """The answers for responses and for first wrong tokens, and the paragraph."""
    of_responses = {
        row["measure"]: (row["within_problems"], row["within_low"], row["within_high"], row["problems"])
        for row in results["separation"]["rows"]
    }
    of_tokens = {
        row["measure"]: (row["auc"], row["low"], row["high"], row["problems"])
        for row in results["first_wrong_token"]["rows"]
    }
    none = (None, None, None, 0)
    answers = {
        "responses": answer(side(*of_responses["score"]), side(*of_responses[PARTIAL])),
        "first_wrong_tokens": answer(side(*of_tokens.get("score", none)), side(*of_tokens.get(PARTIAL, none))),
    }
    sentences = [
        *_responses_in_words(results, of_responses, answers["responses"]),
        *_tokens_in_words(results, of_tokens, answers["first_wrong_tokens"]),
        *_reward_in_words(results["flow_reward"]),
        *_score_in_words(results),
    ]
    return {**answers, "in_words": " ".join(sentences)}


def _responses_in_words(results: Mapping[str, Any], areas: Mapping[str, tuple[Any, ...]], answered: str) -> list[str]:
    opening = "Does the score tell wrong from correct responses beyond simple quantities?"
    if not results["both_classes"]:
        return [f"{opening} Cannot tell: {results['why_one_class']}."]
    if areas["score"][0] is None:
        return [f"{opening} Cannot tell: no problem has both wrong and correct responses."]
    score, beyond = areas["score"], areas[PARTIAL]
    best = results["separation"]["best_control"]
    sentences = [
        f"{opening} {answered.capitalize()}. Of the problems, {_problems(score[3])}: there the area under its curve is "
        f"{_area(score)}{_meaning(score)}; once negative log-probability, entropy, length, latent norm and token "
        f"identity are taken out, {_area(beyond)}{_meaning(beyond)}.",
        f"The control that separates most is {NAMES[best]}, {_area(areas[best])}{_turned(areas[best])}: the score is "
        f"{_difference(results['separation']['above_best_control'])}.",
        f"With its context shuffled the flow gives {_area(areas['shuffled_context'])}: with the true one the area is "
        f"{_difference(results['separation']['above_shuffled_context'], ('larger', 'smaller'))}.",
    ]
    if side(*areas["random_latents"]) in ("above", "below"):
        sentences.append(
            f"Random latents separate too, {_area(areas['random_latents'])}, which by design they cannot: take every "
            "interval here with doubt."
        )
    return sentences


def _tokens_in_words(results: Mapping[str, Any], areas: Mapping[str, tuple[Any, ...]], answered: str) -> list[str]:
    found = results["first_wrong_token"]
    opening = "Does it point at the first wrong token beyond them?"
    if not areas:
        return [f"{opening} Cannot tell: no first wrong token could be located."]
    best = found["best_control"]
    return [
        f"{opening} {answered.capitalize()}. Against tokens at the same place in correct responses, the area for "
        f"{found['compared']} first wrong tokens is {_area(areas['score'])}{_meaning(areas['score'])}; with the "
        f"controls taken out, {_area(areas[PARTIAL])}{_meaning(areas[PARTIAL])}. {NAMES[best].capitalize()} gives "
        f"{_area(areas[best])}{_turned(areas[best])}: the score is {_difference(found['above_best_control'])}."
    ]


def _reward_in_words(reward: Mapping[str, Any]) -> list[str]:
    difference = reward["wrong_less_correct_within_problems"]
    if difference["low"] is None:
        return []
    interval = f"{difference['value']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})"
    if difference["high"] < 0:
        meaning = "wrong responses are penalised more"
    elif difference["low"] > 0:
        meaning = "wrong responses are penalised LESS than correct ones"
    else:
        meaning = "neither kind is seen to be penalised more"
    return [f"The summed flow reward of wrong less that of correct responses to a problem is {interval}: {meaning}."]


def _score_in_words(results: Mapping[str, Any]) -> list[str]:
    verdict = results["velocity_error"]["verdict"]
    sentences = [verdict[0].upper() + verdict[1:] + "."]
    identity = results["token_identity"]["cross_validated"]
    if identity is not None:
        sentences.append(f"Token identity alone explains {max(0.0, identity):.0%} of the variance of token scores.")
    noise = results["noise_agreement"]
    now = next((row for row in noise["rows"] if row["draws"] == 1), None)
    if now is not None and now["spearman"] is not None:
        needed = noise["draws_needed"]
        enough = now["spearman"] >= ENOUGH_AGREEMENT
        sentences.append(
            f"Two single noise draws rank a response's tokens with a correlation of {now['spearman']:.2f}"
            + ("." if enough or needed is None else f"; about {needed} draws would reach {ENOUGH_AGREEMENT}.")
        )
    return sentences


def _problems(count: int) -> str:
    both = f"{count} {'has' if count == 1 else 'have'} both wrong and correct responses"
    return both if count >= MIN_PROBLEMS else f"only {both}, too few to tell"


def _area(estimate: Sequence[Any]) -> str:
    value, low, high, _ = estimate
    return "not known" if value is None or low is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def _turned(estimate: Sequence[Any]) -> str:
    """A control may separate by being small where responses are wrong; the score is compared with it turned round."""
    value = estimate[0]
    return f", turned round {1 - value:.3f}" if value is not None and value < 0.5 else ""


def _meaning(estimate: Sequence[Any]) -> str:
    return {
        "above": "",
        "below": ", the wrong way round: correct responses score higher",
        "none": ", which is no more than chance",
        "unclear": ", which may be chance",
    }[side(*estimate)]


def _difference(estimate: Mapping[str, Any], words: tuple[str, str] = ("better", "worse")) -> str:
    """How the area of the score stands to another, which ``better`` takes to be turned above one half."""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    more, less = words
    if low is None or estimate["problems"] < MIN_PROBLEMS:
        return f"not known to be {more} or {less}"
    if low <= 0 <= high:
        return f"not shown to be {more} or {less} ({value:+.3f}, {low:+.3f} to {high:+.3f})"
    if low > 0:
        return f"{more} by {value:.3f} ({low:.3f} to {high:.3f})"
    return f"{less} by {-value:.3f} ({-high:.3f} to {-low:.3f})"
