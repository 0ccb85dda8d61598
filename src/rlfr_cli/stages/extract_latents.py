"""`rlfr extract-latents`: a policy reads responses, and the outputs of some blocks are kept.

Reads a model folder and rollouts or expert text; writes latents (safetensors shards, packed). With the hf engine only
the decoder blocks up to the deepest tapped one are loaded and run, without an output head; all of them for the final
normed state, and with vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch

from rlfr_cli import console
from rlfr_cli.artifacts.files import check_free_space
from rlfr_cli.artifacts.folder import StageFolder
from rlfr_cli.artifacts.latents import LatentsInfo, latents_bytes, latents_shard
from rlfr_cli.artifacts.shards import read_records
from rlfr_cli.config.engine import EngineName
from rlfr_cli.config.extract_latents import ExtractLatentsConfig, StoreDtype
from rlfr_cli.engines.vllm_latents import LatentsSetup, VllmLatents, check_vllm_latents
from rlfr_cli.errors import during_work
from rlfr_cli.policy.forward import TokenSequence
from rlfr_cli.policy.loading import load_decoder
from rlfr_cli.policy.tapping import tap, tapped_layers
from rlfr_cli.stages.common import ModelInput, open_model, open_output, parse_part, stopping
from rlfr_cli.stages.extraction import extracted_latents, rounded_latents
from rlfr_cli.stages.responses import (
    Responses,
    check_prompts_hold,
    check_vocabulary,
    open_responses,
    response_inputs,
)
from rlfr_cli.states import State, blocks_needed, state_of_model, states_in_order

# Latents [num_prompt + T, J, D] of every sequence, on the CPU, in order; calls back once a sequence.
Reader = Callable[[Sequence[TokenSequence], Callable[[], None]], list[torch.Tensor]]


def run(config: ExtractLatentsConfig) -> dict[str, Any]:
    """Extract latents; returns a summary.

    Raises:
        RlfrError: anything wrong with config, inputs or output folder, before work starts.
    """
    model = open_model(config.model, config)
    num_blocks = model.fingerprint.num_blocks
    layers = tapped_layers(num_blocks, config.layer_fraction, config.layer_index)
    tapped = states_in_order(layers, [state_of_model(name, num_blocks) for name in config.context_layer])
    responses = open_responses(config, model, config.problems_per_shard)
    check_vocabulary(responses, model)
    check_prompts_hold(responses, config.max_shift)
    setup = _vllm_setup(config, model, responses, tapped)
    num_tokens = _kept_tokens(config, responses, responses.units)
    hidden_size = model.fingerprint.hidden_size

    def bytes_of(units: Sequence[range]) -> int:
        kept = _kept_tokens(config, responses, units)
        return latents_bytes(kept, len(tapped), hidden_size, config.store, num_shards=len(units))

    bytes_to_write = bytes_of(_units_to_write(config, responses))
    check_free_space(config.out, bytes_to_write)
    inputs = response_inputs(config, model, responses)
    facts = _info(config, model, responses, layers, tapped[len(layers) :]).to_extra()
    extra = {**facts, "rms_norm_eps": model.rms_epsilon, "engine": config.reading.engine}
    folder = open_output(config, "latents", inputs, len(responses.units), extra=extra)
    plan = {
        "out": str(config.out),
        "sequences": responses.num_rows,
        "tokens": num_tokens,
        "layers": list(layers),
        "context_layers": list(tapped[len(layers) :]),
        "blocks_run": blocks_needed(tapped, num_blocks) if setup is None else num_blocks,
        "blocks_of_model": num_blocks,
        "hidden_size": hidden_size,
        "bytes": bytes_of(responses.units),
    }
    if folder is None:
        return {"dry_run": True, **plan}
    missing = folder.missing_units(parse_part(config.part))
    if missing:
        console.log(f"writing {bytes_to_write / 1e6:,.1f} MB of latents ({config.store}) to {config.out}")
        with during_work(), stopping(config.out), _reader(config, model, tapped, setup) as read:
            _extract_units(config, responses, folder, missing, read)
    folder.finish()
    return {**plan, "complete": folder.complete, "units_missing": len(folder.missing)}


def _kept_tokens(config: ExtractLatentsConfig, responses: Responses, units: Sequence[range]) -> int:
    return sum(responses.num_response_tokens(rows) + len(rows) * config.max_shift for rows in units)


def _units_to_write(config: ExtractLatentsConfig, responses: Responses) -> list[range]:
    """The units of this part less those that an earlier run finished, before the output folder is touched."""
    index, num_parts = parse_part(config.part) or (1, 1)
    done = {} if config.overwrite else read_records(config.out / "shards")
    return [responses.units[unit] for unit in range(index - 1, len(responses.units), num_parts) if unit not in done]


def _info(
    config: ExtractLatentsConfig,
    model: ModelInput,
    responses: Responses,
    layers: tuple[int, ...],
    context_layers: tuple[State, ...],
) -> LatentsInfo:
    return LatentsInfo(
        layer_indices=layers,
        context_layers=tuple(map(str, context_layers)),
        num_blocks=model.fingerprint.num_blocks,
        hidden_size=model.fingerprint.hidden_size,
        num_prompt_tokens=config.max_shift,
        dtype=str(config.store),
        model=model.fingerprint,
        source=responses.fingerprint,
    )


def _vllm_setup(
    config: ExtractLatentsConfig, model: ModelInput, responses: Responses, tapped: Sequence[State]
) -> LatentsSetup | None:
    """What vLLM is to be started with, checked; None for the hf engine."""
    if config.reading.engine is EngineName.HF:
        return None
    if config.tokens_per_batch != ExtractLatentsConfig.tokens_per_batch:
        console.warn(f"--tokens-per-batch {config.tokens_per_batch} is not used: vLLM makes its own batches")
    lengths = (len(sequence) for rows in responses.units for sequence in responses.sequences(rows))
    return check_vllm_latents(config.reading, model, tapped, lengths)


@contextmanager
def _reader(
    config: ExtractLatentsConfig, model: ModelInput, tapped: tuple[State, ...], setup: LatentsSetup | None
) -> Iterator[Reader]:
    """Load what reads the responses; it ends with the block of code."""
    if setup is not None:
        with closing(VllmLatents(setup)) as engine:
            yield lambda sequences, on_read: rounded_latents(
                engine.read(sequences, config.max_shift, on_read), config.store
            )
        return
    decoder = load_decoder(model.folder, model.placement, tapped)
    with tap(decoder, tapped) as taps:

        def read(sequences: Sequence[TokenSequence], on_read: Callable[[], None]) -> list[torch.Tensor]:
            latents: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
            for index, latents_TJD in extracted_latents(
                decoder,
                taps,
                sequences,
                config.max_shift,
                tokens_per_batch=config.tokens_per_batch,
                store=config.store,
                device=model.placement.device,
            ):
                latents[index] = latents_TJD.cpu()
                on_read()
            return latents

        yield read


def _extract_units(
    config: ExtractLatentsConfig, responses: Responses, folder: StageFolder, missing: list[int], read: Reader
) -> None:
    total = sum(len(responses.units[unit]) for unit in missing)
    with console.progress("extracting latents", total=total, unit="sequences") as bar:
        for unit in missing:
            rows = responses.units[unit]
            sequences = responses.sequences(rows)
            latents = read(sequences, bar.advance)
            tensors = latents_shard(
                torch.cat(latents),
                torch.tensor(_kept_token_ids(sequences, config.max_shift)),
                torch.tensor([0, *map(len, latents)]).cumsum(0),
                torch.arange(rows.start, rows.stop),
                int8=config.store is StoreDtype.INT8,
            )
            folder.write_tensors(unit, tensors, {"responses": responses.names(rows)})


def _kept_token_ids(sequences: list[TokenSequence], num_prompt: int) -> list[int]:
    return [token for s in sequences for token in (*s.prompt[-num_prompt:], *s.response)]
