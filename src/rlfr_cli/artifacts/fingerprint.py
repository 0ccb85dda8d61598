"""Fingerprints: what a file or a model holds, whatever its path.

A model's fingerprint is its architecture, read from ``config.json``, and the SHA-256 of its weights over the
tensors in sorted name order: name, type of numbers, shape, bytes. How they are spread over files makes no
difference. Only safetensors are read, straight from the file, without torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rlfr_cli.artifacts.files import canonical_json, read_json, sha256_file, write_atomically
from rlfr_cli.errors import ArtifactError, InputError, MissingInputError

# Names that architectures use for the same size in their config.json.
NUM_BLOCKS_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HIDDEN_SIZE_KEYS = ("hidden_size", "n_embd", "d_model")
HASH_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class ModelFingerprint:
    """What tells one model from another.

    Attributes:
        model_type: the architecture's name in ``config.json``.
        num_blocks: decoder blocks.
        hidden_size: width of the hidden states.
        vocab_size: rows of the embedding.
        weights_sha256: digest of the weights.
    """

    model_type: str
    num_blocks: int
    hidden_size: int
    vocab_size: int
    weights_sha256: str

    def same_architecture(self, other: ModelFingerprint) -> bool:
        """Whether latents of one mean the same kind of thing in the other."""
        return self.architecture == other.architecture

    @property
    def architecture(self) -> str:
        """For messages: ``qwen2, 24 blocks, hidden size 896, vocabulary 151936``."""
        return (
            f"{self.model_type}, {self.num_blocks} blocks, hidden size {self.hidden_size}, vocabulary {self.vocab_size}"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelFingerprint:
        """The inverse of :meth:`to_dict`.

        Raises:
            ArtifactError: a fact is missing or unknown.
        """
        if values.keys() != {field.name for field in fields(cls)}:
            raise ArtifactError(f"not a model fingerprint: its keys are {sorted(values)}")
        return cls(**values)


def file_fingerprint(path: str | Path) -> str:
    """The SHA-256 of an input file's bytes.

    Raises:
        MissingInputError: there is no such file.
    """
    if not Path(path).is_file():
        raise MissingInputError(f"{path} does not exist, or is not a file")
    return sha256_file(path)


def model_fingerprint(folder: str | Path) -> ModelFingerprint:
    """The fingerprint of a Hugging Face model folder.

    The digest of the weights is kept in a cache by path, size and time of the files, since it reads all of
    them: about a second a gigabyte.

    Raises:
        MissingInputError: there is no such folder.
        InputError: the folder is no model, or its weights are not safetensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingInputError(
            f"the model folder {folder} does not exist",
            hint="download the model first, for example with `hf download NAME --local-dir FOLDER`",
        )
    architecture = _read_architecture(folder)
    files = _weight_files(folder)
    return ModelFingerprint(weights_sha256=_cached_weights_sha256(files), **architecture)


def _read_architecture(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is not a model folder: it has no config.json",
            hint="give a folder that AutoModelForCausalLM.from_pretrained reads",
        )
    config = read_json(folder / "config.json")
    text = config.get("text_config", config)

    def fact(*keys: str) -> Any:
        for key in keys:
            if text.get(key) is not None:
                return text[key]
        raise InputError(
            f"{folder / 'config.json'} does not say its {keys[0]} (looked for {', '.join(keys)})",
            hint="give a decoder-only language model",
        )

    return {
        "model_type": str(text.get("model_type") or config.get("model_type", "unknown")),
        "num_blocks": int(fact(*NUM_BLOCKS_KEYS)),
        "hidden_size": int(fact(*HIDDEN_SIZE_KEYS)),
        "vocab_size": int(fact("vocab_size")),
    }


def _weight_files(folder: Path) -> list[Path]:
    """The files that ``from_pretrained`` would read: by index, the single file, or all there are."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in read_json(index).get("weight_map", {}).values()})
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    for file in files:
        if not file.is_file():
            raise InputError(
                f"{folder} is not whole: {index.name} names {file.name}, which is missing",
                hint="download or copy the model again",
            )
    if not files:
        pickles = sorted(file.name for file in (*folder.glob("*.bin"), *folder.glob("*.pt")))
        raise InputError(
            f"{folder} has no weights in safetensors"
            + (f"; {', '.join(pickles)} can run code when it is loaded, and is not read" if pickles else ""),
            hint="convert it: load it with transformers, then model.save_pretrained(FOLDER)",
        )
    return files


def _cached_weights_sha256(files: list[Path]) -> str:
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = hashlib.sha256(canonical_json(states)).hexdigest()
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(cache_home) / "rlfr" / "fingerprints" / f"{name}.json"
    try:
        return str(read_json(cache)["weights_sha256"])
    except (ArtifactError, OSError, KeyError):  # not there yet, or unreadable: hash again
        digest = weights_sha256(files)
    with suppress(OSError):  # a home that cannot be written only costs the time to hash again
        write_atomically(cache, canonical_json({"files": states, "weights_sha256": digest}))
    return digest


def weights_sha256(files: list[Path]) -> str:
    """The SHA-256 over name, type, shape and bytes of all tensors of some safetensors files, by name.

    Raises:
        InputError: a file is cut or is not safetensors.
    """
    places: dict[str, tuple[Path, dict[str, Any], int]] = {}
    for file in files:
        header, start = _read_safetensors_header(file)
        places.update({name: (file, entry, start) for name, entry in header.items()})
    return tensors_sha256(
        (name, entry["dtype"], entry["shape"], _blocks(file, start, entry))
        for name, (file, entry, start) in sorted(places.items(), key=lambda place: place[0])
    )


def tensors_sha256(tensors: Iterable[tuple[str, str, Sequence[int], Iterable[bytes | memoryview]]]) -> str:
    """The SHA-256 over tensors in sorted order of names: name, type as safetensors name it, shape, bytes in blocks."""
    digest = hashlib.sha256()
    for name, dtype, shape, blocks in tensors:
        digest.update(canonical_json([name, dtype, list(shape)]))
        for block in blocks:
            digest.update(block)
    return digest.hexdigest()


def _blocks(file: Path, start: int, entry: Mapping[str, Any]) -> Iterator[bytes]:
    begin, end = (start + offset for offset in entry["data_offsets"])
    with open(file, "rb") as opened:
        opened.seek(begin)
        for position in range(begin, end, HASH_BLOCK_BYTES):
            yield opened.read(min(HASH_BLOCK_BYTES, end - position))


def _read_safetensors_header(file: Path) -> tuple[dict[str, Any], int]:
    """The tensors' entries, and the position of the first byte after the header."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            if length > size:
                raise ValueError("the header is longer than the file")
            header = json.loads(opened.read(length))
        except ValueError as error:
            raise InputError(f"{file} is cut or is not a safetensors file ({error})") from None
    header.pop("__metadata__", None)
    ends = [entry["data_offsets"][1] for entry in header.values()]
    if 8 + length + max(ends, default=0) != size:
        raise InputError(
            f"{file} is cut or altered: {size} bytes, and its header speaks of {8 + length + max(ends, default=0)}",
            hint="download or copy the model again",
        )
    return header, 8 + length
