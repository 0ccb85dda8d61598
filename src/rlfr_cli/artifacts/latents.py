"""Latents on disk: ragged and packed, in safetensors shards of a stage folder.

Legend: ``N`` kept tokens of a shard, ``J`` tapped states, ``D`` hidden size, ``S`` sequences.
A shard holds ``latents`` [N, J, D], ``token_ids`` [N], ``sequence_offsets`` [S + 1] and ``sequence_ids`` [S],
the row of each sequence in the source that the manifest names. A sequence is some of the last prompt tokens,
as many as the manifest's ``num_prompt_tokens``, then all response tokens. Layers stand in the order of
``layer_indices``; context layers, such as the final normed state, follow them. The shard's metadata names the
responses: ``responses`` [S] of (problem_id, sample_index).

In 8 bits (``int8.py``) ``latents`` is int8, and beside it lie ``latents_scale`` [N, J], ``latents_centre`` and
``latents_unit`` [J, D]; what is read is float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlfr_cli.artifacts.fingerprint import ModelFingerprint
from rlfr_cli.artifacts.int8 import INT8, Int8Latents, encode_int8, int8_bytes
from rlfr_cli.artifacts.reading import ArtifactFolder
from rlfr_cli.artifacts.shards import open_tensors, read_metadata
from rlfr_cli.errors import ArtifactError
from rlfr_cli.states import State, parse_state

LATENT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", INT8: "I8"}


@dataclass(frozen=True, kw_only=True)
class LatentsInfo:
    """What the manifest says of latents.

    Attributes:
        layer_indices: tapped decoder blocks, in the order of the layer axis.
        context_layers: names of further states after them on the layer axis, that only serve as conditions.
        num_blocks: decoder blocks of the model.
        hidden_size: D.
        num_prompt_tokens: prompt tokens kept before each response.
        dtype: ``bfloat16``, ``float16``, ``float32`` or ``int8``.
        model: fingerprint of the model that made them.
        source: fingerprint of the responses that it read.
    """

    layer_indices: tuple[int, ...]
    context_layers: tuple[str, ...] = ()
    num_blocks: int
    hidden_size: int
    num_prompt_tokens: int
    dtype: str
    model: ModelFingerprint
    source: str

    @property
    def states(self) -> tuple[State, ...]:
        """What lies on the layer axis, in order."""
        return (*self.layer_indices, *map(parse_state, self.context_layers))

    def to_extra(self) -> dict[str, Any]:
        """The facts as the manifest holds them."""
        return asdict(self)

    @classmethod
    def from_extra(cls, extra: Mapping[str, Any]) -> LatentsInfo:
        """The inverse of :meth:`to_extra`; other facts are left alone.

        Raises:
            ArtifactError: a fact is missing.
        """
        try:
            # Format version 1 began without context layers.
            values = {field.name: extra[field.name] for field in fields(cls) if field.name != "context_layers"}
            values["context_layers"] = extra.get("context_layers", ())
        except KeyError as error:
            raise ArtifactError(f"the manifest of the latents lacks {error}") from None
        values["layer_indices"] = tuple(values["layer_indices"])
        values["context_layers"] = tuple(values["context_layers"])
        values["model"] = ModelFingerprint.from_dict(values["model"])
        return cls(**values)


def latents_bytes(num_tokens: int, num_layers: int, hidden_size: int, dtype: str, *, num_shards: int = 1) -> int:
    """Bytes that latents take on disk, token ids included."""
    ids = num_tokens * torch.int32.itemsize
    if dtype == INT8:
        return ids + int8_bytes(num_tokens, num_layers, hidden_size, num_shards)
    return ids + num_tokens * num_layers * hidden_size * LATENT_DTYPES[dtype].itemsize


def latents_shard(
    latents_NJD: Tensor, token_ids_N: Tensor, sequence_offsets: Tensor, sequence_ids: Tensor, *, int8: bool = False
) -> dict[str, Tensor]:
    """The tensors of a shard, checked, in the types that the format fixes.

    Args:
        latents_NJD: [N, J, D], bfloat16, float16 or float32.
        token_ids_N: [N].
        sequence_offsets: [S + 1]; sequence i is the tokens offsets[i] to offsets[i + 1] − 1.
        sequence_ids: [S].
        int8: store the latents in 8 bits, in place of their own dtype.
    """
    num_tokens = len(token_ids_N)
    assert latents_NJD.ndim == 3, latents_NJD.shape
    assert len(latents_NJD) == num_tokens, (latents_NJD.shape, num_tokens)
    assert latents_NJD.dtype in LATENT_DTYPES.values(), latents_NJD.dtype
    assert len(sequence_offsets) == len(sequence_ids) + 1, (len(sequence_offsets), len(sequence_ids))
    assert sequence_offsets[[0, -1]].tolist() == [0, num_tokens], sequence_offsets
    assert bool((sequence_offsets.diff() >= 0).all()), sequence_offsets
    return {
        **(_eight_bits(latents_NJD) if int8 else {"latents": latents_NJD}),
        "token_ids": token_ids_N.to(torch.int32),
        "sequence_offsets": sequence_offsets.to(torch.int64),
        "sequence_ids": sequence_ids.to(torch.int64),
    }


def _eight_bits(latents_NJD: Tensor) -> dict[str, Tensor]:
    rounded = encode_int8(latents_NJD)
    return {
        "latents": rounded.q_NJD,
        "latents_scale": rounded.scale_NJ,
        "latents_centre": rounded.centre_JD,
        "latents_unit": rounded.unit_JD,
    }


@dataclass(frozen=True)
class LatentsShard:
    """Some sequences of a shard: latents [N, J, D], token ids [N], offsets [S + 1] from 0, ids [S]."""

    latents_NJD: Tensor
    token_ids_N: Tensor
    sequence_offsets: Tensor
    sequence_ids: Tensor

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_ids)

    def sequence(self, index: int) -> tuple[Tensor, Tensor]:
        """Latents [tokens, J, D] and token ids [tokens] of one sequence, as views."""
        begin, end = self.sequence_offsets[index : index + 2].tolist()
        return self.latents_NJD[begin:end], self.token_ids_N[begin:end]


class LatentsFolder:
    """Latents, open for reading shard by shard or some sequences at a time.

    Attributes:
        folder: the artifact.
        info: what the manifest says.
        num_shards: shards.
        num_sequences: sequences of all shards.

    Raises:
        ArtifactError: the folder holds no latents, or they are cut, altered or unfinished.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = ArtifactFolder(path, "latents")
        self.path = self.folder.path
        self.info = LatentsInfo.from_extra(self.folder.extra)
        self.num_shards = len(self.folder.shards)
        self.num_sequences = self.folder.num_rows
        self._tokens_by_shard = [self._check_shape(index) for index in range(self.num_shards)]

    def _check_shape(self, index: int) -> int:
        path = self.folder.tensor_shard(index, verify=False)
        with open_tensors(path) as tensors:
            latents = tensors.get_slice("latents")
            shape, dtype = latents.get_shape(), latents.get_dtype()
        if dtype != SAFETENSORS_DTYPES[self.info.dtype]:
            raise ArtifactError(f"{path} holds latents in {dtype}, and the manifest speaks of {self.info.dtype}")
        if shape[1:] != [len(self.info.states), self.info.hidden_size]:
            raise ArtifactError(
                f"{path} holds latents of shape {shape}, and the manifest speaks of {len(self.info.states)} "
                f"layers of hidden size {self.info.hidden_size}"
            )
        return shape[0]

    @property
    def num_tokens(self) -> int:
        return sum(self._tokens_by_shard)

    @property
    def fingerprint(self) -> str:
        return self.folder.fingerprint

    def read_offsets(self, index: int) -> tuple[Tensor, Tensor]:
        """``sequence_offsets`` [S + 1] and ``sequence_ids`` [S] of a shard, without its latents."""
        with open_tensors(self.folder.tensor_shard(index, verify=False)) as tensors:
            return tensors.get_tensor("sequence_offsets"), tensors.get_tensor("sequence_ids")

    def read_names(self, index: int) -> list[tuple[str, int]]:
        """(problem_id, sample_index) of the responses of a shard's sequences.

        Raises:
            ArtifactError: the shard does not name them.
        """
        path = self.folder.tensor_shard(index, verify=False)
        with open_tensors(path) as tensors:
            names = (read_metadata(tensors.metadata()) or {}).get("responses")
        if names is None or len(names) != self.folder.shards[index].rows:
            raise ArtifactError(f"{path} does not name the responses of its sequences")
        return [(str(problem_id), int(sample_index)) for problem_id, sample_index in names]

    def read_response_tokens(self, index: int) -> list[list[int]]:
        """Token ids of the responses of a shard, without the prompt tokens kept before them."""
        with open_tensors(self.folder.tensor_shard(index, verify=False)) as tensors:
            token_ids = tensors.get_tensor("token_ids").tolist()
            offsets = tensors.get_tensor("sequence_offsets").tolist()
        num_prompt = self.info.num_prompt_tokens
        return [token_ids[begin + num_prompt : end] for begin, end in pairwise(offsets)]

    def read_shard(self, index: int, *, verify: bool = True) -> LatentsShard:
        """A whole shard; its digest is checked the first time, unless told not to."""
        return self.read_sequences(index, 0, self.folder.shards[index].rows, verify=verify)

    def read_sequences(self, index: int, start: int, stop: int, *, verify: bool = True) -> LatentsShard:
        """Sequences ``start`` to ``stop`` − 1 of a shard, reading no others' latents from the disk.

        A shard that was not read before is read once to check its digest, unless ``verify`` is false.
        """
        with open_tensors(self.folder.tensor_shard(index, verify=verify)) as tensors:
            offsets = tensors.get_slice("sequence_offsets")[start : stop + 1]
            begin, end = int(offsets[0]), int(offsets[-1])
            return LatentsShard(
                self._read_latents(tensors, begin, end),
                tensors.get_slice("token_ids")[begin:end],
                offsets - begin,
                tensors.get_slice("sequence_ids")[start:stop],
            )

    def _read_latents(self, tensors: Any, begin: int, end: int) -> Tensor:
        """Latents [N, J, D] of some tokens, float32 where they are stored in 8 bits."""
        latents_NJD: Tensor = tensors.get_slice("latents")[begin:end]
        if self.info.dtype != INT8:
            return latents_NJD
        return Int8Latents(
            latents_NJD,
            tensors.get_slice("latents_scale")[begin:end],
            tensors.get_tensor("latents_centre"),
            tensors.get_tensor("latents_unit"),
        ).decode()

    def iter_shards(self, *, verify: bool = True) -> Iterator[LatentsShard]:
        """All shards in order, one in memory at a time."""
        for index in range(self.num_shards):
            yield self.read_shard(index, verify=verify)
