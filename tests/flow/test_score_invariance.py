"""A score of given latents is a fact of the response: any batch, order, packing and chunk gives it again to 1e-5."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.deviation import deviations, keyed_noise
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.normalisation import LatentStatistics
from rlfr_cli.flow.pairing import Pairing, TappedLayers
from rlfr_cli.flow.velocity import VelocityNetwork, VelocitySizes

SIZE = 5
PAIRINGS = [
    (Pairing(Context.NEXT),),
    (Pairing(Context.SELF),),
    (Pairing(Context.PREVIOUS, 2),),
    (Pairing(Context.NEXT, 2), Pairing(Context.PREVIOUS)),
]
DTYPES = [None, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """Responses of these lengths, dealt into batches in some order, and how they are scored."""

    lengths: list[int]
    batches: list[list[int]]
    pairings: tuple[Pairing, ...]
    timesteps: tuple[float, ...]
    num_draws: int
    tokens_per_chunk: int
    normalised: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(1, 9), min_size=2, max_size=6))
    order = draw(st.permutations(range(len(lengths))))
    ends = [*sorted(draw(st.sets(st.integers(1, len(lengths) - 1)))), len(lengths)]
    starts = [0, *ends[:-1]]
    return Case(
        lengths=lengths,
        batches=[order[start:end] for start, end in zip(starts, ends, strict=True)],
        pairings=draw(st.sampled_from(PAIRINGS)),
        timesteps=draw(st.sampled_from([(0.8,), (0.5, 0.9)])),
        num_draws=draw(st.integers(1, 3)),
        tokens_per_chunk=draw(st.integers(1, 12)),
        normalised=draw(st.booleans()),
    )


def random_flow(pairings: tuple[Pairing, ...], *, normalised: bool) -> Flow:
    torch.manual_seed(0)
    network = VelocityNetwork(VelocitySizes(latent_size=SIZE, condition_size=SIZE, width=8, depth=2, time_scale=30.0))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    statistics = LatentStatistics(torch.randn(2, SIZE), torch.rand(2, SIZE) + 0.5) if normalised else None
    return Flow(network, TappedLayers((1, 2), 4), pairings, statistics)


def latents_of(case: Case, num_prompt: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(num_prompt + length, 2, SIZE, generator=generator) for length in case.lengths]


def scores_of(
    flow: Flow, latents: list[Tensor], indices: list[int], case: Case, tokens_per_chunk: int, dtype: torch.dtype | None
) -> dict[int, Tensor]:
    """Score and deviation [T, 2] of each response of one batch."""
    pairs = flow.pair([latents[index] for index in indices])
    noise = keyed_noise(7, [f"response {index}" for index in indices], pairs)
    result = deviations(
        flow.network,
        pairs,
        noise,
        timesteps=case.timesteps,
        num_draws=case.num_draws,
        tokens_per_chunk=tokens_per_chunk,
        autocast_dtype=dtype,
    )
    both = pairs.paired.over_responses(torch.stack([result.score_M, result.deviation_M], dim=1), torch.nan)
    return dict(zip(indices, both.split([case.lengths[index] for index in indices]), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=cases())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_batches_order_packing_and_chunks_change_no_score(dtype: torch.dtype | None, case: Case) -> None:
    flow = random_flow(case.pairings, normalised=case.normalised)
    latents = latents_of(case, flow.num_prompt)
    everything = scores_of(flow, latents, list(range(len(latents))), case, 10_000, dtype)
    seen = 0
    for indices in case.batches:
        for index, ours in scores_of(flow, latents, indices, case, case.tokens_per_chunk, dtype).items():
            torch.testing.assert_close(ours, everything[index], rtol=1e-5, atol=1e-5, equal_nan=True)
            seen += 1
    assert seen == len(latents)
    again = scores_of(flow, latents, list(range(len(latents))), case, 10_000, dtype)
    assert all(again[i].nan_to_num().equal(everything[i].nan_to_num()) for i in again)


def test_what_lies_beside_a_response_is_never_read() -> None:
    """Latents of another response that are huge or not a number leave its score as it is, for every pairing."""
    for pairings in PAIRINGS:
        flow = random_flow(pairings, normalised=False)
        case = Case([4, 6, 5], [], pairings, (0.8,), 1, 10_000, False)
        latents = latents_of(case, flow.num_prompt)
        wanted = scores_of(flow, latents, [0, 1, 2], case, 10_000, None)[1]
        for garbage in (1e6, torch.nan):
            beside = [torch.full_like(latents[0], garbage), latents[1], torch.full_like(latents[2], garbage)]
            ours = scores_of(flow, beside, [0, 1, 2], case, 10_000, None)[1]
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_seed_names_the_score_and_another_one_moves_every_token() -> None:
    flow = random_flow(PAIRINGS[1], normalised=True)
    latents = latents_of(Case([6, 3], [], PAIRINGS[1], (0.8,), 1, 1, True), flow.num_prompt)
    pairs = flow.pair(latents)

    def scores(seed: int) -> Tensor:
        return flow.deviations(pairs, ["a", "b"], seed=seed, timesteps=(0.8,)).score_M

    assert torch.equal(scores(3), scores(3))
    assert bool((scores(3) != scores(4)).all())


def test_another_process_gives_the_same_bits() -> None:
    """Python's own hashes change from one process to the next; seeds and keys must not hang on them."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch; torch.set_num_threads(1)\n"
        "from flow.test_score_invariance import Case, PAIRINGS, latents_of, random_flow, scores_of\n"
        "flow = random_flow(PAIRINGS[3], normalised=True)\n"
        "case = Case([4, 6], [], PAIRINGS[3], (0.5, 0.8), 2, 1000, True)\n"
        "both = scores_of(flow, latents_of(case, flow.num_prompt), [0, 1], case, 1000, None)\n"
        "print([value.hex() for index in both for value in both[index].nan_to_num().flatten().tolist()])\n"
    )
    tests = __file__.rpartition("/flow/")[0]
    printed = {
        subprocess.run(
            [sys.executable, "-c", code, tests],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1
    assert printed.pop().count("0x") == 20
