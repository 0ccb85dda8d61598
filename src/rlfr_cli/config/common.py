"""Options that several commands share.

The base of every config, and the groups for problems, prompts, sampling and grading.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rlfr_cli.config.fields import ConfigGroup, StageConfig, option
from rlfr_cli.errors import ConfigError
from rlfr_cli.grading.answers import AnswerFallback

MACHINE_PANEL = "Machine"
DEFAULT_SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."


class ComputeDtype(StrEnum):
    """What a model computes in; `auto` is bfloat16 where the device has it, float32 elsewhere."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@dataclass(frozen=True, kw_only=True)
class CommonConfig(StageConfig):
    """What every command takes. A command redefines `out` to give it a default."""

    out: Path = option(help="Folder or file to write.", short="-o", path=True)
    seed: int = option(0, help="Seed of every random choice.", minimum=0)
    device: str = option(
        "auto",
        help="Where to compute: auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.",
        panel=MACHINE_PANEL,
        path=True,
    )
    dtype: ComputeDtype = option(
        ComputeDtype.AUTO,
        help="What the model computes in; auto is bfloat16 on a GPU that has it and float32 elsewhere.",
        panel=MACHINE_PANEL,
    )
    attn_implementation: str | None = option(
        None,
        help="Attention of transformers, such as sdpa or flash_attention_2; its own choice by default.",
        panel=MACHINE_PANEL,
    )
    trust_remote_code: bool = option(
        False, help="Run the Python code that comes with a model folder.", panel=MACHINE_PANEL
    )
    overwrite: bool = option(False, help="Delete what another config left in the output folder.", display=True)
    dry_run: bool = option(
        False,
        help="Check the config, inputs and output folder, say what would be done, and stop.",
        display=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N, got {self.device!r}")


@dataclass(frozen=True, kw_only=True)
class ProblemsConfig(ConfigGroup):
    """A set of problems with their answers, and which of its columns hold what."""

    data: str = option(
        help="Problems: a .jsonl, .json, .csv, .parquet or .arrow file, a folder of them, or a dataset.",
        path=True,
    )
    split: str | None = option(None, help="Split of a dataset that is given by name.")
    problem_column: str = option("problem", help="Column with the problem's text.")
    answer_column: str = option("answer", help="Column with the accepted answer, or a list of them.")
    id_column: str | None = option(None, help="Column that names a problem; its row number by default.")
    limit: int | None = option(None, help="Take only the first N problems.", minimum=1, metavar="N")
    skip_bad_answers: bool = option(
        False, help="Leave out problems whose answer does not parse, with a count, instead of stopping."
    )


@dataclass(frozen=True, kw_only=True)
class PromptConfig(ConfigGroup):
    """How a problem becomes the policy's prompt."""

    system_prompt: str = option(DEFAULT_SYSTEM_PROMPT, help="System message of the chat template; empty for none.")
    prompt_template: str | None = option(
        None,
        help="Text around {problem} that replaces the tokenizer's chat template, or @FILE that holds it; the "
        "way out for tokenizers without one.",
        metavar="TEXT|@FILE",
    )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(ConfigGroup):
    """How responses are drawn."""

    temperature: float = option(1.0, help="Divides the logits; 0 takes the likeliest token.", minimum=0)
    top_p: float = option(
        1.0,
        help="Draw from the likeliest tokens that hold this share; 1 is off.",
        exclusive_minimum=0,
        maximum=1,
    )
    top_k: int = option(0, help="Draw from this many of the likeliest tokens; 0 is off.", minimum=0)
    max_new_tokens: int = option(1024, help="A response is cut off after this many tokens.", minimum=1)
    stop: tuple[str, ...] = option((), help="End a response after this text; may be repeated.")
    tokens_per_batch: int = option(
        16384, help="Most tokens, prompts and responses at full length, of one generation batch.", minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if "" in self.stop:
            raise ConfigError("--stop must not be empty: it would end every response at once")


@dataclass(frozen=True, kw_only=True)
class GradingConfig(ConfigGroup):
    """How a response is judged and what it is paid."""

    grade_timeout: float = option(3.0, help="Seconds after which grading an answer is given up.", exclusive_minimum=0)
    grade_workers: int = option(1, help="Processes that grade.", minimum=1, display=True)
    answer_fallback: AnswerFallback = option(
        AnswerFallback.NONE, help="What to grade where a response has no \\boxed{} answer."
    )
    reward: str = option(
        "published",
        help="Outcome reward: published (correct 1; wrong or unparseable 0.5; no answer, time-out or cut off "
        "0), accuracy (1 or 0), or a function of yours as file.py:function or by the name that its package gives it.",
        metavar="published|accuracy|FILE.py:FUNCTION|NAME",
    )


def refuse_float16(config: CommonConfig) -> None:
    """Refuse training in float16: its gradients underflow without loss scaling.

    Raises:
        ConfigError: ``--dtype float16``.
    """
    if config.dtype is ComputeDtype.FLOAT16:
        raise ConfigError(
            "--dtype float16: small gradients would vanish in training", hint="use bfloat16, which has float32's range"
        )


def check_part(part: str | None) -> None:
    """Check `--part`: "3/16" is the third of sixteen.

    Raises:
        ConfigError: not of that form, or outside 1/N to N/N.
    """
    match = None if part is None else re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
    if part is not None and (match is None or int(match[1]) > int(match[2])):
        raise ConfigError(f"--part must be I/N with I from 1 to N, such as 3/16, got {part!r}")


def check_page_file(path: Path | None) -> None:
    """Check `--html`: a name by which a browser opens it, and by which nothing else is overwritten.

    Raises:
        ConfigError: it ends with neither .html nor .htm, or is a folder.
    """
    if path is not None and (path.suffix.lower() not in (".html", ".htm") or path.is_dir()):
        raise ConfigError(f"--html must be a file whose name ends with .html, got {str(path)!r}")
