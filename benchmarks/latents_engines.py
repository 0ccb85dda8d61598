"""Latents of expert responses by transformers and by vLLM, in one process: how far apart, and tokens a second.

    python benchmarks/latents_engines.py --model data/policy
    python benchmarks/latents_engines.py --model runs/smollm2/model --limit 64 --dtype bfloat16

Each engine reads 8 sequences before it is timed; all tokens count, those of prompts too. Relative errors are norms of
differences over norms, by token, against transformers in float32. Prints a line an engine and a line a block.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch

from rlfr_cli.config.extract_latents import ExtractLatentsConfig, ReadingConfig, StoreDtype
from rlfr_cli.engines.vllm_latents import VllmLatents, check_vllm_latents
from rlfr_cli.policy.forward import TokenSequence
from rlfr_cli.policy.loading import load_decoder
from rlfr_cli.policy.tapping import tap, tapped_layers
from rlfr_cli.stages.common import ModelInput, open_model
from rlfr_cli.stages.extraction import extracted_latents
from rlfr_cli.stages.responses import open_responses

DATA = Path(__file__).resolve().parent.parent / "data"
Read = Callable[[Sequence[TokenSequence]], list[torch.Tensor]]


def timed(name: str, sequences: list[TokenSequence], read: Read) -> tuple[float, torch.Tensor]:
    """Tokens a second, and latents [N, J, D] in float32 of all sequences in order."""
    read(sequences[-8:])
    start = time.perf_counter()
    latents = read(sequences)
    seconds = time.perf_counter() - start
    tokens = sum(map(len, sequences))
    print(f"{name}: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s", flush=True)
    return tokens / seconds, torch.cat(latents).float()


def read_by_hooks(
    model: ModelInput, layers: tuple[int, ...], sequences: list[TokenSequence]
) -> tuple[float, torch.Tensor]:
    decoder = load_decoder(model.folder, model.placement, layers)
    with tap(decoder, layers) as taps:

        def read(sequences: Sequence[TokenSequence]) -> list[torch.Tensor]:
            device, store = model.placement.device, StoreDtype.INT8  # which rounds nothing here
            pairs = extracted_latents(decoder, taps, sequences, 1, tokens_per_batch=16384, store=store, device=device)
            found = {index: latents.cpu() for index, latents in pairs}
            return [found[index] for index in range(len(sequences))]

        return timed(f"hf {model.placement.dtype}", sequences, read)


def compare(name: str, layers: tuple[int, ...], latents_NJD: torch.Tensor, exact_NJD: torch.Tensor) -> None:
    errors_NJ = (latents_NJD - exact_NJD).norm(dim=-1) / exact_NJD.norm(dim=-1)
    for layer, errors_N in zip(layers, errors_NJ.T, strict=True):
        print(f"{name}, block {layer}: relative error {errors_N.mean():.2e}, at most {errors_N.max():.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DATA / "policy"))
    parser.add_argument("--data", default=str(DATA / "expert.jsonl"))
    parser.add_argument("--limit", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--engine-arg", action="append", default=[])
    parser.add_argument("--no-prefix-caching", action="store_true")
    options = parser.parse_args()

    def opened(dtype: str) -> tuple[ExtractLatentsConfig, ModelInput]:
        reading = ReadingConfig(
            engine="vllm", engine_arg=tuple(options.engine_arg), prefix_caching=not options.no_prefix_caching
        )
        given = {"data": options.data, "limit": options.limit, "device": options.device, "dtype": dtype}
        config = ExtractLatentsConfig(model=options.model, reading=reading, **given)
        return config, open_model(config.model, config)

    config, model = opened(options.dtype)
    responses = open_responses(config, model, options.limit)
    sequences = [sequence for rows in responses.units for sequence in responses.sequences(rows)]
    layers = tapped_layers(model.fingerprint.num_blocks, config.layer_fraction)
    print(f"{options.model}: {len(sequences)} responses, blocks {layers}, {torch.get_num_threads()} threads")
    speed, latents = read_by_hooks(model, layers, sequences)
    exact = latents if options.dtype == "float32" else read_by_hooks(opened("float32")[1], layers, sequences)[1]
    if exact is not latents:
        compare(f"hf {options.dtype}", layers, latents, exact)
    start = time.perf_counter()
    with closing(VllmLatents(check_vllm_latents(config.reading, model, layers, map(len, sequences)))) as engine:
        print(f"vllm: ready after {time.perf_counter() - start:.1f} s", flush=True)
        fast, latents = timed("vllm", sequences, lambda sequences: engine.read(sequences, 1))
    compare(f"vllm {options.dtype}", layers, latents, exact)
    print(f"vllm / hf: {fast / speed:.2f}")


if __name__ == "__main__":
    main()
