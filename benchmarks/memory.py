"""What `rlfr plan` predicts of tensors' memory, beside what torch's allocator counts in the same work.

    OMP_NUM_THREADS=1 python benchmarks/memory.py

Runs the project's own code on a random model of SmolLM2-135M's sizes (or those of --config) and a flow of its hidden
size: reading, two micro-batches and an optimiser step of training, drawing, a step of fit-flow, scoring, and what
train-rl does with a flow. Counted are the bytes that tensors take at most, weights and moments included: on a CPU the
allocations that torch's profiler records (it writes lines of its own to stderr), on a GPU (--device cuda)
torch.cuda.max_memory_allocated. What the whole process takes is printed apart. Ten minutes on one thread.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from rlfr_cli.artifacts.rollouts import RolloutRow
from rlfr_cli.config.flow import FlowRewardConfig, ScoreSource
from rlfr_cli.config.rl import OnlineConfig
from rlfr_cli.engines.adamw import NamedAdamW
from rlfr_cli.engines.generation import GenerationRequest, Sampling
from rlfr_cli.engines.hf import HfEngine
from rlfr_cli.engines.single import SingleProcessEngine
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.matching import DEFAULT_TOKENS_PER_CHUNK, accumulate_matching_gradients
from rlfr_cli.flow.noise import keyed_generator
from rlfr_cli.flow.pairing import Pairing, TappedLayers
from rlfr_cli.flow.velocity import VelocityNetwork, VelocitySizes
from rlfr_cli.planning.flow_sizes import FlowSizes
from rlfr_cli.planning.memory import MicroBatch, Numbers, reading, sampling, stepping_bytes, updating
from rlfr_cli.planning.model_sizes import ModelSizes, model_sizes
from rlfr_cli.policy.forward import TokenSequence, forward_batches, response_logprobs
from rlfr_cli.policy.loading import Placement, Policy
from rlfr_cli.rl.measuring import measure
from rlfr_cli.rl.online import update_flow

SMOLLM2_135M = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}  # fmt: skip
PROMPT = 32
DEPTH, LAYERS = 4, (8, 15, 22)


@dataclass(frozen=True)
class Case:
    """Bytes predicted and counted, and the bytes of the state that was there before."""

    name: str
    predicted: float
    counted: float
    state: float

    @property
    def error(self) -> float:
        """Of all bytes, as a share of those counted."""
        return self.predicted / self.counted - 1

    @property
    def error_above_state(self) -> float:
        """Of what came on top of weights and moments, as a share of that."""
        return (self.predicted - self.state) / (self.counted - self.state) - 1


def allocated(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes that tensors took at most during some work, beyond those at its start."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events, changes = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields))
    changes.sort(key=itemgetter(0))
    # The profiler's total goes on from what an earlier recording left.
    before = changes[0][1].total_allocated - changes[0][1].alloc_size
    return max(fields.total_allocated for _, fields in changes) - before


class NoTokenizer:
    """Stands in where responses are not read."""

    def decode(self, *given: Any, **options: Any) -> str:
        return ""


def random_policy(config: dict[str, Any], weights: torch.dtype, compute: torch.dtype, device: torch.device) -> Policy:
    torch.manual_seed(0)
    options = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **options), dtype=weights)
    return Policy(model.to(device), NoTokenizer(), Path(), Placement(device, compute), frozenset([-1]))


def sequences(rows: int, length: int) -> list[TokenSequence]:
    return [TokenSequence([1] * PROMPT, [2] * (length - PROMPT)) for _ in range(rows)]


def numbers_of(weights: torch.dtype, compute: torch.dtype, device: torch.device) -> Numbers:
    return Numbers(weights.itemsize, compute.itemsize, device.type == "cuda")


def training_cases(
    config: dict[str, Any], sizes: ModelSizes, rows: int, length: int, compute: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """Reading and training, without and with gradient checkpointing; weights and moments are float32."""
    numbers, name = numbers_of(torch.float32, compute, device), str(compute).removeprefix("torch.")
    batch = MicroBatch(rows * length, rows * (length - PROMPT))
    state = 12 * sizes.parameters
    for checkpointing in (False, True):
        policy = random_policy(config, torch.float32, compute, device)
        engine = SingleProcessEngine(
            policy, stored_dtype=torch.float32, betas=(0.9, 0.95), weight_decay=0.0, clip_norm=1.0,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip

        def backward(some: list[TokenSequence], policy: Policy = policy, engine: Any = engine) -> None:
            logprobs_N, _ = response_logprobs(policy, some, 1.0)
            del _
            engine.backward(-logprobs_N.mean())

        def two_micro_batches(backward: Callable[..., None] = backward) -> None:
            backward(sequences(rows, length))
            backward(sequences(rows, length))

        def step(engine: Any = engine) -> None:
            engine.step(1e-6)

        policy.model.train()
        backward(sequences(1, PROMPT + 1))
        step()  # moments exist from here on
        if not checkpointing:
            policy.model.eval()

            def read(policy: Policy = policy) -> None:
                for _ in forward_batches(policy, sequences(rows, length), temperature=1.0):
                    pass

            predicted = reading(sizes, numbers, batch, sizes.num_blocks).total
            yield Case(f"read, {name}", state + predicted, state + allocated(read, device), state)
            policy.model.train()
        words = f"{name}{', checkpointing' if checkpointing else ''}"
        predicted = 4 * sizes.parameters + updating(sizes, numbers, batch, checkpointing=checkpointing).total
        yield Case(f"update, {words}", state + predicted, state + allocated(two_micro_batches, device), state)
        if not checkpointing:
            state_and_gradients = state + 4 * sizes.parameters
            predicted = stepping_bytes(sizes, numbers)
            counted = allocated(step, device)
            yield Case("optimiser step", state_and_gradients + predicted, state_and_gradients + counted, state)


def foreach_case(config: dict[str, Any], sizes: ModelSizes, device: torch.device) -> Case:
    """AdamW's step over all weights at once, as on a GPU."""
    policy = random_policy(config, torch.float32, torch.float32, device)
    adamw = torch.optim.AdamW(policy.model.parameters(), lr=1e-6, foreach=True)
    for _ in range(2):
        for parameter in policy.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        counted = allocated(adamw.step, device)
    state = 12 * sizes.parameters
    predicted = stepping_bytes(sizes, Numbers(4, 4, on_gpu=True))
    return Case(
        "optimiser step, all at once",
        state + 4 * sizes.parameters + predicted,
        state + 4 * sizes.parameters + counted,
        state,
    )


