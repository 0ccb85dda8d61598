"""Bytes that a policy's tensors take while it is read, trained and sampled from.

What is kept for the backward pass follows the operations of a decoder block as transformers writes them (RMSNorm in
float32, rotary embedding, scaled dot product attention, gated MLP), with w bytes a weight and c a computed number:

* a block keeps, a token: (4 + w) D for each norm, its input in float32 and what it normed; c D for what its matrices
  read, twice, or five times under autocast, which casts once for each matrix; c (2 Hd + 2 Kd) of attention, and 4 H of
  its sums; 4 c I of the MLP. With gradient checkpointing it keeps its input, w D, and the rest for one block at a time.
* under autocast every matrix has a copy of c bytes a weight (``casts``) while a pass of the blocks lasts, in the
  backward pass too, and with gradient checkpointing in the forward pass alone.
* float32 logits exist for a chunk of tokens: three numbers each in a forward pass, five in a backward pass, which also
  sums the output head's gradient over the chunks.
* weights, AdamW's moments and gradients are float32: 4, 8 and 4 bytes a parameter. AdamW's step adds 4 bytes a
  parameter on a GPU, where it steps all of them at once, and 8 a weight of the largest matrix on a CPU.
* the transformers cache keeps keys and values in w bytes; for rows of different prompts attention repeats one block's
  keys and values for each of its heads.

``benchmarks/memory.py`` compares these with what torch's allocator counts. Not counted: what kernels and libraries take
for themselves, and what an allocator cannot reuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlfr_cli.planning.model_sizes import ModelSizes
from rlfr_cli.policy.logprobs import CHUNK_ELEMENTS

PARTS = ("weights", "casts", "optimiser", "gradients", "activations", "logits", "kv_cache", "latents", "flow")
Parts = Mapping[str, float]


@dataclass(frozen=True)
class Phase:
    """A stretch of work and the bytes that its tensors take at most, by part."""

    name: str
    parts: Parts

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def largest(name: str, *phases: Parts) -> Phase:
    """The one of several that takes most, under one name."""
    return Phase(name, max(phases, key=lambda parts: sum(parts.values())))


def add(*all_parts: Parts) -> dict[str, float]:
    """The sum of parts, name by name."""
    return {name: sum(parts.get(name, 0) for parts in all_parts) for name in PARTS}


@dataclass(frozen=True)
class Numbers:
    """Bytes of a weight, and of a computed number; whether a GPU computes."""

    weight: int
    compute: int
    on_gpu: bool = True

    @property
    def casts(self) -> bool:
        """Autocast: weights are cast to what is computed in."""
        return self.compute < self.weight


@dataclass(frozen=True)
class MicroBatch:
    """Positions of a padded batch, and those that predict a response token."""

    tokens: float
    predicted: float


def saved_bytes(model: ModelSizes, numbers: Numbers) -> float:
    """What one block keeps of a token for the backward pass."""
    hidden, compute = model.hidden_size, numbers.compute
    # A norm's input and its normed input: the first in float32, the second in the dtype of the weights.
    norm = 4 + numbers.weight
    read = 5 * compute if numbers.casts else 2 * compute
    attention = compute * (2 * model.query_size + 2 * model.key_size) + 4 * model.num_heads
    if model.head_norms:
        attention += (4 + compute) * (model.query_size + model.key_size)
    return (norm * model.norms + read) * hidden + attention + 4 * compute * model.intermediate_size


def passing_bytes(model: ModelSizes, numbers: Numbers) -> float:
    """What a forward pass holds of a token at most where nothing is kept."""
    return 3 * numbers.compute * model.intermediate_size + (3 * numbers.weight + numbers.compute) * model.hidden_size


def logits_bytes(
    model: ModelSizes, numbers: Numbers, predicted: float, *, backward: bool, frozen: bool = False
) -> float:
    """Logits of a chunk, and in the backward pass the output head's gradient summed over several chunks.

    Args:
        frozen: the head has no gradient.
    """
    chunk = CHUNK_ELEMENTS // model.vocab_size
    logits, head = min(predicted, chunk) * model.vocab_size, model.embedding
    cast = numbers.compute * head if numbers.casts else 0
    if not backward:
        return 12 * logits + cast
    if predicted <= chunk or frozen:
        return 20 * logits + cast
    return cast + numbers.compute * head + max(20 * logits, numbers.compute * head + 4 * logits)


def reading(model: ModelSizes, numbers: Numbers, batch: MicroBatch, num_blocks: int, *, head: bool = True) -> Phase:
    """A forward pass without gradients: the blocks, then the logits; weights not counted."""
    casts = numbers.compute * num_blocks * model.block_matrices if numbers.casts else 0
    blocks = {"casts": casts, "activations": batch.tokens * passing_bytes(model, numbers)}
    hidden = {"activations": (batch.tokens + batch.predicted) * numbers.weight * model.hidden_size}
    logits = {"logits": logits_bytes(model, numbers, batch.predicted, backward=False)} if head else {}
    return largest("read", add(blocks), add(hidden, logits))


def updating(
    model: ModelSizes, numbers: Numbers, batch: MicroBatch, *, checkpointing: bool, frozen: bool = False
) -> Phase:
    """Forward and backward pass of a micro-batch; weights, moments and gradients not counted.

    Args:
        frozen: adapters are trained. They keep the same inputs as the weights would; their own activations are small.
    """
    hidden, blocks = model.hidden_size, model.num_blocks
    casts = numbers.compute * model.block_matrices if numbers.casts else 0
    saved, inputs = saved_bytes(model, numbers), numbers.weight * hidden
    logits = {"logits": logits_bytes(model, numbers, batch.predicted, backward=True, frozen=frozen)}
    around = batch.tokens * (4 + numbers.weight) * hidden + batch.predicted * numbers.weight * hidden
    # A tied embedding keeps the head's gradient until its own comes, last of all.
    of_head = 0 if frozen else numbers.weight * model.embedding
    late = {"gradients": of_head if model.tied else 0}
    last = add(late, {"gradients": of_head})
    if not checkpointing:
        kept = {"casts": blocks * casts, "activations": batch.tokens * blocks * saved + around}
        return largest("update", add(kept, logits), last)
    kept = {"activations": batch.tokens * blocks * inputs}
    forward = {"casts": blocks * casts, "activations": batch.tokens * (passing_bytes(model, numbers) - 2 * inputs)}
    of_one = batch.tokens * (saved + 2 * numbers.compute * model.intermediate_size)
    return largest(
        "update",
        add(kept, forward),
        add(kept, {"activations": around}, logits),
        add(kept, {"casts": casts, "activations": of_one}, late),
        last,
    )


def stepping_bytes(model: ModelSizes, numbers: Numbers) -> float:
    """What AdamW's step takes beside weights, moments and gradients."""
    return 4 * model.parameters if numbers.on_gpu else 8 * max(model.embedding, model.hidden_size)


def sampling(
    model: ModelSizes, numbers: Numbers, rows: float, prompt: float, response: float, distinct_prompts: float
) -> Phase:
    """Generation with transformers: prompts are read once each, then all rows grow to their full length."""
    positions = rows * (prompt + response)
    casts = numbers.compute * (model.num_blocks * model.block_matrices + model.embedding) if numbers.casts else 0
    cache = cache_bytes(model, numbers.weight)
    full = {"casts": casts, "kv_cache": positions * cache}
    repeated = 2 * numbers.weight + (2 * numbers.compute if numbers.casts else 0)
    begun = {
        "casts": casts,
        "kv_cache": distinct_prompts * prompt * cache,
        "activations": distinct_prompts * prompt * passing_bytes(model, numbers),
    }
    return largest(
        "generate",
        add(begun),
        add(full, {"activations": positions * model.query_size * repeated}),
        add(full, {"logits": 20 * rows * model.vocab_size}),
    )


def cache_bytes(model: ModelSizes, itemsize: float) -> float:
    """Keys and values of a position."""
    return 2 * itemsize * model.num_blocks * model.key_size
