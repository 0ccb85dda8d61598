"""Choosing and opening a generation engine, without vLLM."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlfr_cli.config.common import SamplingConfig
from rlfr_cli.config.engine import EngineConfig, EngineName, WeightTransfer
from rlfr_cli.engines import opening, vllm_arguments
from rlfr_cli.engines.hf import HfEngine
from rlfr_cli.engines.opening import choose_engine, end_token_ids_of, open_engine, resolve_engine
from rlfr_cli.errors import ConfigError, MissingPackageError
from rlfr_cli.policy.loading import Placement, Policy, load_tokenizer, read_model_config
from tiny_models import FAMILIES, make_model_folder
from tiny_policies import CPU, CPU_BF16, ModelFolders

GPU = Placement(torch.device("cuda"), torch.bfloat16)
PROMPTS = [(1, 2, 3), (1,)]


@dataclass(frozen=True)
class Model:
    """What ``stages.common.ModelInput`` tells an engine."""

    folder: Path
    config: Any
    tokenizer: Any
    placement: Placement
    context_length: int | None = 512


def model_of(folder: Path, placement: Placement = CPU, context_length: int | None = 512) -> Model:
    return Model(folder, read_model_config(folder), load_tokenizer(folder), placement, context_length)


@pytest.fixture
def model(model_folders: ModelFolders) -> Model:
    return model_of(model_folders.folder("llama"))


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What vLLM would be started with."""
    seen: dict[str, Any] = {}

    def check(given: dict[str, Any], placement: Placement) -> SimpleNamespace:
        seen.clear()
        seen.update(given)
        return SimpleNamespace(arguments=given)

    monkeypatch.setattr(opening, "check_arguments", check)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    return seen


def on(model: Model, placement: Placement) -> Model:
    return Model(model.folder, model.config, model.tokenizer, placement, model.context_length)


# hf and auto


def test_the_hf_engine_loads_the_policy_or_shares_one(model: Model, model_folders: ModelFolders) -> None:
    choice = choose_engine(EngineConfig(), SamplingConfig(tokens_per_batch=99), model, PROMPTS)
    assert (choice.name, choice.setup) == (EngineName.HF, None)
    engine = choice.open()
    assert isinstance(engine, HfEngine)
    assert engine.tokens_per_batch == 99
    assert engine.policy.folder == model.folder
    policy: Policy = model_folders.policy("llama")
    shared = choice.open(policy)
    assert isinstance(shared, HfEngine)
    assert shared.policy is policy
    assert open_engine(EngineConfig(), SamplingConfig(), model, PROMPTS).name == "hf"


