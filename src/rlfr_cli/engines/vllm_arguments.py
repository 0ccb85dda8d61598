"""What vLLM is started with: its engine's arguments, checked before any work, and its environment.

Written against vLLM 0.32 (``vllm.AsyncEngineArgs``, ``vllm.envs``). Nothing here starts an engine or computes.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rlfr_cli.config.engine import EngineConfig, WeightTransfer, parse_engine_args
from rlfr_cli.engines.generation import Sampling
from rlfr_cli.errors import ConfigError, MissingPackageError
from rlfr_cli.policy.loading import Placement

# vLLM rounds a smaller temperature up to the first, and refuses one above the second.
TEMPERATURES = (0.01, 2.0)
# vLLM's own default on a CPU is nearly all of the machine's memory.
CPU_CACHE_BYTES = 2 << 30

# Options of rlfr behind the arguments that it sets.
OPTIONS = {
    "model": "--model",
    "dtype": "--dtype",
    "device_ids": "--device",
    "max_model_len": "--max-new-tokens",
    "trust_remote_code": "--trust-remote-code",
    "tensor_parallel_size": "--tensor-parallel-size",
    "data_parallel_size": "--data-parallel-size",
    "gpu_memory_utilization": "--gpu-memory-share",
    "enable_prefix_caching": "--prefix-caching",
    "max_num_seqs": "--max-num-seqs",
}
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",  # a CPU's worker waits for ever, until it is told a second time
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
SPECULATIVE = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
# A launcher's variables would make vLLM's processes look for the launcher's process group.
LAUNCHER = re.compile(r"(GROUP_|ROLE_|LOCAL_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")


@dataclass(frozen=True)
class VllmSetup:
    """What vLLM is started with, checked.

    Attributes:
        arguments: keyword arguments of ``vllm.AsyncEngineArgs``.
        config: the ``vllm.config.VllmConfig`` that they make.
        environment: what its processes are to see.
    """

    arguments: Mapping[str, Any]
    config: Any
    environment: Mapping[str, str]


def vllm_arguments(
    folder: Path,
    placement: Placement,
    config: EngineConfig,
    *,
    most_tokens: int | None = None,
    sleeps: bool = False,
    weight_transfer: WeightTransfer = WeightTransfer.FILE,
    devices: Sequence[int] = (),
) -> dict[str, Any]:
    """Keyword arguments of ``vllm.AsyncEngineArgs``: rlfr's own, then those of ``--engine-arg``.

    Args:
        most_tokens: of one prompt with its response, within the model's context; None for the whole context.
        sleeps: give GPU memory back between uses.
        weight_transfer: how a trainer's weights will come.
        devices: GPUs that it has to itself; by default the placement's.

    Raises:
        ConfigError: ``--engine-arg`` names what rlfr sets, or a device does not fit the parallel sizes.
    """
    on_cpu = placement.device.type == "cpu"
    own: dict[str, Any] = {
        "model": str(folder),
        "dtype": str(placement.dtype).removeprefix("torch."),
        "trust_remote_code": placement.trust_remote_code,
        "tensor_parallel_size": config.tensor_parallel_size,
        "data_parallel_size": config.data_parallel_size,
        "enable_prefix_caching": config.prefix_caching,
        # Of the logits divided by the temperature; raw_logprobs leaves the temperature out.
        "logprobs_mode": "processed_logprobs",
        # Sampling options and end tokens come with each request, and not from generation_config.json.
        "generation_config": "vllm",
        "worker_extension_cls": "rlfr_cli.engines.vllm_worker.WorkerExtension",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "max_model_len": most_tokens,
        "max_num_seqs": config.max_num_seqs,
        "gpu_memory_utilization": config.gpu_memory_share,
        "device_ids": list(devices) or _device_ids(placement, config),
        "enable_sleep_mode": True if sleeps and not on_cpu else None,
        "weight_transfer_config": None if weight_transfer is WeightTransfer.FILE else {"backend": str(weight_transfer)},
        # A prompt read in pieces rewinds the generator of its seed, which a CPU's cannot: vLLM 0.32 dies of it there.
        "enable_chunked_prefill": False if on_cpu else None,
    }
    given = parse_engine_args(config.engine_arg)
    for key, value in given.items():
        _refuse_own(key, value, own)
    # Compiling pays on GPUs only; on a CPU it takes a minute and a C++ compiler.
    defaults: dict[str, Any] = {"enforce_eager": True} if on_cpu else {}
    if on_cpu and config.gpu_memory_share is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        defaults["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    return {**{key: value for key, value in own.items() if value is not None}, **defaults, **given}


def _device_ids(placement: Placement, config: EngineConfig) -> list[int] | None:
    index = placement.device.index
    if placement.device.type == "cpu" or index is None:
        return None
    wanted = config.tensor_parallel_size * config.data_parallel_size
    if wanted > 1:
        raise ConfigError(
            f"--device cuda:{index} is one GPU, and --tensor-parallel-size {config.tensor_parallel_size} times "
            f"--data-parallel-size {config.data_parallel_size} needs {wanted}",
            hint="use --device cuda, and choose GPUs with CUDA_VISIBLE_DEVICES",
        )
    return [index]


def _refuse_own(key: str, value: Any, own: Mapping[str, Any]) -> None:
    if key in SPECULATIVE:
        raise ConfigError(
            f"--engine-arg {key}={value}: whether log-probabilities of tokens that were guessed ahead are those of the "
            "policy has not been checked",
            hint="leave it out",
        )
    option = OPTIONS.get(key)
    if option is not None or own.get(key) is not None:
        ours = "the default of vLLM" if own[key] is None else own[key]
        raise ConfigError(
            f"--engine-arg {key}={value}: rlfr sets {key} itself, here to {ours}",
            hint=f"use {option}" if option else "leave it out",
        )


def check_sampling(sampling: Sampling) -> None:
    """Refuse what vLLM would refuse during work, or change.

    Raises:
        ConfigError: a temperature outside vLLM's range.
    """
    least, most = TEMPERATURES
    if sampling.temperature != 0 and not least <= sampling.temperature <= most:
        raise ConfigError(
            f"--temperature {sampling.temperature}: vLLM takes 0, or {least:g} to {most:g}",
            hint="use --engine hf for other temperatures",
        )


def vllm_installed() -> bool:
    """Whether vLLM can be imported; it is not imported, which takes ten seconds."""
    return importlib.util.find_spec("vllm") is not None


def check_arguments(arguments: Mapping[str, Any], placement: Placement) -> VllmSetup:
    """Make vLLM's whole config of the arguments; imports vLLM, and starts nothing.

    Raises:
        MissingPackageError: vLLM is not installed.
        ConfigError: an unknown argument, a wrong value, or a build of vLLM for another kind of device.
    """
    if not vllm_installed():
        raise MissingPackageError(
            "--engine vllm needs vLLM, which is not installed",
            hint="on a machine with GPUs: pip install 'rlfr-cli[vllm]'; on a CPU: see docs/engines.md",
        )
    with within(start_environment(arguments, placement.device.type == "cpu")):
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext

        if current_platform.device_type != placement.device.type:
            raise ConfigError(
                f"--device {placement.device.type}: this build of vLLM computes on {current_platform.device_type}",
                hint=f"use --device {current_platform.device_type}, or --engine hf",
            )
        known = {field.name for field in fields(AsyncEngineArgs)}
        if unknown := sorted(set(arguments) - known):
            raise ConfigError(
                f"--engine-arg {unknown[0]}: vLLM has no such argument",
                hint="its arguments are those of `vllm serve`, with underscores for dashes",
            )
        try:
            # The context of vLLM's own offline class, whose batches are larger than a server's.
            config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS)
        except (ValueError, TypeError, NotImplementedError) as error:  # pydantic's errors are ValueErrors
            raise ConfigError(
                f"vLLM refuses its arguments: {str(error).strip()}", hint="see --engine-arg, or use --engine hf"
            ) from error
        return VllmSetup(arguments, config, dict(os.environ))  # which the config has added to


def start_environment(arguments: Mapping[str, Any], on_cpu: bool) -> dict[str, str]:
    """The environment that vLLM is to see: it says errors only, on stderr, sends no usage statistics, and forks no
    process with threads in it. What a user has set stays."""
    environment = {key: value for key, value in os.environ.items() if not LAUNCHER.fullmatch(key)}
    environment = {**ENVIRONMENT, **environment}
    if on_cpu and arguments.get("enforce_eager"):
        environment.setdefault("TORCHDYNAMO_DISABLE", "1")  # ranks of log-probabilities would be compiled all the same
    if arguments.get("weight_transfer_config") == {"backend": "ipc"}:
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = (
            "1"  # handles of GPU memory are pickled, for its own processes
        )
    return environment


@contextmanager
def within(environment: Mapping[str, str]) -> Iterator[None]:
    """Run in that environment. Afterwards only variables of vLLM stay, and not, for example, the libraries that it
    wants loaded into every process that is started."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        yield
    finally:
        kept = {key: value for key, value in os.environ.items() if key.startswith("VLLM_")}
        os.environ.clear()
        os.environ.update({**before, **kept})
