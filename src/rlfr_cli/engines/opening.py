"""Choose the generation engine that a stage's config asks for, before its work, and open it.

With vLLM the transformers model is not loaded: prompts need the tokenizer alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from rlfr_cli import console
from rlfr_cli.config.common import SamplingConfig
from rlfr_cli.config.engine import EngineConfig, EngineName, WeightTransfer
from rlfr_cli.engines.generation import GenerationEngine, Sampling
from rlfr_cli.engines.hf import HfEngine
from rlfr_cli.engines.vllm import VllmEngine
from rlfr_cli.engines.vllm_arguments import (
    VllmSetup,
    check_arguments,
    check_sampling,
    vllm_arguments,
    vllm_installed,
)
from rlfr_cli.errors import ConfigError
from rlfr_cli.policy.loading import Placement, Policy, end_token_ids, load_policy


class OpenedModel(Protocol):
    """A model folder whose config and tokenizer were read, as ``stages.common.ModelInput`` is."""

    @property
    def folder(self) -> Path: ...

    @property
    def config(self) -> Any: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def placement(self) -> Placement: ...

    @property
    def context_length(self) -> int | None: ...


@dataclass(frozen=True)
class EngineChoice:
    """An engine that was chosen and checked, and is not open yet.

    Attributes:
        name: hf or vllm.
        model: what it draws from.
        tokens_per_batch: of the hf engine.
        setup: of vLLM; None for the hf engine.
        weight_transfer: how weights will reach vLLM.
    """

    name: EngineName
    model: OpenedModel
    tokens_per_batch: int
    setup: VllmSetup | None = None
    weight_transfer: WeightTransfer = WeightTransfer.FILE

    def open(self, policy: Policy | None = None) -> GenerationEngine:
        """Load the model and start the engine.

        Args:
            policy: a policy that the hf engine shares; it loads one of its own by default.
        """
        if self.setup is None:
            return HfEngine(policy or load_policy(self.model.folder, self.model.placement), self.tokens_per_batch)
        return VllmEngine(
            self.setup,
            self.model.tokenizer,
            end_token_ids_of(self.model),
            self.model.context_length,
            weight_transfer=self.weight_transfer,
            trainer_device=self.model.placement.device,
        )

    def warn_of_other(self, recorded: str | None) -> None:
        """Warn where an artifact was begun with another engine, which ``auto`` may choose on another machine."""
        if recorded is not None and recorded != self.name:
            console.warn(f"the work here was begun with --engine {recorded}, and goes on with {self.name}")


def choose_engine(
    config: EngineConfig,
    sampling: SamplingConfig,
    model: OpenedModel,
    prompts: Iterable[Sequence[int]],
    *,
    sleeps: bool = False,
    weight_transfer: WeightTransfer = WeightTransfer.FILE,
    devices: Sequence[int] = (),
) -> EngineChoice:
    """Choose and check an engine; vLLM is imported where it is chosen, and nothing is started.

    Args:
        prompts: all that will be drawn from, as token ids; vLLM's memory is laid out for the longest.
        sleeps: vLLM gives GPU memory back between uses.
        weight_transfer: how a trainer's weights will reach vLLM; IPC reaches one GPU, so files stand in for several.
        devices: GPUs that vLLM has to itself, by number; by default the model's own device.

    Raises:
        MissingPackageError: ``--engine vllm`` without vLLM.
        ConfigError: what vLLM cannot do, or its arguments are wrong.
    """
    name = resolve_engine(config.engine, model.placement)
    if name is EngineName.HF:
        if unused := [*config.vllm_options(), *(f"--engine-device {index}" for index in devices)]:
            console.warn(f"--engine auto is hf here, which does not use {', '.join(unused)}")
        return EngineChoice(name, model, sampling.tokens_per_batch)
    if model.placement.attn_implementation is not None:
        raise ConfigError(
            f"--attn-implementation {model.placement.attn_implementation} is transformers', and vLLM draws",
            hint="leave it out; --engine-arg attention_backend=NAME chooses vLLM's",
        )
    if sampling.tokens_per_batch != SamplingConfig().tokens_per_batch:
        console.warn(f"--tokens-per-batch {sampling.tokens_per_batch} is not used: vLLM makes its own batches")
    if weight_transfer is WeightTransfer.IPC and config.tensor_parallel_size * config.data_parallel_size > 1:
        weight_transfer = WeightTransfer.FILE
    check_sampling(Sampling(temperature=sampling.temperature))
    most_tokens = min(max(map(len, prompts)) + sampling.max_new_tokens, model.context_length or 2**62)
    arguments = vllm_arguments(
        model.folder,
        model.placement,
        config,
        most_tokens=most_tokens,
        sleeps=sleeps,
        weight_transfer=weight_transfer,
        devices=devices,
    )
    setup = check_arguments(arguments, model.placement)
    return EngineChoice(name, model, sampling.tokens_per_batch, setup, weight_transfer)


def open_engine(
    config: EngineConfig, sampling: SamplingConfig, model: OpenedModel, prompts: Iterable[Sequence[int]]
) -> GenerationEngine:
    """Choose an engine and open it; see ``choose_engine``."""
    return choose_engine(config, sampling, model, prompts).open()


def resolve_engine(asked: EngineName, placement: Placement) -> EngineName:
    """hf or vllm; ``auto`` is vllm where it is installed and the model computes on a GPU, and says what it chose."""
    if asked is not EngineName.AUTO:
        return asked
    name = EngineName.VLLM if placement.device.type == "cuda" and vllm_installed() else EngineName.HF
    console.log(f"--engine auto: {name} draws the responses")
    return name


def end_token_ids_of(model: OpenedModel) -> frozenset[int]:
    """Tokens that end a response, as ``end_token_ids`` finds them in a loaded model."""
    from transformers import GenerationConfig

    try:
        generation_config = GenerationConfig.from_pretrained(model.folder)
    except OSError:  # a folder without generation_config.json, for which transformers takes config.json
        generation_config = GenerationConfig.from_model_config(model.config)
    return end_token_ids(SimpleNamespace(generation_config=generation_config), model.tokenizer)