def drawing_case(
    config: dict[str, Any], sizes: ModelSizes, weights: torch.dtype, compute: torch.dtype, device: torch.device
) -> Case:
    """Generation of groups of four; moments not counted."""
    rows, response, distinct = 16, 16, 4
    policy = random_policy(config, weights, compute, device)
    engine = HfEngine(policy, 10**9)
    # Prompts of different lengths, as in practice: the batch then has a mask.
    requests = [
        GenerationRequest(tuple([1] * (2 * PROMPT - row % distinct)), str(row % distinct), row) for row in range(rows)
    ]

    def draw() -> None:
        engine.generate(requests, Sampling(max_new_tokens=response), key=(0,))

    counted, state = allocated(draw, device), weights.itemsize * sizes.parameters
    predicted = sampling(sizes, numbers_of(weights, compute, device), rows, 2 * PROMPT, response, distinct).total
    kind = " in training" if weights != compute else ""
    name = f"draw{kind}, {str(compute).removeprefix('torch.')}"
    return Case(name, state + predicted, state + counted, state)


def flow_cases(sizes: ModelSizes, tokens: int, compute: torch.dtype, device: torch.device) -> Iterator[Case]:
    """A step of fit-flow after the first, and scoring with two timesteps and two draws."""
    flow, planned = random_flow(sizes, device)
    network, size = flow.network, sizes.hidden_size
    optimiser = NamedAdamW(network.named_parameters(), weight_decay=0.01, clip_norm=1.0)
    latents = [
        torch.randn(tokens // 4 + 1, planned.states, size, dtype=torch.bfloat16, device=device) for _ in range(4)
    ]
    casts, name = compute != torch.float32, str(compute).removeprefix("torch.")
    chunk = tokens // 2
    held = planned.latents_bytes(tokens, 2)

    def fit() -> None:
        accumulate_matching_gradients(
            network, flow.pair(latents), keyed_generator(device, 0), tokens_per_chunk=chunk, autocast_dtype=compute
        )

    def score() -> None:
        flow.deviations(
            flow.pair(latents), list("abcd"), seed=0, timesteps=(0.5, 0.8), num_draws=2, autocast_dtype=compute
        )

    fit()
    optimiser.step(1e-4)
    state = 12 * planned.parameters
    predicted = held + 4 * planned.parameters + planned.fitting_bytes(tokens, chunk, casts=casts)
    yield Case(f"fit-flow, {name}", state + held + predicted, state + held + allocated(fit, device), state)
    state = 4 * planned.parameters
    predicted = held + planned.scoring_bytes(tokens, 2, 2, casts=casts)
    yield Case(f"score, {name}", state + held + predicted, state + held + allocated(score, device), state)


def online_cases(
    config: dict[str, Any], sizes: ModelSizes, rows: int, length: int, compute: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """What train-rl does with a flow: measure two batches and keep their latents, then the flow's update on them."""
    numbers, name = numbers_of(torch.float32, compute, device), str(compute).removeprefix("torch.")
    policy = random_policy(config, torch.float32, compute, device)
    flow, planned = random_flow(sizes, device)
    optimiser = NamedAdamW(flow.network.named_parameters(), weight_decay=0.01, clip_norm=1.0)
    response = length - PROMPT
    rollouts = [
        RolloutRow(
            problem_id="p", sample_index=index, problem="", answer=[], prompt_token_ids=[1] * PROMPT,
            response_token_ids=[2] * response, response_logprobs=None, response="", finish_reason="stop",
        )
        for index in range(2 * rows)
    ]  # fmt: skip
    found: list[Any] = []

    def measure_all() -> None:
        measured = measure(
            policy, flow, rollouts, [True] * len(rollouts), temperature=1.0, reward=FlowRewardConfig(),
            scores_from=ScoreSource.FLOW, key=(0,), tokens_per_batch=rows * length,
        )  # fmt: skip
        found[:] = [measured.latents]

    def update() -> None:
        weights = {index: torch.ones(response, device=device) for index in found[0]}
        update_flow(flow, optimiser, found[0], weights, OnlineConfig(), (0.8,), (0,), compute)

    casts = compute != torch.float32
    batch = MicroBatch(rows * length, rows * response)
    state = 4 * sizes.parameters + 4 * planned.parameters
    kept = planned.latents_bytes(2 * rows * (response + 1), 4)
    scoring = planned.scoring_bytes(rows * response, 1, 1, casts=casts) + 2 * planned.latents_bytes(rows * response, 4)
    predicted = kept + max(reading(sizes, numbers, batch, sizes.num_blocks).total, scoring)
    yield Case(f"measure with a flow, {name}", state + predicted, state + allocated(measure_all, device), state)
    update()  # moments exist from here on
    state = 12 * planned.parameters + kept
    fitting = planned.fitting_bytes(2 * rows * response, DEFAULT_TOKENS_PER_CHUNK, casts=casts)
    predicted = kept + 4 * planned.parameters + fitting
    yield Case(f"flow update, {name}", state + predicted, state + allocated(update, device), state)


def random_flow(sizes: ModelSizes, device: torch.device) -> tuple[Flow, FlowSizes]:
    """A flow of the model's hidden size, and its sizes."""
    size, layers = sizes.hidden_size, tuple(index * sizes.num_blocks // 30 for index in LAYERS)
    network = VelocityNetwork(VelocitySizes(latent_size=size, condition_size=size, width=size, depth=DEPTH)).to(device)
    count = len(layers)
    planned = FlowSizes(latent_size=size, width=size, depth=DEPTH, states=count, layers=count, pairings=1)
    return Flow(network, TappedLayers(layers, sizes.num_blocks), (Pairing(Context.NEXT),)), planned


def cases(config: dict[str, Any], rows: int, length: int, device: torch.device) -> Iterator[Case]:
    """Every case, for micro-batches of this many rows of this length."""
    sizes = model_sizes(config)
    for compute in (torch.float32, torch.bfloat16):
        yield from training_cases(config, sizes, rows, length, compute, device)
        yield from flow_cases(sizes, rows * length, compute, device)
        yield from online_cases(config, sizes, rows, length, compute, device)
        yield drawing_case(config, sizes, torch.float32, compute, device)
    yield drawing_case(config, sizes, torch.bfloat16, torch.bfloat16, device)
    yield foreach_case(config, sizes, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="another model's config.json, with model_type and sizes alone")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    config = SMOLLM2_135M if given.config is None else json.loads(given.config.read_text(encoding="utf-8"))
    print(f"{'case':<32}  {'predicted MB':>12}  {'counted MB':>10}  {'error':>7}  {'above the state':>15}")
    for case in cases(config, given.rows, given.length, torch.device(given.device)):
        print(
            f"{case.name:<32}  {case.predicted / 1e6:>12,.0f}  {case.counted / 1e6:>10,.0f}  {case.error:>+7.1%}  "
            f"{case.error_above_state:>+15.1%}",
            flush=True,
        )
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"the whole process took {most / 1e6:,.0f} MB of main memory at most")


if __name__ == "__main__":
    main()
