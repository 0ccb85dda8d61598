"""What a flow is fitted on: latents as one list of sequences, here those of one or several folders.

Folders that are fitted together must come from the same model and layers; of their context layers, each must hold the
one in use. Memory holds offsets, never latents. ``live_latents.py`` has the other source of the same protocol.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from rlfr_cli import console
from rlfr_cli.artifacts.flow_file import FlowHeader, check_flow_fits
from rlfr_cli.artifacts.latents import LatentsFolder, LatentsInfo
from rlfr_cli.errors import InputError, MismatchError
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.noise import keyed_generator
from rlfr_cli.states import State, state_text


class LatentSource(Protocol):
    """Sequences of latents that `fit-flow` reads by index.

    Attributes:
        info: what the manifest of these latents says, or would say.
        rms_epsilon: that of the language model's norms.
    """

    info: LatentsInfo
    rms_epsilon: float

    @property
    def inputs(self) -> dict[str, Any]:
        """Fingerprints, for ``stage.json``."""
        ...

    def for_flow(self, flow: Flow) -> LatentSource:
        """The same sequences with the states that a flow reads."""
        ...

    def response_tokens(self, index: int) -> int:
        """Response tokens of a sequence that are used."""
        ...

    def read_many(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Latents [prompt tokens kept + T, J, D] of some sequences."""
        ...

    def split(self, holdout_fraction: float, max_holdout: int, seed: int) -> tuple[list[int], list[int]]:
        """Indices for training and indices held out."""
        ...

    def facts(self) -> dict[str, Any]:
        """What the summary says of this source."""
        ...


@dataclass(frozen=True)
class _Place:
    """Where a sequence lies, and how many tokens it has, prompt tokens included."""

    folder: int
    shard: int
    index: int
    length: int


