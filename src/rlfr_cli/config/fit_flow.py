"""Options of `rlfr fit-flow`: a flow-matching network learns the velocity field of latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlfr_cli.config.common import CommonConfig, refuse_float16
from rlfr_cli.config.fields import ConfigGroup, group, option
from rlfr_cli.config.flow import NetworkConfig
from rlfr_cli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FitOptimiserConfig(ConfigGroup):
    """The published fit: AdamW, cosine after a warm-up, two epochs."""

    epochs: float = option(2.0, help="Passes over the training sequences.", exclusive_minimum=0)
    steps: int | None = option(
        None,
        help="Optimiser steps, in place of --epochs; 0 with --init-from takes that flow as it is.",
        minimum=0,
    )
    sequences_per_step: int = option(32, help="Sequences of one optimiser step.", minimum=1)
    max_sequence_tokens: int = option(8192, help="Tokens of a sequence that are used.", minimum=2)
    learning_rate: float = option(1e-4, help="Highest learning rate.", exclusive_minimum=0)
    weight_decay: float = option(0.01, help="Weight decay of AdamW.", minimum=0)
    warmup_fraction: float = option(0.1, help="Share of the steps with a rising rate.", minimum=0, maximum=1)
    clip_norm: float = option(1.0, help="Largest gradient norm.", exclusive_minimum=0)
    noise_repeats: int = option(1, help="Draws of noise and time for each token; published: 2 to 4.", minimum=1)


@dataclass(frozen=True, kw_only=True)
class FitFlowConfig(CommonConfig):
    """`init_from` excludes options of the network that differ from the flow's own."""

    latents: tuple[Path, ...] = option(help="Folders of latents.", positional=True, path=True)
    out: Path = option(Path("flow.safetensors"), help="File of the flow.", short="-o", path=True)
    network: NetworkConfig = group(NetworkConfig, panel="Flow")
    optimiser: FitOptimiserConfig = group(FitOptimiserConfig, panel="Optimiser")
    init_from: Path | None = option(
        None,
        help="Continue this flow, or import a published flow_model.bin (which does not name its context, shift and "
        "layers: those of the options and the latents are taken).",
        path=True,
    )
    holdout_fraction: float = option(
        0.1, help="Share of the sequences held out.", panel="Evaluation", minimum=0, exclusive_maximum=1
    )
    max_holdout_sequences: int = option(256, help="Most sequences held out.", panel="Evaluation", minimum=1)
    eval_every: int | None = option(
        None,
        help="Steps between held-out evaluations and saved states; a tenth of the steps by default.",
        panel="Evaluation",
        minimum=1,
    )
    tokens_per_chunk: int = option(
        16384,
        help="Tokens that the network sees at once; changes memory, not results.",
        minimum=1,
        display=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_float16(self)
        if not self.latents:
            raise ConfigError("LATENTS must name at least one folder of latents")
        if self.optimiser.steps == 0 and self.init_from is None:
            raise ConfigError(
                "--steps 0 would leave a new flow as it begins", hint="give 1 or more, or --init-from with a flow"
            )
