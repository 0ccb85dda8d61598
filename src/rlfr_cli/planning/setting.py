"""What every estimate starts from: the model, the recipe's configs, and the machine and work that are planned for."""

from __future__ import annotations

from dataclasses import dataclass

from rlfr_cli.config.common import CommonConfig, ComputeDtype, ProblemsConfig
from rlfr_cli.config.evaluate import EvalConfig
from rlfr_cli.config.extract_latents import ExtractLatentsConfig
from rlfr_cli.config.fit_flow import FitFlowConfig
from rlfr_cli.config.flow import NetworkConfig
from rlfr_cli.config.plan import PlanConfig
from rlfr_cli.config.sample import SampleConfig
from rlfr_cli.config.score import ScoreConfig
from rlfr_cli.config.train_rl import TrainRlConfig
from rlfr_cli.planning.adapter_sizes import adapter_parameters
from rlfr_cli.planning.flow_sizes import FlowSizes
from rlfr_cli.planning.memory import Numbers
from rlfr_cli.planning.model_sizes import ModelSizes
from rlfr_cli.policy.tapping import tapped_layers
from rlfr_cli.states import blocks_needed, state_of_model, states_in_order

VLLM_ROWS = 256  # responses that vLLM draws at once where --max-num-seqs is left out


@dataclass(frozen=True)
class Recipe:
    """The config of each stage, whichever are planned: a flow's sizes come from those that make it."""

    sample: SampleConfig
    extract: ExtractLatentsConfig
    fit: FitFlowConfig
    score: ScoreConfig
    train: TrainRlConfig
    evaluate: EvalConfig


@dataclass(frozen=True)
class Setting:
    """All that an estimate depends on."""

    model: ModelSizes
    plan: PlanConfig
    recipe: Recipe

    def numbers(self, config: CommonConfig, *, trains: bool = False) -> Numbers:
        """Bytes of weights and of computed numbers in a stage; what an optimiser steps is float32."""
        on_gpu = config.device != "cpu"
        narrow = config.dtype in (ComputeDtype.BFLOAT16, ComputeDtype.FLOAT16)
        compute = 2 if narrow or (config.dtype is ComputeDtype.AUTO and on_gpu) else 4
        return Numbers(4 if trains else compute, compute, on_gpu)

    def num_problems(self, config: ProblemsConfig) -> int:
        return min(self.plan.num_problems, config.limit or self.plan.num_problems)

    def response_tokens(self, most: int) -> int:
        """Expected tokens of a response that may have so many."""
        return min(self.plan.response_tokens or most, most)

    def adapter_weights(self) -> int:
        """Those that train-rl steps in place of the policy's; 0 where it trains the whole policy."""
        return adapter_parameters(self.model, self.recipe.train.lora)

    # What the flow reads

    def responses_read(self) -> tuple[int, int]:
        """Responses that extract-latents reads, and their expected tokens: rollouts of sample, or expert solutions."""
        sample, extract = self.recipe.sample, self.recipe.extract
        tokens = self.response_tokens(sample.sampling.max_new_tokens)
        tokens = min(tokens, extract.max_tokens or tokens)
        if extract.rollouts is None:
            return min(self.plan.num_problems, extract.limit or self.plan.num_problems), tokens
        problems = min(self.num_problems(sample.problems), extract.limit or self.plan.num_problems)
        return problems * sample.group_size, tokens

    def flow_sizes(self) -> FlowSizes:
        """The flow that the recipe fits, or that train-rl begins anew."""
        train = self.recipe.train
        network: NetworkConfig = train.network if train.new_flow else self.recipe.fit.network
        return FlowSizes(
            latent_size=self.model.hidden_size,
            width=network.width or self.model.hidden_size,
            depth=network.depth,
            states=len(self._flow_states(network)),
            layers=len(self._layers()),
            pairings=len(network.context),
        )

    def blocks_tapped(self) -> int:
        """How many of the model's blocks the flow's latents need."""
        return blocks_needed(self._flow_states(self.recipe.fit.network), self.model.num_blocks)

    def blocks_extracted(self) -> tuple[int, int]:
        """How many blocks extract-latents runs, and how many states it keeps."""
        names = self.recipe.extract.context_layer
        states = states_in_order(self._layers(), [state_of_model(n, self.model.num_blocks) for n in names])
        return blocks_needed(states, self.model.num_blocks), len(states)

    def _layers(self) -> tuple[int, ...]:
        train, extract = self.recipe.train, self.recipe.extract
        if train.new_flow:
            return tapped_layers(self.model.num_blocks, train.layer_fraction)
        return tapped_layers(self.model.num_blocks, extract.layer_fraction, extract.layer_index)

    def _flow_states(self, network: NetworkConfig) -> tuple[int | str, ...]:
        name = network.context_layer
        context = () if name is None else (state_of_model(name, self.model.num_blocks),)
        return states_in_order(self._layers(), context)
