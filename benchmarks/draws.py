"""How well scores of different noise draws agree, with independent draws and with antithetic pairs.

    python benchmarks/draws.py --flow flow.safetensors --latents latents/

Prints, for each number of draws, the mean rank correlation within responses of two scores that have as many draws each,
over the first 64 sequences; the mean over several seeds, and their spread. One thread is enough.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from rlfr_cli.flow.deviation import keyed_noise
from rlfr_cli.flow.diagnostics import draw_scores
from rlfr_cli.flow.draws import mean_rank_correlation
from rlfr_cli.stages.flows import load_flow
from rlfr_cli.stages.latent_sequences import LatentSequences

NUM_DRAWS = (1, 2, 4, 8, 16)
SEQUENCES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flow", type=Path, required=True)
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--timestep", type=float, action="append")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    header, flow = load_flow(given.flow, torch.device("cpu"))
    data = LatentSequences([given.latents], 8192).of_states(header.tapped)
    chosen = range(min(SEQUENCES, len(data.places)))
    pairs = flow.pair([data.read(index) for index in chosen], data.info.num_prompt_tokens)
    keys = [str(index) for index in chosen]
    tokens = pairs.paired.valid_per_response_R.tolist()
    print(f"{'draws':>5}  {'independent':>20}  {'antithetic pairs':>20}")
    for num in NUM_DRAWS:
        cells = []
        for antithetic in (False, True):
            if antithetic and num < 2:
                cells.append("-")
                continue
            found = []
            for seed in range(given.seeds):
                noise = keyed_noise(seed, keys, pairs, antithetic=antithetic)
                scores = draw_scores(flow, pairs, noise, timesteps=given.timestep or [0.8], num_draws=2 * num)
                found.append(mean_rank_correlation(scores[:, :num].mean(1), scores[:, num:].mean(1), tokens))
            cells.append(f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}")
        print(f"{num:>5}  {cells[0]:>20}  {cells[1]:>20}", flush=True)


if __name__ == "__main__":
    main()
