"""Sizes of a language model, from its config.json alone: parameters, matrices, operations a token.

Reads a ``config.json`` and no weights. A decoder of V tokens, size D, B blocks of H heads and K key-value heads of size
d, and a gated MLP of size I has B (2 Hd D + 2 Kd D + 3 D I) weights in its blocks' matrices, V D in its embedding, as
many again in an output head that is not tied, and norms and biases. Two operations a weight and token make a forward
pass, and 4 Hd S more a block where a token attends to S others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfr_cli.errors import InputError, MissingInputError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Family:
    """What a family's config.json may leave unsaid, and what its blocks hold beside the usual matrices."""

    tied: bool = False
    head_dim: int | None = None
    bias: bool = False  # of queries, keys and values, not of the attention's output
    head_norms: bool = False  # an RMSNorm of each head's query and key
    norms: int = 2  # of a block


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "phi3": Family(),
    "smollm3": Family(tied=True),
    "qwen2": Family(bias=True),
    "qwen3": Family(head_dim=128, head_norms=True),
    "gemma": Family(tied=True, head_dim=256),
    "gemma2": Family(tied=True, head_dim=256, norms=4),
    "gemma3_text": Family(tied=True, head_dim=256, head_norms=True, norms=4),
}


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """A dense decoder.

    Attributes:
        family: its ``model_type``.
        known: False where the family is not in ``FAMILIES`` and is counted as a llama.
        query_size, key_size: of all heads together; values are as large as keys.
        biases: of one block.
        stored_bytes: of a weight on disk.
    """

    family: str
    known: bool
    num_blocks: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    query_size: int
    key_size: int
    head_dim: int
    vocab_size: int
    tied: bool
    biases: int
    head_norms: bool
    norms: int
    stored_bytes: int

    @property
    def block_matrices(self) -> int:
        """Weights of a block's matrices."""
        return self.hidden_size * (2 * self.query_size + 2 * self.key_size + 3 * self.intermediate_size)

    @property
    def block_parameters(self) -> int:
        head_norms = 2 * self.head_dim if self.head_norms else 0
        return self.block_matrices + self.biases + self.norms * self.hidden_size + head_norms

    @property
    def embedding(self) -> int:
        """Weights of the embedding, and of the output head."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        ends = self.embedding if self.tied else 2 * self.embedding
        return self.num_blocks * self.block_parameters + ends + self.hidden_size

    def decoder_parameters(self, num_blocks: int) -> int:
        """Parameters of the embedding and the first blocks, without an output head."""
        return self.embedding + num_blocks * self.block_parameters + self.hidden_size

    def block_flops(self, attended: float) -> float:
        """Operations of one block's forward pass for a token that attends to so many."""
        return 2 * self.block_matrices + 4 * self.query_size * attended

    @property
    def head_flops(self) -> int:
        """Operations of the output head for a token."""
        return 2 * self.embedding


def read_model_sizes(path: Path) -> ModelSizes:
    """Read the sizes of a model folder, or of a config.json file.

    Raises:
        MissingInputError: there is no such file.
        InputError: it is not the config of a dense decoder.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise MissingInputError(
            f"--model {path}: no config.json there",
            hint="give a model folder, or its config.json alone: no weights are needed",
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, Mapping):
        raise InputError(f"{file} must hold a JSON object, got {type(config).__name__}")
    try:
        return model_sizes({**config, **config.get("text_config", {})})
    except KeyError as error:
        raise InputError(f"{file} does not name {error}", hint="rlfr plan counts dense decoders") from None


def model_sizes(config: Mapping[str, Any]) -> ModelSizes:
    """The sizes that a config speaks of.

    Raises:
        KeyError: a size is missing.
        InputError: a mixture of experts, which is counted otherwise.
    """
    name = str(config["model_type"])
    if any((config.get(key) or 0) > 1 for key in EXPERTS):
        raise InputError(f"a {name} model is a mixture of experts", hint="rlfr plan counts dense decoders")
    family = FAMILIES.get(name, Family())
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or family.head_dim or hidden // heads)
    query, key = heads * head_dim, int(config.get("num_key_value_heads") or heads) * head_dim
    attention_bias = query + 2 * key if family.bias else query + 2 * key + hidden if config.get("attention_bias") else 0
    mlp_bias = 2 * int(config["intermediate_size"]) + hidden if config.get("mlp_bias") else 0
    return ModelSizes(
        family=name,
        known=name in FAMILIES,
        num_blocks=int(config["num_hidden_layers"]),
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        num_heads=heads,
        query_size=query,
        key_size=key,
        head_dim=head_dim,
        vocab_size=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        biases=attention_bias + mlp_bias,
        head_norms=family.head_norms,
        norms=family.norms,
        stored_bytes=DTYPE_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 4),
    )
