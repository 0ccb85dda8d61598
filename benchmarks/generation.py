"""Tokens a second of the hf engine and of vLLM on the same requests, one after the other in one process.

    python benchmarks/generation.py --model data/policy --problems 32 --samples 8
    python benchmarks/generation.py --model runs/smollm2/model --max-new-tokens 128 --dtype bfloat16

Each engine draws once before it is timed. End tokens are drawn like others where --full is given, so that both draw
the same number of tokens; without it, responses end where they end. Prints one line an engine, and the ratio.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch

from rlfr_cli.config.common import ProblemsConfig, SamplingConfig
from rlfr_cli.config.engine import EngineConfig
from rlfr_cli.config.sample import SampleConfig
from rlfr_cli.engines.generation import GenerationEngine, GenerationRequest, Sampling
from rlfr_cli.engines.hf import HfEngine
from rlfr_cli.engines.opening import choose_engine
from rlfr_cli.engines.vllm import VllmEngine
from rlfr_cli.policy.prompts import PromptRenderer
from rlfr_cli.stages.common import open_model

DATA = Path(__file__).resolve().parent.parent / "data"


def tokens_per_second(engine: GenerationEngine, requests: list[GenerationRequest], sampling: Sampling) -> float:
    engine.generate(requests[:8], dataclasses.replace(sampling, max_new_tokens=8), key=(0,))
    start = time.perf_counter()
    drawn = engine.generate(requests, sampling, key=(1,))
    seconds = time.perf_counter() - start
    tokens = sum(len(generation.token_ids) for generation in drawn)
    print(f"{engine.name}: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s", flush=True)
    return tokens / seconds


def end_nowhere(engine: GenerationEngine) -> None:
    """Let every response be as long as it may be."""
    if isinstance(engine, HfEngine):
        engine.policy.end_token_ids = frozenset()
    elif isinstance(engine, VllmEngine):
        engine.end_token_ids = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DATA / "policy"))
    parser.add_argument("--data", type=Path, default=DATA / "heldout.jsonl")
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--full", action="store_true", help="do not stop at end tokens")
    options = parser.parse_args()

    problems = ProblemsConfig(data=str(options.data))
    model = open_model(
        options.model,
        SampleConfig(model=options.model, problems=problems, device=options.device, dtype=options.dtype),
    )
    renderer = PromptRenderer(model.tokenizer, "")
    lines = options.data.read_text(encoding="utf-8").splitlines()[: options.problems]
    prompts = [tuple(renderer.render(json.loads(line)["problem"])) for line in lines]
    requests = [GenerationRequest(p, str(i), j) for i, p in enumerate(prompts) for j in range(options.samples)]
    sampling_config = SamplingConfig(max_new_tokens=options.max_new_tokens)
    sampling = Sampling(max_new_tokens=options.max_new_tokens)
    print(
        f"{options.model}: {len(requests)} responses, {model.placement.device} {model.placement.dtype}, "
        f"{torch.get_num_threads()} threads"
    )
    speeds = {}
    for name in ("hf", "vllm"):
        start = time.perf_counter()
        engine = choose_engine(EngineConfig(engine=name), sampling_config, model, prompts).open()
        print(f"{name}: ready after {time.perf_counter() - start:.1f} s", flush=True)
        if options.full:
            end_nowhere(engine)
        speeds[name] = tokens_per_second(engine, requests, sampling)
        engine.close()
    print(f"vllm / hf: {speeds['vllm'] / speeds['hf']:.2f}")


if __name__ == "__main__":
    main()
