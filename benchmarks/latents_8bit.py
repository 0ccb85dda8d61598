"""What of a flow's scores survives when latents are stored in 16 or 8 bits.

    rlfr extract-latents --model M --rollouts rollouts/ --store float32 --out latents
    python benchmarks/latents_8bit.py --latents latents --flow flow.safetensors --flow flow-channel.safetensors

Reads float32 latents and flows of their layers; scores the same responses with the same noise from the latents as they
are and from what each way of storing leaves of them. For each flow it prints a row a way: bytes of a token (ids and
units of a shard left out), rank correlation of the scores within a response (mean and lowest), correlation of the
deviations over all tokens, how far a score moves, and the error of the worst channel in its standard deviations.
The first row, another noise draw, is the yardstick. ``--massive-share 0.005`` first makes two channels massive in that
share of the tokens, as in tokens that some models use as attention sinks; then the other tokens are compared.

Shapes: N tokens of a shard, J tapped states, D hidden size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlfr_cli.artifacts.int8 import SAMPLED_TOKENS, encode_int8
from rlfr_cli.artifacts.latents import LatentsFolder
from rlfr_cli.flow.flow import Flow, response_key
from rlfr_cli.report.diagnosis_statistics import spearman
from rlfr_cli.report.tables import text_table
from rlfr_cli.stages.flows import load_flow
from rlfr_cli.stages.latent_sequences import check_latents_fit, columns_of

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
BLOCK = 64
SEQUENCES_AT_ONCE = 16
SHORTEST = 5  # scored tokens of a response whose ranks are compared
MASSIVE = {3: 3000.0, 5: -2000.0}  # by channel


@dataclass(frozen=True)
class Store:
    """A way of storing: what is left of latents [N, J, D], and the bytes of one token's state of D numbers."""

    name: str
    restore: Callable[[Tensor], Tensor]
    state_bytes: Callable[[int], float]


def int8_by(scale: Tensor, x: Tensor) -> Tensor:
    scale = scale.clamp_min(1e-30)
    return (x / scale).round().clamp(-127, 127) * scale


def int8_token(x: Tensor) -> Tensor:
    return int8_by(x.abs().amax(-1, keepdim=True) / 127, x)