class LatentSequences:
    """Sequences of latents over all shards of some folders, of their targets' blocks unless told otherwise.

    Args:
        paths: latents folders.
        max_tokens: tokens of a sequence that are used, prompt tokens included.

    Attributes:
        info: what the first folder's manifest says; the others agree in all that matters.
        fingerprints: content of each folder.
        rms_epsilon: that of the language model's norms.

    Raises:
        MismatchError: folders of different models, layers or shifts.
        InputError: no sequence is left.
    """

    def __init__(self, paths: Sequence[Path], max_tokens: int) -> None:
        self.folders = [LatentsFolder(path) for path in paths]
        self.max_tokens = max_tokens
        self.info = self.folders[0].info
        for folder in self.folders[1:]:
            _check_same_origin(self.folders[0], folder)
        self.columns = [list(range(len(self.info.layer_indices)))] * len(self.folders)
        self.fingerprints = [folder.fingerprint for folder in self.folders]
        self.rms_epsilon = float(self.folders[0].folder.extra.get("rms_norm_eps", 1e-6))
        self.places = [
            _Place(number, shard, index, length)
            for number, folder in enumerate(self.folders)
            for shard in range(folder.num_shards)
            for index, length in enumerate(folder.read_offsets(shard)[0].diff().tolist())
            if length > self.info.num_prompt_tokens
        ]
        if not self.places:
            raise InputError(f"{', '.join(map(str, paths))}: no sequence with a response token")

    def of_states(self, tapped: Sequence[State]) -> LatentSequences:
        """The same sequences with these states as columns.

        Raises:
            MismatchError: a folder does not hold one of them.
        """
        chosen = copy.copy(self)
        chosen.columns = [columns_of(folder, tapped) for folder in self.folders]
        return chosen

    def for_flow(self, flow: Flow) -> LatentSequences:
        """The same sequences with the states that a flow reads.

        Raises:
            MismatchError: a folder does not hold one of them.
        """
        return self.of_states(flow.tapped)

    @property
    def inputs(self) -> dict[str, Any]:
        return {"latents": self.fingerprints, "model": self.info.model.to_dict()}

    def facts(self) -> dict[str, Any]:
        return {}

    def response_tokens(self, index: int) -> int:
        """Response tokens of a sequence that are used."""
        return min(self.places[index].length, self.max_tokens) - self.info.num_prompt_tokens

    def read(self, index: int) -> torch.Tensor:
        """Latents [prompt tokens kept + T, J, D] of one sequence."""
        place = self.places[index]
        shard = self.folders[place.folder].read_sequences(place.shard, place.index, place.index + 1)
        return shard.latents_NJD[: self.max_tokens, self.columns[place.folder]]

    def read_many(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """The same for some sequences."""
        return [self.read(index) for index in indices]

    def split(self, holdout_fraction: float, max_holdout: int, seed: int) -> tuple[list[int], list[int]]:
        """Indices for training and indices held out; see ``split_by_problem``."""
        names = {
            (number, shard): folder.read_names(shard)
            for number, folder in enumerate(self.folders)
            for shard in range(folder.num_shards)
        }
        problems = [
            (self.folders[place.folder].info.source, names[place.folder, place.shard][place.index][0])
            for place in self.places
        ]
        return split_by_problem(problems, holdout_fraction, max_holdout, seed)


def split_by_problem(
    problems: Sequence[Hashable], holdout_fraction: float, max_holdout: int, seed: int
) -> tuple[list[int], list[int]]:
    """Indices for training and indices held out, both in order; the choice depends on the seed alone.

    All sequences of a problem go to one side: the responses to one problem are too alike to judge each other by.

    Args:
        problems: the problem of each sequence.
    """
    by_problem: dict[Hashable, list[int]] = {}
    for index, problem in enumerate(problems):
        by_problem.setdefault(problem, []).append(index)
    groups = list(by_problem.values())
    wanted = min(max_holdout, round(holdout_fraction * len(problems)))
    held: list[int] = []
    for number in torch.randperm(len(groups), generator=keyed_generator("cpu", seed, "held out")).tolist():
        group = groups[number]
        fits = len(held) + len(group) <= wanted
        # Where every problem has more sequences than are wanted, one problem is held out all the same.
        if fits or (wanted and not held and len(group) < len(problems)):
            held += group
    return sorted(set(range(len(problems))) - set(held)), sorted(held)


def check_latents_fit(header: FlowHeader, latents: LatentsFolder) -> None:
    """A flow reads latents of the same model, layers, its context layer, and enough prompt tokens.

    Raises:
        MismatchError: naming both values.
    """
    info = latents.info
    for warning in check_flow_fits(header, model=info.model):
        console.warn(warning)
    if header.layer_indices != info.layer_indices:
        raise MismatchError(
            f"the flow was fitted on blocks {list(header.layer_indices)}, and {latents.path} holds blocks "
            f"{list(info.layer_indices)}",
            hint="extract latents of the flow's blocks with --layer-index",
        )
    columns_of(latents, header.tapped)
    shift = max(pairing["shift"] for pairing in header.pairings)
    if shift > info.num_prompt_tokens:
        raise MismatchError(
            f"the flow's shift of {shift} needs as many prompt tokens, and {latents.path} keeps "
            f"{info.num_prompt_tokens}",
            hint=f"extract latents with --max-shift {shift}",
        )


def columns_of(latents: LatentsFolder, tapped: Sequence[State]) -> list[int]:
    """Where on the layer axis of some latents the states lie that a flow reads.

    Raises:
        MismatchError: the latents do not hold the state of the condition.
    """
    states = latents.info.states
    for state in tapped:
        if state not in states:
            raise MismatchError(
                f"the flow takes its condition from {state_text(state)}, and {latents.path} holds "
                f"{', '.join(map(state_text, states))}",
                hint=f"extract latents with --context-layer {state}",
            )
    return [states.index(state) for state in tapped]


def _model_text(info: LatentsInfo) -> str:
    return f"{info.model.architecture}, weights {info.model.weights_sha256[:16]}…"


def _check_same_origin(first: LatentsFolder, other: LatentsFolder) -> None:
    a, b = first.info, other.info
    for name, ours, theirs in (
        ("the model", *map(_model_text, (a, b))),
        ("layers", a.layer_indices, b.layer_indices),
        ("prompt tokens kept", a.num_prompt_tokens, b.num_prompt_tokens),
    ):
        if ours != theirs:
            raise MismatchError(
                f"{first.path} and {other.path} differ in {name}: {ours} and {theirs}",
                hint="fit on latents that were extracted with the same model and options",
            )
