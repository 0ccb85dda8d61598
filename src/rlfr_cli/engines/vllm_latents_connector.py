"""What rlfr runs inside vLLM's processes to take latents out: a connector that writes a finished request's states.

vLLM's extraction of hidden states keeps the outputs of chosen blocks in a cache of their own, beside that of the keys
and values, and a "connector" hands them on. vLLM's own connector needs CUDA (0.32: ``pin_memory``). This one copies
plainly, and writes before it goes on. In: what vLLM's scheduler has laid out; out: one safetensors file a request,
``hidden_states`` [S, J, D] with blocks ascending and ``token_ids`` [S], at the path that the request names. Imported
by vLLM alone. Written against vLLM 0.32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    ExampleHiddenStatesConnectorMetadata,
    extract_from_kv_cache,
)

from rlfr_cli.engines.vllm_latents import UNWRITTEN


@dataclass
class LatentsMetadata(ExampleHiddenStatesConnectorMetadata):
    """What the scheduler tells the worker of one step; also which blocks of the cache are about to be written."""

    fresh_blocks: list[int] = field(default_factory=list)


class LatentsConnector(ExampleHiddenStatesConnector):
    """vLLM's connector, with copies that need no GPU, and a cache in which unwritten states are seen."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._saved: set[str] = set()

    def build_connector_meta(self, scheduler_output: Any) -> LatentsMetadata:
        step = super().build_connector_meta(scheduler_output)
        fresh = list(fresh_blocks(scheduler_output, self._cache_kv_group_id, self._block_size))
        return LatentsMetadata(step.pending_saves, step.new_req_filenames, fresh)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Before each forward pass: what an earlier request left in a block is not taken for the next one's."""
        super().bind_connector_metadata(connector_metadata)
        if self._kv_cache is not None and connector_metadata.fresh_blocks:
            self._kv_cache[connector_metadata.fresh_blocks] = UNWRITTEN

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """After each forward pass: write what has finished; its blocks are free then."""
        for pending in self._get_connector_metadata().pending_saves if self._is_tp_rank_zero else ():
            self._write(pending)
            self._saved.add(pending.req_id)
        for request in finished_req_ids - self._saved:
            self._release(request)  # aborted
        saved, self._saved = self._saved, set()
        return saved or None, None

    def _write(self, pending: Any) -> None:
        assert self._kv_cache is not None
        blocks = torch.tensor(pending.block_ids)
        slots = (blocks[:, None] * self._block_size + torch.arange(self._block_size)).flatten()
        states_SJD = extract_from_kv_cache(self._kv_cache, slots.to(self._kv_cache.device), len(pending.token_ids))
        tensors = {"hidden_states": states_SJD.cpu().contiguous(), "token_ids": pending.token_ids}
        save_file(tensors, pending.filename)
        self._release(pending.req_id)

    def _release(self, request: str) -> None:
        """Let go of the lock that readers of the file wait for."""
        lock = self._lock_fds.pop(request, None)
        if lock is not None:
            os.close(lock)


def fresh_blocks(scheduler_output: Any, group: int, block_size: int) -> Iterator[int]:
    """Blocks of the cache that this step's requests were given, less those that prefix caching found filled."""
    for request in scheduler_output.scheduled_new_reqs:
        yield from request.block_ids[group][request.num_computed_tokens // block_size :]
    known = scheduler_output.scheduled_cached_reqs
    for name, blocks, num_computed in zip(known.req_ids, known.new_block_ids, known.num_computed_tokens, strict=True):
        if blocks is not None:  # of a request that is taken up again, all of them
            yield from blocks[group][num_computed // block_size if name in known.resumed_req_ids else 0 :]