def int8_blocks(x: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
    return int8_by(scale, blocks).flatten(-2)[..., : x.shape[-1]]


def int8_channel(x: Tensor) -> Tensor:
    """Lowest and highest value of a channel in the shard as −127 and 127."""
    low, high = x.amin(0), x.amax(0)
    middle = (low + high) / 2
    return int8_by((high - low) / 254, x - middle) + middle


def float8_token(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / FLOAT8_MAX
    return (x / scale).to(FLOAT8).float() * scale


def in_units_of_deviation(inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Centre each channel by its mean and divide by its standard deviation first."""

    def restore(x: Tensor) -> Tensor:
        mean, std = x.mean(0), x.std(0).clamp_min(1e-12)
        return inner((x - mean) / std) * std + mean

    return restore


def in_robust_units(inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same with the median and the median absolute deviation, those of the product."""

    def restore(x: Tensor) -> Tensor:
        rounded = encode_int8(x)
        centre, unit = rounded.centre_JD, rounded.unit_JD
        return inner((x - centre) / unit) * unit + centre

    return restore


STORES = (
    Store("float32", lambda x: x, lambda size: 4 * size),
    Store("float16", lambda x: x.half().float(), lambda size: 2 * size),
    Store("bfloat16", lambda x: x.bfloat16().float(), lambda size: 2 * size),
    Store("float8, no scale", lambda x: x.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8).float(), lambda size: size),
    Store("float8, token scale", float8_token, lambda size: size + 4),
    Store("float8, channel units, token scale", in_units_of_deviation(float8_token), lambda size: size + 4),
    Store("int8, token scale", int8_token, lambda size: size + 4),
    Store("int8, blocks of 64", int8_blocks, lambda size: size + 2 * -(-size // BLOCK)),
    Store("int8, channel range", int8_channel, lambda size: size),
    Store("int8, channel units, token scale", in_units_of_deviation(int8_token), lambda size: size + 4),
    Store("int8, robust units, blocks of 64", in_robust_units(int8_blocks), lambda size: size + 2 * -(-size // BLOCK)),
    Store("int8, robust units, token scale *", lambda x: encode_int8(x).decode(), lambda size: size + 4),
)


@dataclass(frozen=True)
class Shard:
    """Some responses: latents [N, J, D], where each begins, and their names."""

    latents_NJD: Tensor
    offsets: list[int]
    names: list[tuple[str, int]]
    massive_N: Tensor


def read_shards(
    latents: LatentsFolder, columns: Sequence[int], num_sequences: int, massive_share: float
) -> list[Shard]:
    """Whole shards, as their channels' units are of a shard, and of the last only as many responses as are scored."""
    generator = torch.Generator().manual_seed(0)
    shards: list[Shard] = []
    for index in range(latents.num_shards):
        left = num_sequences - sum(len(shard.names) for shard in shards)
        if left <= 0:
            break
        shard = latents.read_shard(index)
        names = latents.read_names(index)[:left]
        latents_NJD = shard.latents_NJD[:, columns].float()
        massive_N = torch.rand(len(latents_NJD), generator=generator) < massive_share
        for channel, value in MASSIVE.items():
            latents_NJD[massive_N, :, channel] = value
        shards.append(Shard(latents_NJD, shard.sequence_offsets.tolist(), names, massive_N))
    return shards


@torch.no_grad()
def scores(flow: Flow, shards: Sequence[Shard], num_prompt: int, store: Store, seed: int, timestep: float) -> list[Any]:
    """Scores and deviations of every response with enough scored tokens."""
    found = []
    for shard in shards:
        restored = store.restore(shard.latents_NJD)
        for start in range(0, len(shard.names), SEQUENCES_AT_ONCE):
            stop = min(start + SEQUENCES_AT_ONCE, len(shard.names))
            sequences = [restored[shard.offsets[i] : shard.offsets[i + 1]] for i in range(start, stop)]
            pairs = flow.pair(sequences, num_prompt)
            keys = [response_key(*name) for name in shard.names[start:stop]]
            result = flow.deviations(pairs, keys, seed=seed, timesteps=(timestep,))
            # Neither massive itself nor conditioned on a massive token.
            massive_N = shard.massive_N[shard.offsets[start] : shard.offsets[stop]]
            paired = torch.cat([pairs.paired.targets_M[None], pairs.paired.conditions_PM])
            plain_M = ~massive_N[paired].any(dim=0)
            for row in range(stop - start):
                own = (pairs.paired.sequence_M == row) & plain_M
                if int(own.sum()) >= SHORTEST:
                    found.append((result.score_M[own].double().numpy(), result.deviation_M[own].double().numpy()))
    return found


def agreement(reference: list[Any], other: list[Any]) -> dict[str, float]:
    """How far scores agree with those of the latents as they are."""
    ranks = [spearman(a, b) for (a, _), (b, _) in zip(reference, other, strict=True)]
    score, moved = (np.concatenate([pair[0] for pair in pairs]) for pairs in (reference, other))
    deviation, other_deviation = (np.concatenate([pair[1] for pair in pairs]) for pairs in (reference, other))
    change = np.abs(moved / score - 1)
    return {
        "rank_in_response": float(np.mean(ranks)),
        "lowest": float(np.min(ranks)),
        "deviation_correlation": float(np.corrcoef(deviation, other_deviation)[0, 1]),
        "median_change": float(np.median(change)),
        "largest_change": float(np.max(change)),
    }


def largest_channel_error(shards: Sequence[Shard], store: Store) -> float:
    """Root mean square error of the worst channel, in its standard deviations."""
    worst = 0.0
    for shard in shards:
        plain = shard.latents_NJD[~shard.massive_N]
        error = store.restore(shard.latents_NJD)[~shard.massive_N] - plain
        worst = max(worst, float((error.square().mean(0).sqrt() / plain.std(0)).max()))
    return worst


def compare(latents: LatentsFolder, path: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a way of storing, for one flow."""
    header, flow = load_flow(path, torch.device("cpu"))
    check_latents_fit(header, latents)
    shards = read_shards(latents, columns_of(latents, flow.tapped), options.sequences, options.massive_share)
    num_prompt, size = latents.info.num_prompt_tokens, latents.info.hidden_size

    def of(store: Store, seed: int) -> list[Any]:
        return scores(flow, shards, num_prompt, store, seed, options.timestep)

    reference = of(STORES[0], 0)
    rows = [{"store": "float32, another draw", "bytes": 4 * size * len(flow.tapped)}]
    rows[0] |= agreement(reference, of(STORES[0], 1))
    for store in STORES[1:]:
        num_bytes = round(store.state_bytes(size) * len(flow.tapped))
        error = {"channel_error": largest_channel_error(shards, store)}
        rows.append({"store": store.name, "bytes": num_bytes, **agreement(reference, of(store, 0)), **error})
    return rows


def main() -> None:
    """Read the arguments, and print a table for each flow."""
    parser = argparse.ArgumentParser(description="Scores from latents in 16 and 8 bits beside those from float32.")
    parser.add_argument("--latents", required=True, type=Path, help="latents stored in float32")
    parser.add_argument("--flow", required=True, action="append", type=Path, help="a flow of their layers; repeat it")
    parser.add_argument("--sequences", default=64, type=int, help="responses that are scored")
    parser.add_argument("--timestep", default=0.8, type=float, help="time at which the deviation is measured")
    parser.add_argument("--massive-share", default=0.0, type=float, help="share of the tokens that are made massive")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    latents = LatentsFolder(options.latents)
    if latents.info.dtype != "float32":
        parser.error(f"{options.latents} holds {latents.info.dtype}; extract with --store float32")
    results = {str(path): compare(latents, path, options) for path in options.flow}
    if options.json:
        print(json.dumps(results))
        return
    for path, rows in results.items():
        print(
            f"{path}, t = {options.timestep}, units from {SAMPLED_TOKENS} tokens of a shard at most; * is the product's"
        )
        shown = [{k: f"{v:.5f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        print("\n".join(text_table(shown)), end="\n\n")


if __name__ == "__main__":
    main()
