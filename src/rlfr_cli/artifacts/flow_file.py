"""The flow file: ``flow.safetensors``, a velocity network and everything needed to use it.

Tensors are the network's state dict, and ``statistics.mean`` and ``statistics.std`` [tapped states, hidden]
where latents are normalised. The header is JSON under the metadata key ``rlfr``; with it lies a digest of the
tensors, so that an altered file is refused. Nobody repeats any of it on a command line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from rlfr_cli.artifacts.files import canonical_json, write_atomically
from rlfr_cli.artifacts.fingerprint import ModelFingerprint
from rlfr_cli.artifacts.shards import open_tensors, read_metadata, save_tensors
from rlfr_cli.errors import ArtifactError, MismatchError, MissingInputError
from rlfr_cli.states import State, parse_state, state_text, states_in_order

FLOW_FORMAT_VERSION = 1
STATISTICS = ("statistics.mean", "statistics.std")
# A published network may be imported twice with other contexts: equal tensors that give other scores.
USED_FACTS = ("rms_epsilon", "time_scale", "layer_indices", "num_blocks", "pairings", "context_layer")
NOT_A_FLOW_HINT = "give the flow.safetensors that `rlfr fit-flow` wrote, or that of a checkpoint"


class PairingEntry(TypedDict):
    """A context pairing: ``next``, ``previous`` or ``self``, and the distance in tokens."""

    context: str
    shift: int


@dataclass(frozen=True, kw_only=True)
class FlowHeader:
    """What it takes to use a flow.

    Attributes:
        latent_size: dimensions of a target.
        condition_size: dimensions of a condition.
        width: of the residual blocks.
        depth: number of residual blocks.
        num_frequencies: sinusoidal features of time and of layer.
        rms_epsilon: of the network's norms.
        time_scale: multiplies time and layer before their features.
        layer_indices: tapped decoder blocks.
        num_blocks: decoder blocks of the model.
        pairings: which neighbour conditions which token.
        context_layer: the state of the condition, a block's index or ``final-norm``, where it is not the target's.
        normalisation: ``none``, or ``channel``: by the statistics in the file.
        model: fingerprint of the model whose latents it was fitted on; None for an imported flow.
        steps: optimiser steps taken.
        tokens_seen: training tokens seen, repeats included.
        train_loss: mean fitting loss of the last steps, None where none was taken.
        heldout_loss: best loss on held-out sequences, None where none were held out.
        policy_step: step of the policy, for the flow of a training checkpoint.
    """

    format_version: int = FLOW_FORMAT_VERSION
    latent_size: int
    condition_size: int
    width: int
    depth: int
    num_frequencies: int
    rms_epsilon: float
    time_scale: float
    layer_indices: tuple[int, ...]
    num_blocks: int
    pairings: tuple[PairingEntry, ...]
    context_layer: str | None = None
    normalisation: Literal["none", "channel"] = "none"
    model: ModelFingerprint | None = None
    steps: int = 0
    tokens_seen: int = 0
    train_loss: float | None = None
    heldout_loss: float | None = None
    policy_step: int | None = None

    @property
    def tapped(self) -> tuple[State, ...]:
        """What must be tapped of the policy, in the order of the latents' columns."""
        context = [] if self.context_layer is None else [parse_state(self.context_layer)]
        return states_in_order(self.layer_indices, context)

    @property
    def contexts(self) -> list[str]:
        """The pairings in words: ``next 1``, or ``next 1 of final-norm`` where that is the context layer."""
        of = "" if self.context_layer is None else f" of {state_text(self.context_layer)}"
        return [f"{pairing['context']} {pairing['shift']}{of}" for pairing in self.pairings]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlowHeader:
        """The inverse of :meth:`to_dict`, also after JSON.

        Raises:
            ArtifactError: a fact is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if values.keys() != names:
            raise ArtifactError(
                f"a flow's header lacks {sorted(names - values.keys())} "
                f"and has the unknown {sorted(values.keys() - names)}"
            )
        model = values["model"]
        return cls(
            **{
                **values,
                "layer_indices": tuple(values["layer_indices"]),
                "pairings": tuple(values["pairings"]),
                "model": None if model is None else ModelFingerprint.from_dict(model),
            }
        )


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 over name, type, shape and bytes of tensors, in sorted name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_flow(path: str | Path, header: FlowHeader, tensors: Mapping[str, Tensor]) -> None:
    """Write a flow file, whole or not at all.

    Args:
        tensors: the network's state dict, and ``STATISTICS`` if ``header.normalisation`` is ``channel``.
    """
    assert all(name in tensors for name in STATISTICS) == (header.normalisation == "channel")
    metadata = {"kind": "flow", "header": header.to_dict(), "tensors_sha256": tensors_sha256(tensors)}
    write_atomically(path, lambda partial: save_tensors(partial, tensors, metadata))


def read_flow_header(path: str | Path) -> FlowHeader:
    """The header of a flow file, without its tensors.

    Raises:
        MissingInputError: there is no such file.
        ArtifactError: it is cut, no flow file, or of another format version.
    """
    return _open_header(Path(path))[0]


def flow_fingerprint(path: str | Path) -> str:
    """Digest of what a flow computes: its tensors, and the facts by which latents become its input."""
    header, tensors = _open_header(Path(path))
    facts = {name: getattr(header, name) for name in USED_FACTS}
    return hashlib.sha256(canonical_json({**facts, "tensors": tensors})).hexdigest()


def read_flow(path: str | Path) -> tuple[FlowHeader, dict[str, Tensor]]:
    """The header and the tensors of a flow file, checked against the digest that was written with them.

    Raises:
        MissingInputError: there is no such file.
        ArtifactError: it is cut, altered, no flow file, or of another format version.
    """
    path = Path(path)
    header, expected = _open_header(path)
    with open_tensors(path) as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    digest = tensors_sha256(tensors)
    if digest != expected:
        raise ArtifactError(
            f"{path} is altered: SHA-256 {digest} of its tensors, {expected} expected",
            hint="copy the file again, or fit the flow again",
        )
    return header, tensors


def _open_header(path: Path) -> tuple[FlowHeader, str]:
    if not path.is_file():
        raise MissingInputError(f"{path} does not exist, or is not a file", hint=NOT_A_FLOW_HINT)
    with open_tensors(path) as opened:
        metadata = read_metadata(opened.metadata())
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    if metadata is None or metadata.get("kind") != "flow":
        raise ArtifactError(f"{path} is not a flow file of rlfr", hint=NOT_A_FLOW_HINT)
    version = metadata["header"].get("format_version")
    if version != FLOW_FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {version}; this version of rlfr reads version {FLOW_FORMAT_VERSION}",
            hint="fit the flow again, or read it with the version of rlfr that wrote it",
        )
    header = FlowHeader.from_dict(metadata["header"])
    if header.normalisation == "channel":
        for name in STATISTICS:
            if shapes.get(name, [0])[-1] != header.latent_size:
                raise ArtifactError(
                    f"{path} is altered: {name} has shape {shapes.get(name)}, and its last dimension must be "
                    f"the latent size {header.latent_size}"
                )
    return header, metadata["tensors_sha256"]


def check_flow_fits(
    header: FlowHeader,
    *,
    model: ModelFingerprint,
    allow_other_weights: bool = False,
    other_weights: Literal["warn", "error"] = "warn",
) -> list[str]:
    """Check that a flow may judge a model's latents.

    Args:
        model: the model that is to be scored or trained.
        allow_other_weights: the user says that other weights are meant.
        other_weights: what other weights are otherwise: a warning in ``score``, an error in ``train-rl``.

    Returns:
        Warnings, one text each.

    Raises:
        MismatchError: another architecture; or other weights, where these are an error.
    """
    if header.model is None:
        if (header.num_blocks, header.latent_size) != (model.num_blocks, model.hidden_size):
            raise MismatchError(
                f"the flow was fitted on a model of {header.num_blocks} blocks and hidden size "
                f"{header.latent_size}, and this model has {model.num_blocks} and {model.hidden_size}",
                hint="give the model that the flow was fitted on, or fit a flow for this one",
            )
        return ["the flow was imported, so nothing says whether it was fitted on this model"]
    if not header.model.same_architecture(model):
        raise MismatchError(
            f"the flow was fitted on another architecture ({header.model.architecture}) "
            f"than this model's ({model.architecture})",
            hint="give the model that the flow was fitted on, or fit a flow for this one",
        )
    if header.model.weights_sha256 == model.weights_sha256:
        return []
    message = (
        f"the flow was fitted on other weights (SHA-256 {header.model.weights_sha256[:16]}…) "
        f"than this model's ({model.weights_sha256[:16]}…)"
    )
    if other_weights == "error" and not allow_other_weights:
        raise MismatchError(
            message,
            hint="extract latents with this model and fit again, or give --allow-other-weights",
        )
    return [message]
