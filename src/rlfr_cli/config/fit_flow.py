"""Options of `rlfr fit-flow`: a flow-matching network learns the velocity field of latents.

They come from folders of latents, or from a policy that reads responses while the flow is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from rlfr_cli.config.common import MACHINE_PANEL, CommonConfig, refuse_float16
from rlfr_cli.config.extract_latents import ReadResponsesConfig, StoreDtype
from rlfr_cli.config.fields import ConfigGroup, group, leaf_options, option
from rlfr_cli.config.flow import NetworkConfig
from rlfr_cli.config.training_engine import TogetherConfig
from rlfr_cli.errors import ConfigError

# Of these the choice of latents does not depend: a recipe's [common] may hold them for other commands.
NO_CHOICE_OF_LATENTS = ("--model", "--system-prompt", "--prompt-template", "--tokens-per-batch")


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
class FitFlowConfig(ReadResponsesConfig):
    """One of `latents`, `rollouts` and `data` is given; the last two with `model`, whose latents are not stored.

    `init_from` excludes options of the network that differ from the flow's own.
    """

    latents: tuple[Path, ...] = option(
        (), help="Folders of latents; or give --model with --rollouts or --data.", positional=True, path=True
    )
    model: str | None = option(
        None,
        help="The policy whose latents are taken on the fly: a Hugging Face model folder or name.",
        short="-m",
        panel="Responses",
        path=True,
    )
    out: Path = option(Path("flow.safetensors"), help="File of the flow.", short="-o", path=True)
    network: NetworkConfig = group(NetworkConfig, panel="Flow")
    optimiser: FitOptimiserConfig = group(FitOptimiserConfig, panel="Optimiser")
    training: TogetherConfig = group(TogetherConfig, panel=MACHINE_PANEL)
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
    statistics_tokens: int | None = option(
        None,
        help="Response tokens, of training sequences drawn by the seed, that mean and deviation of the channels come "
        "from; all of them by default.",
        panel="Evaluation",
        minimum=1,
        metavar="N",
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
        self._check_source()
        if self.optimiser.steps == 0 and self.init_from is None:
            raise ConfigError(
                "--steps 0 would leave a new flow as it begins", hint="give 1 or more, or --init-from with a flow"
            )

    def _check_source(self) -> None:
        given = {"LATENTS": self.latents, "--rollouts": self.rollouts, "--data": self.data}
        names = [name for name, value in given.items() if value]
        if len(names) != 1:
            raise ConfigError(
                f"exactly one of {', '.join(given)} must be given, got {' and '.join(names) or 'none'}",
                hint="name folders of latents, or --model with --rollouts or --data to take latents on the fly; what a "
                "recipe's [common] holds counts too",
            )
        if not self.latents:
            if self.model is None:
                raise ConfigError(f"{names[0]} needs --model, the policy that reads the responses")
            self.check_layers()
            if self.store is StoreDtype.INT8:
                raise ConfigError(
                    "--store int8 takes units from the channels of a whole shard, and on the fly there are no shards",
                    hint="leave --store out, or write them with `rlfr extract-latents`",
                )
        else:
            changed = [name for name in self._options_of_responses() if name not in NO_CHOICE_OF_LATENTS]
            if changed:
                raise ConfigError(
                    f"LATENTS are read as they are, and {', '.join(changed)} is for latents that are taken on the fly",
                    hint="give it to `rlfr extract-latents`, or to fit-flow with --model and --rollouts or --data",
                )
            object.__setattr__(self, "layer_fraction", ())  # the folders say which layers they hold

    @property
    def unused_options(self) -> list[str]:
        """Options that folders of latents leave without effect."""
        return self._options_of_responses() if self.latents else []

    def _options_of_responses(self) -> list[str]:
        """Those of the policy and its responses that differ from their default."""
        elsewhere = leaf_options(CommonConfig)
        leaves = [leaf for leaf in leaf_options(ReadResponsesConfig) if leaf not in elsewhere]
        leaves += [leaf for leaf in leaf_options(type(self)) if leaf.path == ("model",)]
        return [leaf.name for leaf in leaves if attrgetter(leaf.key)(self) not in (leaf.default, ())]
