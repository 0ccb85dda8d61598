"""What is left of family 05 of the recorded vectors: row minima, both-sided normalisation, signed selection, positions.

Each difference from the published code is stated, and the corrected value is worked out here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from recorded import assert_matches, load_recorded
from rlfr_cli.flow.choices import Normalise
from rlfr_cli.flow.shaping import ShapingOptions, shape_scores


def shape_row(scores_T: Tensor, **options: object) -> Tensor:
    """Shaped scores [T] of one response."""
    settings = ShapingOptions(**({"threshold": 0, "top_k": 0} | options))  # type: ignore[arg-type]
    valid_T = torch.ones(len(scores_T), dtype=torch.bool)
    return shape_scores(scores_T, valid_T, torch.tensor([0, len(scores_T)]), settings).shaped_K


def rows_of(shared: Path, kind: str, result: str) -> list[tuple[Tensor, Tensor]]:
    """Scores of each row's real tokens, and what the published code makes of these."""
    recorded, _ = load_recorded(shared, "05_norm_post_s51")
    masks = recorded[f"in/{kind}/mask"].bool()
    rows = zip(recorded[f"in/{kind}/score"], recorded[result], masks, strict=True)
    return [(scores[mask], theirs[mask]) for scores, theirs, mask in rows]


def signed_share(scores_T: Tensor) -> Tensor:
    return 2 * (scores_T - scores_T.min()) / (scores_T.max() - scores_T.min()) - 1


@pytest.mark.parametrize("kind", ["padded", "unpadded"])
def test_the_smallest_score_and_only_it_becomes_zero(shared: Path, kind: str) -> None:
    """Differs on purpose: the published minimum of a row without padding is the second smallest value."""
    recorded, _ = load_recorded(shared, "05_norm_post_s51")
    for row, (scores, _) in enumerate(rows_of(shared, kind, f"norm/{kind}/minmax/bil0/gamma1")):
        published = recorded[f"row_min/{kind}"][row, 0]
        has_padding = len(scores) < recorded[f"in/{kind}/mask"].shape[1]
        assert published == scores.sort().values[0 if has_padding else 1]
        ours = shape_row(scores)
        assert (ours == 0).nonzero().flatten().tolist() == [int(scores.argmin())]
        assert (ours == 1).nonzero().flatten().tolist() == [int(scores.argmax())]


@pytest.mark.parametrize("kind", ["padded", "unpadded", "mixed"])
def test_the_two_sided_normalisation_is_applied(shared: Path, kind: str) -> None:
    """Differs on purpose: the published `minmax-bil` leaves the raw score as it is."""
    for scores, theirs in rows_of(shared, kind, f"norm/{kind}/minmax-bil/bil1/gamma1"):
        assert torch.equal(theirs, scores)
        if len(scores) > 1:
            assert_matches(shape_row(scores, normalise=Normalise.MINMAX_SIGNED), signed_share(scores))


def test_normalising_by_the_mean_is_no_choice(shared: Path) -> None:
    """Differs on purpose: the published option `mean` fails on every input."""
    _, info = load_recorded(shared, "05_norm_post_s51")
    cases = [case for case in info["cases"] if case["args"].get("flow_reward_norm") == "mean"]
    assert len(cases) == 5
    assert all("UnboundLocalError" in case["error"] for case in cases)
    with pytest.raises(ValueError, match="mean"):
        Normalise("mean")


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("bil_thr0.6", {"threshold": 0.6}),
        ("bil_top6", {"top_k": 6}),
        ("bil_thr0.3_top6", {"threshold": 0.3, "top_k": 6}),
        ("bil_thr0.3_top7", {"threshold": 0.3, "top_k": 7}),
    ],
)
def test_signed_selection_without_padding(shared: Path, case: str, options: dict[str, float]) -> None:
    """Differs on purpose by the minimum: a published value lies below -1, and all others are shifted a little."""
    for scores, theirs in rows_of(shared, "unpadded", f"post/unpadded/{case}"):
        values = signed_share(scores)
        kept = values.abs() > options.get("threshold", 0)
        half = int(options.get("top_k", 2 * len(values))) // 2
        for sign in (1, -1):
            side = [k for k in range(len(values)) if kept[k] and sign * values[k] > 0]
            for k in sorted(side, key=lambda k: -sign * float(values[k]))[half:]:
                kept[k] = False
        ours = shape_row(scores, normalise=Normalise.MINMAX_SIGNED, **options)
        assert_matches(ours, torch.where(kept, values, 0.0))
        assert theirs.min() < -1 == ours.min()
        both = (ours != 0) & (theirs != 0)
        assert both.sum() >= (theirs != 0).sum() - 1
        assert torch.equal(ours[both].sign(), theirs[both].sign())
        assert (ours - theirs)[both].abs().max() < 0.1


@pytest.mark.parametrize("kind", ["padded", "unpadded"])
def test_the_rewarded_positions_are_the_recorded_ones(shared: Path, kind: str) -> None:
    """Theirs list top_k positions best first, those below the threshold too; only the others are rewarded."""
    recorded, _ = load_recorded(shared, "05_norm_post_s51")
    masks = recorded[f"in/{kind}/mask"].bool()
    listed = recorded[f"post/{kind}/thr0.6_top6_idx/idx0"]
    for normalised, mask, positions in zip(recorded[f"postin/{kind}/uni"], masks, listed, strict=True):
        places = mask.nonzero().flatten()
        ours = shape_row(normalised[mask], normalise=Normalise.NONE, threshold=0.6, top_k=6)
        found = places[ours.argsort(descending=True, stable=True)][: int((ours != 0).sum())]
        assert 0 < len(found) <= 6
        assert found.tolist() == positions[: len(found)].tolist()
        assert all(normalised[k] <= 0.6 for k in positions[len(found) :].tolist())


def test_signed_positions_are_the_recorded_ones_in_rows_with_padding(shared: Path) -> None:
    """With padding both minima agree; theirs list the three most positive, and the three most negative."""
    recorded, _ = load_recorded(shared, "05_norm_post_s51")
    masks = recorded["in/padded/mask"].bool()
    compared = 0
    for row, mask in enumerate(masks):
        if mask.all():
            continue
        places = mask.nonzero().flatten()
        options = {"normalise": Normalise.MINMAX_SIGNED, "threshold": 0.3, "top_k": 6}
        ours = shape_row(recorded["in/padded/score"][row][mask], **options)
        for sign, name in ((1, "idx0"), (-1, "idx1")):
            best = (sign * ours).argsort(descending=True, stable=True)[:3]
            assert bool((sign * ours[best] > 0).all())
            theirs = recorded[f"post/padded/bil_thr0.3_top6_idx/{name}"][row]
            assert sorted(places[best].tolist()) == sorted(theirs.tolist())
            compared += 1
    assert compared == 6
