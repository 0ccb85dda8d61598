"""Tiny policies, flows and rollouts in memory, for the tests of `policy/`, `engines/` and `rl/`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from rlfr_cli.artifacts.rollouts import RolloutRow
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.pairing import Pairing, TappedLayers
from rlfr_cli.flow.velocity import VelocityNetwork, VelocitySizes
from rlfr_cli.policy.forward import TokenSequence
from rlfr_cli.policy.loading import Placement, Policy, load_policy
from tiny_models import VOCABULARY, make_model_folder

CPU = Placement(torch.device("cpu"), torch.float32)
CPU_BF16 = Placement(torch.device("cpu"), torch.bfloat16)
HIDDEN = 32
END = 2


class ModelFolders:
    """Folders of tiny models, each made once a session."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, family: str = "qwen2", *, tied: bool = True, num_blocks: int = 4, seed: int = 0) -> Path:
        folder = self.root / f"{family}-{tied}-{num_blocks}-{seed}"
        if not folder.exists():
            make_model_folder(folder, family, seed=seed, scale=10.0, tied=tied, num_blocks=num_blocks)
        return folder

    def policy(
        self,
        family: str = "qwen2",
        *,
        tied: bool = True,
        num_blocks: int = 4,
        seed: int = 0,
        placement: Placement = CPU,
    ) -> Policy:
        """A policy of its own with float32 weights: tests may train it."""
        folder = self.folder(family, tied=tied, num_blocks=num_blocks, seed=seed)
        return load_policy(folder, placement, weights_dtype=torch.float32)


def random_sequences(lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[TokenSequence]:
    """Sequences with these numbers of prompt and response tokens; the last token of each is the end token."""
    drawn = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [drawn.randrange(7, len(VOCABULARY)) for _ in range(count)]

    return [TokenSequence(tokens(prompt), [*tokens(response - 1), END]) for prompt, response in lengths]


def rollout_row(sequence: TokenSequence, problem_id: str = "0", sample_index: int = 0, **facts: object) -> RolloutRow:
    """A correct, finished response unless ``facts`` say otherwise."""
    values: dict[str, object] = {
        "problem": "1 + 1",
        "answer": ["2"],
        "response_logprobs": [-1.0] * len(sequence.response),
        "response": "\\boxed{2}",
        "finish_reason": "stop",
        "reward": 1.0,
        "correct": True,
        "grade": "correct",
        "source": "policy",
    }
    return RolloutRow(
        problem_id=problem_id,
        sample_index=sample_index,
        prompt_token_ids=list(sequence.prompt),
        response_token_ids=list(sequence.response),
        **{**values, **facts},  # type: ignore[arg-type]
    )


def rollout_rows(lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[RolloutRow]:
    return [
        rollout_row(sequence, problem_id=str(index // 2), sample_index=index % 2)
        for index, sequence in enumerate(random_sequences(lengths, seed))
    ]


def tiny_flow(
    layers: tuple[int, ...] = (1, 2), context: Context = Context.NEXT, *, num_blocks: int = 4, zero: bool = False
) -> Flow:
    """A flow for latents of ``HIDDEN`` channels; every parameter random unless ``zero``, which leaves v = 0."""
    torch.manual_seed(0)
    network = VelocityNetwork(VelocitySizes(latent_size=HIDDEN, condition_size=HIDDEN, width=24, depth=2))
    if not zero:
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return Flow(network, TappedLayers(layers, num_blocks), (Pairing(context),))
