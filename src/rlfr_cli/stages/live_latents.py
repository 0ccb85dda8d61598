"""Latents for `fit-flow` that no disk ever holds: a policy reads the responses of each step as the step needs them.

Reads a model folder and rollouts or expert text. A step costs one forward pass of its sequences through the decoder
blocks up to the deepest tapped one. Sequences come in the order, and latents rounded to the dtype, that
`extract-latents` would have stored, so the flow is that of stored latents within the rounding of other batches.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import pyarrow.compute as pc
import torch

from rlfr_cli.artifacts.flow_file import read_flow_header
from rlfr_cli.artifacts.latents import LatentsInfo, latents_bytes
from rlfr_cli.config.extract_latents import DEFAULT_LAYER_FRACTIONS
from rlfr_cli.config.fit_flow import FitFlowConfig
from rlfr_cli.errors import InputError
from rlfr_cli.flow.flow import Flow
from rlfr_cli.policy.forward import TokenSequence
from rlfr_cli.policy.loading import load_decoder
from rlfr_cli.policy.tapping import tap, tapped_layers
from rlfr_cli.stages.common import ModelInput, open_model
from rlfr_cli.stages.extraction import extracted_latents
from rlfr_cli.stages.initial_flow import PUBLISHED_SUFFIXES
from rlfr_cli.stages.latent_sequences import split_by_problem
from rlfr_cli.stages.responses import Responses, check_prompts_hold, check_vocabulary, open_responses, response_inputs
from rlfr_cli.states import State, blocks_needed

PROBLEMS_AT_ONCE = 64  # units of work, which a fit has no use for


class LiveLatents:
    """Sequences of latents that a decoder makes when they are read; a ``LatentSource``.

    Attributes:
        info: what a manifest would say of these latents.
        rms_epsilon: that of the language model's norms.
        inputs: fingerprints of the model and the responses, as `extract-latents` records them.

    Raises:
        InputError: no response has a token.
    """

    def __init__(
        self, config: FitFlowConfig, model: ModelInput, responses: Responses, layer_indices: tuple[int, ...]
    ) -> None:
        self.config, self.model, self.responses = config, model, responses
        self.info = LatentsInfo(
            layer_indices=layer_indices,
            num_blocks=model.fingerprint.num_blocks,
            hidden_size=model.fingerprint.hidden_size,
            num_prompt_tokens=1,
            dtype=str(config.store),
            model=model.fingerprint,
            source=responses.fingerprint,
        )
        self.tapped: tuple[State, ...] = layer_indices
        self.rms_epsilon = model.rms_epsilon
        self.inputs = response_inputs(config, model, responses)
        self.lengths = pc.list_value_length(responses.table["response_token_ids"]).to_pylist()
        # Latents on disk have no sequence without a response token either.
        self.rows = [row for row, length in enumerate(self.lengths) if length > 0]
        if not self.rows:
            raise InputError(f"{config.rollouts or config.data}: no response has a token")

    def for_flow(self, flow: Flow) -> LiveLatents:
        """The same sequences with the states and prompt tokens that a flow needs.

        Raises:
            InputError: a prompt is shorter than the flow's shift.
        """
        check_prompts_hold(self.responses, flow.num_prompt)
        chosen = copy.copy(self)
        chosen.tapped = flow.tapped
        context_layers = tuple(map(str, flow.tapped[len(self.info.layer_indices) :]))
        chosen.info = replace(self.info, num_prompt_tokens=flow.num_prompt, context_layers=context_layers)
        return chosen

    def response_tokens(self, index: int) -> int:
        """Response tokens of a sequence that are used."""
        most = self.config.optimiser.max_sequence_tokens - self.info.num_prompt_tokens
        length = self.lengths[self.rows[index]]
        return min(length, most, length if self.config.max_tokens is None else self.config.max_tokens)

    def read_many(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Latents [prompt tokens kept + T, J, D] of some sequences, on the decoder's device."""
        latents: list[torch.Tensor] = [torch.empty(0)] * len(indices)
        with tap(self._decoder, self.tapped) as taps:
            for place, latents_TJD in extracted_latents(
                self._decoder,
                taps,
                [self._tokens(index) for index in indices],
                self.info.num_prompt_tokens,
                tokens_per_batch=self.config.tokens_per_batch,
                store=self.config.store,
                device=self.model.placement.device,
            ):
                latents[place] = latents_TJD
        return latents

    def split(self, holdout_fraction: float, max_holdout: int, seed: int) -> tuple[list[int], list[int]]:
        """Indices for training and indices held out; see ``split_by_problem``."""
        names = self.responses.table["problem_id"].to_pylist()
        return split_by_problem([names[row] for row in self.rows], holdout_fraction, max_holdout, seed)

    def facts(self) -> dict[str, Any]:
        """For the summary: what is run, and what stored latents would have taken on disk."""
        tokens = sum(self.response_tokens(index) + self.info.num_prompt_tokens for index in range(len(self.rows)))
        return {
            "blocks_run": blocks_needed(self.tapped, self.info.num_blocks),
            "blocks_of_model": self.info.num_blocks,
            "bytes_not_stored": latents_bytes(tokens, len(self.tapped), self.info.hidden_size, self.info.dtype),
        }

    @cached_property
    def _decoder(self) -> Any:
        return load_decoder(self.model.folder, self.model.placement, self.tapped)

    def _tokens(self, index: int) -> TokenSequence:
        row = self.rows[index]
        (whole,) = self.responses.sequences(range(row, row + 1))
        return TokenSequence(whole.prompt, whole.response[: self.response_tokens(index)])


def open_live_latents(config: FitFlowConfig) -> LiveLatents:
    """The latents of ``--model`` on ``--rollouts`` or ``--data``; nothing is computed yet.

    Raises:
        InputError: the model or the responses cannot be used.
        ConfigError: the model has no such layer.
    """
    assert config.model is not None
    model = open_model(config.model, config)
    layers = tapped_layers(model.fingerprint.num_blocks, config.layer_fraction, _layer_index(config))
    responses = open_responses(config, model, PROBLEMS_AT_ONCE)
    check_vocabulary(responses, model)
    return LiveLatents(config, model, responses, layers)


def _layer_index(config: FitFlowConfig) -> tuple[int, ...]:
    """Blocks by index: those asked for, or else those of a flow of ours that is continued."""
    published = config.init_from is not None and config.init_from.suffix in PUBLISHED_SUFFIXES
    if config.init_from is None or published or config.layer_fraction != DEFAULT_LAYER_FRACTIONS:
        return config.layer_index
    return read_flow_header(config.init_from).layer_indices
