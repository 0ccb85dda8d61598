"""Latents with vLLM: it reads prompt and response as one prompt, and its extraction of hidden states gives the blocks.

In: token ids. Out: what the hf engine gives, latents [num_prompt + T, J, D] of each response, in vLLM's dtype. vLLM
takes the extraction for speculative decoding with one guessed token, of which nothing is used here: each request draws
one token, and that is thrown away. States come back through files in shared memory, one a request
(``vllm_latents_connector``). Written against vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rlfr_cli import console
from rlfr_cli.config.engine import EngineConfig, parse_engine_args
from rlfr_cli.engines.opening import OpenedModel
from rlfr_cli.engines.vllm_arguments import VllmSetup, check_arguments, vllm_arguments
from rlfr_cli.engines.vllm_process import LoopThread, all_of, start
from rlfr_cli.engines.vllm_weights import SHARED_MEMORY
from rlfr_cli.errors import ConfigError, WorkError
from rlfr_cli.policy.forward import TokenSequence
from rlfr_cli.states import State

CHECKED_VERSION = "0.32."
SECONDS_TO_END = 20  # after which vLLM's processes are killed
TOKENS_IN_FLIGHT = 65536  # of requests that vLLM has, or whose states lie in shared memory
# Fills the cache of states before they are written. Not NaN: some models keep keys and values in the same memory, where
# attention may multiply what it masks by 0. Exact in every dtype.
UNWRITTEN = 12288.0
SPARE_TOKENS = 4  # behind the longest sequence: vLLM leaves out the extraction where its guesses would not fit


@dataclass(frozen=True)
class LatentsSetup:
    """What vLLM is started with to take latents, checked; nothing is started.

    Attributes:
        vllm: its arguments and config.
        blocks: decoder blocks in the order of the layer axis.
        most_at_once: sequences that are in flight at once.
        most_bytes: of their states.
    """

    vllm: VllmSetup
    blocks: tuple[int, ...]
    most_at_once: int
    most_bytes: int


def check_vllm_latents(
    config: EngineConfig, model: OpenedModel, tapped: Sequence[State], lengths: Iterable[int]
) -> LatentsSetup:
    """Check that vLLM can take these latents; it is imported, and not started.

    Args:
        tapped: states in the order of the layer axis.
        lengths: tokens of every sequence that will be read, prompt and response.

    Raises:
        MissingPackageError: vLLM is not installed.
        ConfigError: what vLLM cannot do, or its arguments are wrong.
    """
    blocks = [state for state in tapped if isinstance(state, int)]
    if len(blocks) < len(tapped):
        raise ConfigError(
            "--context-layer final-norm: vLLM gives the outputs of blocks, and not the final normed state",
            hint="use --engine hf, or the last block",
        )
    if model.placement.attn_implementation is not None:
        raise ConfigError(
            f"--attn-implementation {model.placement.attn_implementation} is transformers', and vLLM reads",
            hint="leave it out; --engine-arg attention_backend=NAME chooses vLLM's",
        )
    if "kv_transfer_config" in parse_engine_args(config.engine_arg):
        raise ConfigError("--engine-arg kv_transfer_config: rlfr takes latents out by it", hint="leave it out")
    longest = max(lengths)
    context = model.context_length
    if context is not None and longest >= context:
        raise ConfigError(
            f"a prompt with its response has {longest} tokens, which fill the model's context of {context}: vLLM reads "
            "no prompt without room for one more token",
            hint="use --engine hf, or --max-tokens to take fewer",
        )
    arguments = vllm_arguments(
        model.folder, model.placement, config, most_tokens=min(longest + SPARE_TOKENS, context or 2**62)
    )
    setup = check_arguments({**arguments, **extraction_arguments(blocks)}, model.placement)
    from vllm import __version__ as version

    if not version.startswith(CHECKED_VERSION):
        console.warn(f"latents were compared with transformers' under vLLM {CHECKED_VERSION}x, and this is {version}")
    most_at_once = max(1, TOKENS_IN_FLIGHT // longest)
    bytes_of_one = longest * len(blocks) * setup.config.model_config.get_hidden_size() * model.placement.dtype.itemsize
    return LatentsSetup(setup, tuple(blocks), most_at_once, most_at_once * bytes_of_one)


def folder_for(num_bytes: int) -> tempfile.TemporaryDirectory[str]:
    """A folder in shared memory, or among temporary files where that is too small: 64 MB in many containers."""
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free >= num_bytes
    return tempfile.TemporaryDirectory(prefix="rlfr-latents-", dir=SHARED_MEMORY if roomy else None)


def extraction_arguments(blocks: Sequence[int]) -> dict[str, Any]:
    """Arguments that have vLLM extract the outputs of these blocks, in ascending order.

    vLLM counts what goes into a block, from 0, so the output of block l is its number l + 1.
    """
    numbers = [block + 1 for block in sorted(blocks)]
    return {
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": numbers}},
        },
        "kv_transfer_config": {
            "kv_connector": "LatentsConnector",
            "kv_connector_module_path": "rlfr_cli.engines.vllm_latents_connector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"allow_custom_save_path": True},
        },
    }


class VllmLatents:
    """vLLM as a reader of responses.

    Raises:
        WorkError: vLLM does not start, for example because it cannot extract from this architecture.
    """

    def __init__(self, setup: LatentsSetup) -> None:
        self.blocks = setup.blocks
        ascending = sorted(setup.blocks)
        self._order = [ascending.index(block) for block in setup.blocks]
        self._room = asyncio.Semaphore(setup.most_at_once)
        self._num_read = 0
        self._engine = start(setup.vllm)
        self._loop = LoopThread()
        self._files = folder_for(setup.most_bytes)

    def read(
        self,
        sequences: Sequence[TokenSequence],
        num_prompt: int,
        on_finished: Callable[[], None] = lambda: None,
    ) -> list[torch.Tensor]:
        """Latents [num_prompt + T, J, D] of every sequence, in order, on the CPU.

        Args:
            num_prompt: last prompt tokens whose latents are kept.
            on_finished: called once a sequence, from another thread.

        Raises:
            WorkError: vLLM failed, or gave states of other tokens than it was sent, or not of all.
        """
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        async def one(sequence: TokenSequence) -> torch.Tensor:
            async with self._room:
                states_SJD = await self._states([*sequence.prompt, *sequence.response])
            on_finished()
            return states_SJD[len(sequence.prompt) - num_prompt :, self._order]

        try:
            return self._loop.run(all_of([one(sequence) for sequence in sequences]))
        except (EngineDeadError, EngineGenerateError, VLLMValidationError) as error:
            raise WorkError(f"vLLM failed: {error}", hint="what its processes said stands above") from error

    def close(self) -> None:
        """End vLLM's processes and remove what lies in shared memory."""
        if self._engine is not None:
            self._loop.end_tasks()  # first: they would take an engine that ends for one that has died
            self._engine.shutdown(timeout=SECONDS_TO_END)
            self._engine = None
            self._loop.close()
            self._files.cleanup()

    async def _states(self, token_ids: list[int]) -> torch.Tensor:
        """States [S, J, D] of one sequence, blocks ascending."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        self._num_read += 1
        path = Path(self._files.name) / f"{self._num_read}.safetensors"
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"kv_transfer_params": {"hidden_states_path": str(path)}},
        )
        async for _ in self._engine.generate(tokens_input(token_ids), params, str(self._num_read)):
            pass
        # Waits for the file, which vLLM writes after it has answered.
        return await asyncio.to_thread(take_states, path, token_ids)


def take_states(path: Path, token_ids: Sequence[int]) -> torch.Tensor:
    """States [S, J, D] of a file, which is removed; waits until it is whole.

    Raises:
        WorkError: there is none, or it is not of these tokens, or lacks some of them.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
        cleanup_hidden_states,
        load_hidden_states,
    )

    try:
        tensors = load_hidden_states(str(path))
    except (OSError, SafetensorError) as error:  # its process ended before or while it wrote
        raise WorkError(f"vLLM gave no hidden states: {error}", hint="see what its processes said above") from error
    cleanup_hidden_states(str(path))
    states_SJD = tensors["hidden_states"]
    if tensors["token_ids"].tolist() != list(token_ids):
        raise WorkError("vLLM gave hidden states of other tokens than it was sent")
    missing = len(token_ids) - int((states_SJD != UNWRITTEN).flatten(1).any(dim=1).sum())
    if missing:
        raise WorkError(f"vLLM gave no hidden states of {missing} of {len(token_ids)} tokens", hint="use --engine hf")
    return states_SJD
