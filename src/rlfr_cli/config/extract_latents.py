"""Options of `rlfr extract-latents`: a policy reads responses, and the outputs of some blocks are kept.

`fit-flow`, which can take latents in the same way without keeping them, shares what names responses and blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rlfr_cli.config.common import CommonConfig, PromptConfig, check_part
from rlfr_cli.config.engine import EngineConfig, EngineName
from rlfr_cli.config.fields import group, option
from rlfr_cli.errors import ConfigError
from rlfr_cli.states import parse_state

DEFAULT_LAYER_FRACTIONS = (0.25, 0.5, 0.75)


class StoreDtype(StrEnum):
    """What latents are stored in."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    INT8 = "int8"  # in units of each channel, with a scale for each token


@dataclass(frozen=True, kw_only=True)
class ReadResponsesConfig(CommonConfig):
    """What a policy reads, and which blocks are taken; `layer_fraction` is empty where `layer_index` is given."""

    rollouts: Path | None = option(
        None, help="Rollouts of `rlfr sample` or of a training run.", panel="Responses", path=True
    )
    data: str | None = option(
        None,
        help="Expert responses: a .jsonl, .json, .csv, .parquet or .arrow file, or a dataset.",
        panel="Responses",
        path=True,
    )
    split: str | None = option(None, help="Split of a dataset that is given by name.", panel="Responses")
    problem_column: str = option("problem", help="Column with the problem's text.", panel="Responses")
    response_column: str = option("solution", help="Column with the response's text.", panel="Responses")
    messages_column: str | None = option(
        None,
        help="Column with a conversation, read in place of the problem and response columns.",
        panel="Responses",
    )
    id_column: str | None = option(
        None, help="Column that names a problem; its row number by default.", panel="Responses"
    )
    limit: int | None = option(None, help="Take only the first N problems.", panel="Responses", minimum=1, metavar="N")
    max_tokens: int | None = option(
        None, help="Take only the first N tokens of a response.", panel="Responses", minimum=1, metavar="N"
    )
    prompt: PromptConfig = group(PromptConfig)

    layer_fraction: tuple[float, ...] = option(
        DEFAULT_LAYER_FRACTIONS,
        help="Take the output of the block at this fraction of the depth; may be repeated.",
        panel="Latents",
        minimum=0,
        maximum=1,
    )
    layer_index: tuple[int, ...] = option(
        (),
        help="Take the output of this block, in place of --layer-fraction; may be repeated.",
        panel="Latents",
        minimum=0,
    )
    store: StoreDtype = option(
        StoreDtype.BFLOAT16, help="What latents are stored in, or rounded to where none are stored.", panel="Latents"
    )
    tokens_per_batch: int = option(
        16384, help="Most tokens, padding included, of one forward pass of the policy.", minimum=1
    )

    def check_layers(self) -> None:
        """Refuse no layer, or layers named in both ways.

        Raises:
            ConfigError: naming the options.
        """
        if self.layer_index:
            if self.layer_fraction not in ((), DEFAULT_LAYER_FRACTIONS):
                raise ConfigError("--layer-fraction and --layer-index exclude each other, got both")
            object.__setattr__(self, "layer_fraction", ())
        elif not self.layer_fraction:
            raise ConfigError("--layer-fraction or --layer-index must name at least one layer, got none")


@dataclass(frozen=True, kw_only=True)
class ReadingConfig(EngineConfig):
    """What reads the responses. All but the first are options of vLLM."""

    engine: EngineName = option(
        EngineName.HF,
        help="What reads the responses: hf is transformers, bit for bit the same on every run; vllm gives the same "
        "latents to the precision of --dtype.",
    )
    max_num_seqs: int | None = option(
        None, help="With vllm: most responses that are read at once.", minimum=1, path=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine is EngineName.AUTO:
            raise ConfigError("--engine auto: latents of one folder come from one engine", hint="give hf or vllm")


@dataclass(frozen=True, kw_only=True)
class ExtractLatentsConfig(ReadResponsesConfig):
    """One of `rollouts` and `data` is given."""

    model: str = option(help="The policy: a Hugging Face model folder or name.", short="-m", path=True)
    out: Path = option(Path("latents"), help="Folder for the latents.", short="-o", path=True)
    context_layer: tuple[str, ...] = option(
        (),
        help="Keep this state too, for flows whose condition comes from another layer than their target: the index of "
        "a block, or final-norm, which the output head reads; may be repeated.",
        panel="Latents",
        metavar="BLOCK|final-norm",
    )
    max_shift: int = option(
        1,
        help="Largest context shift that a flow may use; as many prompt tokens are kept.",
        panel="Latents",
        minimum=1,
    )
    problems_per_shard: int = option(64, help="Problems in one unit of work, which is one shard.", minimum=1)
    reading: ReadingConfig = group(ReadingConfig, panel="Reading engine")
    part: str | None = option(None, help="Do only this share of the work, such as 3/16.", metavar="I/N", path=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part(self.part)
        self.check_layers()
        if (self.rollouts is None) == (self.data is None):
            seen = "neither" if self.rollouts is None else "both"
            raise ConfigError(
                f"exactly one of --rollouts and --data must be given, got {seen}",
                hint="--rollouts takes what `rlfr sample` wrote, --data a file of expert responses",
            )
        for name in self.context_layer:
            parse_state(name)
