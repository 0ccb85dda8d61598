"""Operations and hours of a stage.

A matrix of P weights takes 2 P operations a token forward and 4 P backward; attention to S positions 4 Hd S a block,
and a causal pass over L positions attends to L / 2 of them on average. The embedding's look-up counts nothing, the
output head counts where log-probabilities are wanted. With gradient checkpointing the blocks run forward once more.
Hours = operations / (GPUs x operations a second x the share of them that is reached).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlfr_cli.planning.model_sizes import ModelSizes

SECONDS = 3600.0


@dataclass(frozen=True)
class Work:
    """Operations of a stage by kind, and the GPUs that do them.

    Attributes:
        tokens: response tokens that are drawn or read, each counted once.
        generation: of drawing responses; what is reached of the GPU is another share there.
        other: of reading, training and the flow.
    """

    tokens: float
    gpus: int
    generation: float = 0.0
    other: Mapping[str, float] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        return self.generation + sum(self.other.values())

    def hours(self, gpu_flops: float, utilisation: float, generation_utilisation: float) -> float:
        """Hours at these shares of what a GPU can do."""
        spent = self.generation / generation_utilisation + sum(self.other.values()) / utilisation
        return spent / (self.gpus * gpu_flops * SECONDS)


def reading_flops(
    model: ModelSizes, responses: float, prompt: float, response: float, num_blocks: int, *, head: bool
) -> float:
    """A forward pass over prompts and responses."""
    length = prompt + response
    blocks = responses * length * num_blocks * model.block_flops(length / 2)
    return blocks + (responses * response * model.head_flops if head else 0)


def drawing_flops(model: ModelSizes, prompts: float, responses: float, prompt: float, response: float) -> float:
    """Each prompt read once, each response drawn token by token."""
    read = prompts * prompt * model.num_blocks * model.block_flops(prompt / 2)
    drawn = responses * response * (model.num_blocks * model.block_flops(prompt + response / 2) + model.head_flops)
    return read + drawn


def training_flops(
    model: ModelSizes, responses: float, prompt: float, response: float, *, checkpointing: bool, frozen: bool = False
) -> float:
    """Forward and backward pass; frozen weights have no gradient, only what passes through them has."""
    once = reading_flops(model, responses, prompt, response, model.num_blocks, head=True)
    again = reading_flops(model, responses, prompt, response, model.num_blocks, head=False) if checkpointing else 0
    return (2 if frozen else 3) * once + again