@pytest.mark.parametrize(
    ("placement", "installed", "wanted"),
    [(GPU, True, "vllm"), (GPU, False, "hf"), (CPU, True, "hf"), (CPU, False, "hf")],
)
def test_auto_is_vllm_on_a_gpu_where_it_is_installed(
    placement: Placement,
    installed: bool,
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(opening, "vllm_installed", lambda: installed)
    assert resolve_engine(EngineName.AUTO, placement) == wanted
    assert f"--engine auto: {wanted} draws" in capsys.readouterr().err
    assert resolve_engine(EngineName.VLLM, placement) == "vllm"
    assert resolve_engine(EngineName.HF, placement) == "hf"
    assert capsys.readouterr().err == ""


def test_auto_that_becomes_hf_says_which_options_it_leaves_unused(
    model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    choose_engine(EngineConfig(engine="auto", max_num_seqs=4), SamplingConfig(), model, PROMPTS)
    assert "does not use --max-num-seqs 4" in capsys.readouterr().err
    choose_engine(EngineConfig(engine="auto"), SamplingConfig(), model, PROMPTS, devices=(1, 2))
    assert "does not use --engine-device 1, --engine-device 2" in capsys.readouterr().err


def test_work_that_was_begun_with_another_engine_is_said(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    choice = choose_engine(EngineConfig(), SamplingConfig(), model, PROMPTS)
    choice.warn_of_other("hf")
    choice.warn_of_other(None)
    assert capsys.readouterr().err == ""
    choice.warn_of_other("vllm")
    assert "begun with --engine vllm, and goes on with hf" in capsys.readouterr().err


# vLLM's arguments


def test_vllm_without_vllm_says_what_to_install(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_arguments, "vllm_installed", lambda: False)
    with pytest.raises(MissingPackageError, match="not installed") as caught:
        choose_engine(EngineConfig(engine="vllm"), SamplingConfig(), model, PROMPTS)
    assert "rlfr-cli[vllm]" in str(caught.value.hint)
    assert "docs/engines.md" in str(caught.value.hint)
    assert caught.value.exit_code == 2


def test_arguments_on_a_cpu(model: Model, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = EngineConfig(engine="vllm")
    choose_engine(vllm, SamplingConfig(max_new_tokens=40), model, PROMPTS)
    assert arguments["model"] == str(model.folder)
    assert arguments["dtype"] == "float32"
    assert arguments["max_model_len"] == 43  # the longest prompt and its response
    assert arguments["logprobs_mode"] == "processed_logprobs"
    assert arguments["enable_prefix_caching"]
    assert arguments["enforce_eager"]
    assert arguments["kv_cache_memory_bytes"] == 2**31
    assert arguments["enable_chunked_prefill"] is False
    assert not arguments.keys() & {"max_num_seqs", "gpu_memory_utilization", "device_ids", "enable_sleep_mode"}
    choose_engine(vllm, SamplingConfig(max_new_tokens=600), on(model, CPU_BF16), PROMPTS, sleeps=True)
    assert arguments["max_model_len"] == 512
    assert arguments["dtype"] == "bfloat16"
    assert "enable_sleep_mode" not in arguments
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    choose_engine(vllm, SamplingConfig(), model, PROMPTS)
    assert "kv_cache_memory_bytes" not in arguments


def test_arguments_on_a_gpu(model: Model, arguments: dict[str, Any]) -> None:
    config = EngineConfig(
        engine="vllm",
        tensor_parallel_size=2,
        data_parallel_size=3,
        gpu_memory_share=0.4,
        prefix_caching=False,
        max_num_seqs=7,
        engine_arg=("kv_cache_dtype=fp8", "enable_chunked_prefill=true"),
    )
    choice = choose_engine(
        config, SamplingConfig(), on(model, GPU), PROMPTS, sleeps=True, weight_transfer=WeightTransfer.NCCL
    )
    assert choice.weight_transfer is WeightTransfer.NCCL
    expected = {
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
        "data_parallel_size": 3,
        "gpu_memory_utilization": 0.4,
        "enable_prefix_caching": False,
        "max_num_seqs": 7,
        "enable_sleep_mode": True,
        "weight_transfer_config": {"backend": "nccl"},
        "kv_cache_dtype": "fp8",
        "enable_chunked_prefill": True,
    }
    assert {key: arguments[key] for key in expected} == expected
    assert not arguments.keys() & {"enforce_eager", "kv_cache_memory_bytes", "device_ids"}


def test_ipc_reaches_one_gpu_and_files_reach_several(model: Model, arguments: dict[str, Any]) -> None:
    def transfer(**sizes: int) -> WeightTransfer:
        config = EngineConfig(engine="vllm", **sizes)
        gpu = on(model, GPU)
        return choose_engine(config, SamplingConfig(), gpu, PROMPTS, weight_transfer=WeightTransfer.IPC).weight_transfer

    assert transfer() is WeightTransfer.IPC
    assert arguments["weight_transfer_config"] == {"backend": "ipc"}
    assert transfer(tensor_parallel_size=2) is transfer(data_parallel_size=2) is WeightTransfer.FILE
    assert "weight_transfer_config" not in arguments


def test_one_named_gpu_is_used_and_is_too_few_for_several(model: Model, arguments: dict[str, Any]) -> None:
    second = on(model, Placement(torch.device("cuda:1"), torch.bfloat16))
    choose_engine(EngineConfig(engine="vllm"), SamplingConfig(), second, PROMPTS)
    assert arguments["device_ids"] == [1]
    with pytest.raises(ConfigError, match=r"cuda:1 is one GPU.*needs 2"):
        choose_engine(EngineConfig(engine="vllm", tensor_parallel_size=2), SamplingConfig(), second, PROMPTS)


def test_gpus_of_its_own_reach_vllm(model: Model, arguments: dict[str, Any]) -> None:
    second = on(model, Placement(torch.device("cuda:1"), torch.bfloat16))
    config = EngineConfig(engine="vllm", tensor_parallel_size=2)
    choose_engine(config, SamplingConfig(), second, PROMPTS, weight_transfer=WeightTransfer.NCCL, devices=(5, 6))
    assert arguments["device_ids"] == [5, 6]
    assert "enable_sleep_mode" not in arguments


@pytest.mark.parametrize(
    ("entry", "message", "hint"),
    [
        ("dtype=float16", "dtype=float16: rlfr sets dtype itself, here to float32", "--dtype"),
        (
            "tensor-parallel-size=2",
            "tensor_parallel_size=2: rlfr sets tensor_parallel_size itself, here to 1",
            "--tensor",
        ),
        ("max_num_seqs=4", "max_num_seqs=4: rlfr sets max_num_seqs itself, here to the default", "--max-num-seqs"),
        ("enable_chunked_prefill=true", "here to False", "leave it out"),
        ("logprobs_mode=raw_logprobs", "here to processed_logprobs", "leave it out"),
        ('speculative_config={"method": "ngram"}', "guessed ahead", "leave it out"),
    ],
)
def test_an_argument_that_rlfr_sets_is_refused_with_both_values(
    entry: str, message: str, hint: str, model: Model
) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_engine(EngineConfig(engine="vllm", engine_arg=(entry,)), SamplingConfig(), model, PROMPTS)
    assert message in caught.value.message
    assert hint in str(caught.value.hint)


def test_a_default_on_a_cpu_may_be_replaced(model: Model, arguments: dict[str, Any]) -> None:
    given = ("enforce_eager=false", "kv_cache_memory_bytes=1000000")
    choose_engine(EngineConfig(engine="vllm", engine_arg=given), SamplingConfig(), model, PROMPTS)
    assert (arguments["enforce_eager"], arguments["kv_cache_memory_bytes"]) == (False, 1000000)
    choose_engine(EngineConfig(engine="vllm", gpu_memory_share=0.2), SamplingConfig(), model, PROMPTS)
    assert arguments["gpu_memory_utilization"] == 0.2
    assert "kv_cache_memory_bytes" not in arguments


def test_options_of_transformers_are_refused_or_said_to_be_unused(
    model: Model, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    vllm = EngineConfig(engine="vllm")
    eager = on(model, Placement(torch.device("cpu"), torch.float32, "eager"))
    with pytest.raises(ConfigError, match="--attn-implementation eager is transformers'"):
        choose_engine(vllm, SamplingConfig(), eager, PROMPTS)
    choose_engine(vllm, SamplingConfig(tokens_per_batch=5), model, PROMPTS)
    assert "--tokens-per-batch 5 is not used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("temperature", "taken"), [(0.0, True), (0.005, False), (0.01, True), (2.0, True), (2.1, False)]
)
def test_temperatures_that_vllm_would_change_or_refuse(
    temperature: float, taken: bool, model: Model, arguments: dict[str, Any]
) -> None:
    sampling = SamplingConfig(temperature=temperature)
    if taken:
        choose_engine(EngineConfig(engine="vllm"), sampling, model, PROMPTS)
    else:
        with pytest.raises(ConfigError, match=r"takes 0, or 0\.01 to 2"):
            choose_engine(EngineConfig(engine="vllm"), sampling, model, PROMPTS)


# The environment, and end tokens


def test_the_environment_of_vllm_leaves_the_launcher_out_and_keeps_what_a_user_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("RANKING", "kept")
    for name in ("VLLM_NO_USAGE_STATS", "TORCHDYNAMO_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    environment = vllm_arguments.start_environment({"enforce_eager": True}, True)
    assert not environment.keys() & {"RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"}
    assert environment["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert environment["RANKING"] == "kept"
    assert environment["VLLM_NO_USAGE_STATS"] == environment["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in vllm_arguments.start_environment({"enforce_eager": True}, False)
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in environment


def test_only_variables_of_vllm_outlive_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.delenv("VLLM_A", raising=False)
    with vllm_arguments.within({"LD_PRELOAD": "libgomp.so", "VLLM_A": "b"}):
        assert "RANK" not in os.environ
        assert os.environ["LD_PRELOAD"] == "libgomp.so"
    assert os.environ["RANK"] == "1"
    assert "LD_PRELOAD" not in os.environ
    assert os.environ["VLLM_A"] == "b"
    monkeypatch.delenv("VLLM_A")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_file", [True, False], ids=["generation_config.json", "config.json"])
def test_end_tokens_are_those_of_the_loaded_model(
    family: str, with_file: bool, tmp_path: Path, model_folders: ModelFolders
) -> None:
    folder = make_model_folder(tmp_path / family, family)
    file = folder / "generation_config.json"
    if with_file:
        file.write_text('{"eos_token_id": [2, 9]}')
    else:
        file.unlink(missing_ok=True)
    loaded = model_folders.policy(family).end_token_ids
    assert end_token_ids_of(model_of(folder)) == (loaded | {9} if with_file else loaded)
