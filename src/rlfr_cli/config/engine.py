"""Options of the generation engine: which machinery draws responses, and how it is laid out."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from rlfr_cli.config.fields import ConfigGroup, option
from rlfr_cli.errors import ConfigError


class EngineName(StrEnum):
    """What draws responses; `auto` is vLLM where it is installed and computes on a GPU, transformers elsewhere."""

    HF = "hf"
    VLLM = "vllm"
    AUTO = "auto"


class WeightTransfer(StrEnum):
    """How a trainer's weights reach vLLM: files in shared memory, CUDA IPC on one GPU, NCCL between GPUs."""

    FILE = "file"
    IPC = "ipc"
    NCCL = "nccl"


@dataclass(frozen=True, kw_only=True)
class EngineConfig(ConfigGroup):
    """What draws responses. All but the first are options of vLLM."""

    engine: EngineName = option(
        EngineName.HF,
        help="What draws responses: hf is transformers, bit for bit the same on every run; vllm is faster on GPUs; "
        "auto is vllm where it is installed and --device is a GPU, else hf.",
    )
    tensor_parallel_size: int = option(
        1, help="With vllm: GPUs over which each layer of the model is spread.", minimum=1, path=True
    )
    data_parallel_size: int = option(
        1,
        help="With vllm: copies of the model, each on GPUs of its own, which share the requests.",
        minimum=1,
        path=True,
    )
    gpu_memory_share: float | None = option(
        None,
        help="With vllm: share of each GPU's memory that it may take for weights and cache; its own default when left "
        "out. On a CPU, the share of the machine's memory.",
        exclusive_minimum=0,
        maximum=1,
        path=True,
    )
    prefix_caching: bool = option(
        True, help="With vllm: keep what was computed of prompts, so that a group reads its prompt once.", path=True
    )
    max_num_seqs: int | None = option(
        None, help="With vllm: most responses that are drawn at once.", minimum=1, path=True
    )
    engine_arg: tuple[str, ...] = option(
        (),
        help="With vllm: another argument of its engine, such as kv_cache_dtype=fp8; the value is read as JSON where "
        "it is JSON. May be repeated.",
        metavar="KEY=VALUE",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_engine_args(self.engine_arg)
        if self.engine is EngineName.HF and (unused := self.vllm_options()):
            raise ConfigError(
                f"{', '.join(unused)}: an option of vLLM, and --engine hf does not use it",
                hint="add --engine vllm, or leave it out",
            )

    def vllm_options(self) -> list[str]:
        """The options of vLLM that differ from their default, as a user writes them."""
        given = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "engine" and value != field.default:
                flag = "--" + field.name.replace("_", "-")
                given.append(f"--no-{flag.removeprefix('--')}" if value is False else f"{flag} {_shown(value)}")
        return given


@dataclass(frozen=True, kw_only=True)
class SeparationConfig(ConfigGroup):
    """A vLLM apart from the trainer: on GPUs of its own, at work while the trainer is."""

    engine_device: tuple[int, ...] = option(
        (),
        help="With --engine vllm: a GPU of each machine that vLLM has to itself, by number; the training processes of "
        "a machine share them out in order. Left out, vLLM shares the trainer's GPU and sleeps while that works. May "
        "be repeated.",
        metavar="GPU",
        minimum=0,
        path=True,
    )
    overlap: bool = option(
        False,
        help="With --engine vllm: draw the next batch while training on this one. Its responses are then of the "
        "policy one step earlier, which --engine-correction accounts for. On GPUs it needs --engine-device.",
    )


def parse_engine_args(entries: tuple[str, ...]) -> dict[str, Any]:
    """``KEY=VALUE`` entries as keyword arguments; dashes in keys are underscores.

    Raises:
        ConfigError: not of that form, or a key twice.
    """
    parsed: dict[str, Any] = {}
    for entry in entries:
        key, sign, text = entry.partition("=")
        key = key.replace("-", "_")
        if not sign or not re.fullmatch(r"[a-z][a-z0-9_]*", key):
            raise ConfigError(f"--engine-arg must be KEY=VALUE, such as kv_cache_dtype=fp8, got {entry!r}")
        value = _json_or_text(text)
        if key in parsed:
            raise ConfigError(f"--engine-arg {key} is given twice: {parsed[key]!r} and {value!r}", hint="keep one")
        parsed[key] = value
    return parsed


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
