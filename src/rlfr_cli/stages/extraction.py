"""Latents of responses, read by a decoder in padded batches: what `extract-latents` stores and `fit-flow` fits.

One function for both, so that a flow does not depend on whether its latents were stored. `extract-latents` may have
vLLM read the responses in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rlfr_cli.artifacts.latents import LATENT_DTYPES
from rlfr_cli.config.extract_latents import StoreDtype
from rlfr_cli.errors import WorkError
from rlfr_cli.policy.batching import token_budget_batches
from rlfr_cli.policy.forward import TokenSequence, decoder_latents
from rlfr_cli.policy.tapping import Taps


def extracted_latents(
    decoder: Any,
    taps: Taps,
    sequences: Sequence[TokenSequence],
    num_prompt: int,
    *,
    tokens_per_batch: int,
    store: StoreDtype,
    device: torch.device,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Index and latents [num_prompt + T, J, D] of every sequence, longest first, on the decoder's device.

    Args:
        decoder: tapped already.
        num_prompt: last prompt tokens whose latents are kept.
        tokens_per_batch: budget of a padded batch.
        store: what the latents are rounded to; int8 needs a whole shard, so for that they stay as they are.
        device: that of the decoder.

    Raises:
        WorkError: a latent is not a finite number in that dtype.
    """
    for batch in token_budget_batches([len(s) for s in sequences], tokens_per_batch):
        kept = decoder_latents(decoder, taps, [sequences[index] for index in batch], num_prompt, device)
        yield from zip(batch, rounded_latents(kept, store), strict=True)


def rounded_latents(latents: Sequence[torch.Tensor], store: StoreDtype) -> list[torch.Tensor]:
    """Latents [num_prompt + T, J, D] in the dtype of their shard, or for int8 as they are.

    Raises:
        WorkError: one is not a finite number in that dtype.
    """
    rounded = [latents_TJD.to(LATENT_DTYPES.get(store, latents_TJD.dtype)) for latents_TJD in latents]
    if not bool(torch.stack([latents_TJD.isfinite().all() for latents_TJD in rounded]).all()):
        raise WorkError(
            f"some latents are not finite numbers in {str(rounded[0].dtype).removeprefix('torch.')}",
            hint="hidden states may exceed float16, which ends at 65504: use --store bfloat16 and --dtype bfloat16",
        )
    return rounded
