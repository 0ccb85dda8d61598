"""Options of the generation engine: what is refused, and how vLLM's own arguments are read."""

from __future__ import annotations

import pytest

from rlfr_cli.config.engine import EngineConfig, EngineName, parse_engine_args
from rlfr_cli.config.fields import to_table
from rlfr_cli.errors import ConfigError


def test_the_hf_engine_is_the_default() -> None:
    assert EngineConfig().engine is EngineName.HF
    assert EngineConfig().vllm_options() == []


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size 2"),
        ({"data_parallel_size": 3}, "--data-parallel-size 3"),
        ({"gpu_memory_share": 0.5}, "--gpu-memory-share 0.5"),
        ({"prefix_caching": False}, "--no-prefix-caching"),
        ({"max_num_seqs": 8}, "--max-num-seqs 8"),
        ({"engine_arg": ("block_size=16", "seed=1")}, "--engine-arg block_size=16 seed=1"),
    ],
)
def test_options_of_vllm_are_refused_with_the_hf_engine_and_taken_otherwise(
    options: dict[str, object], shown: str
) -> None:
    with pytest.raises(ConfigError, match="--engine hf does not use it") as caught:
        EngineConfig(**options)
    assert shown in caught.value.message
    assert "--engine vllm" in str(caught.value.hint)
    for engine in ("vllm", "auto"):
        assert EngineConfig(engine=engine, **options).vllm_options() == [shown]


def test_values_are_json_where_they_parse() -> None:
    given = (
        "kv-cache-dtype=fp8",
        "block_size=16",
        "enforce_eager=true",
        'hf_overrides={"a": [1, null]}',
        "name=a=b",
        "x=",
    )
    assert parse_engine_args(given) == {
        "kv_cache_dtype": "fp8",
        "block_size": 16,
        "enforce_eager": True,
        "hf_overrides": {"a": [1, None]},
        "name": "a=b",
        "x": "",
    }


@pytest.mark.parametrize("entry", ["block_size", "=16", "Block=1", "--block_size=16", "a b=1", ""])
def test_an_entry_without_key_and_value_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match="must be KEY=VALUE"):
        EngineConfig(engine="vllm", engine_arg=(entry,))


def test_a_key_given_twice_names_both_values() -> None:
    with pytest.raises(ConfigError, match="block_size is given twice: 16 and 32"):
        EngineConfig(engine="vllm", engine_arg=("block_size=16", "block-size=32"))


def test_where_it_runs_is_no_part_of_the_artifact_and_what_draws_is() -> None:
    many = EngineConfig(engine="vllm", tensor_parallel_size=4, gpu_memory_share=0.3, engine_arg=("block_size=16",))
    assert to_table(many, for_artifact=True) == {"engine": "vllm", "engine_arg": ["block_size=16"]}
