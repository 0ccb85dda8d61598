"""Bytes by hand for a small model, and as torch's allocator counts them in the project's own code."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from planning.small_settings import LLAMA, QWEN_7B
from rlfr_cli.planning.memory import (
    PARTS,
    MicroBatch,
    Numbers,
    add,
    cache_bytes,
    largest,
    logits_bytes,
    passing_bytes,
    reading,
    sampling,
    saved_bytes,
    stepping_bytes,
    updating,
)
from rlfr_cli.planning.model_sizes import model_sizes
from rlfr_cli.policy.logprobs import CHUNK_ELEMENTS

MODEL = model_sizes(LLAMA)
FLOAT32, AUTOCAST, BFLOAT16 = Numbers(4, 4), Numbers(4, 2), Numbers(2, 2)


def test_what_a_block_keeps_of_a_token() -> None:
    # Two norms of 64, what they give to the matrices, attention with 2 of 4 heads, its sums, the MLP of 96.
    assert saved_bytes(MODEL, FLOAT32) == 2 * 8 * 64 + 2 * 4 * 64 + 4 * (2 * 64 + 2 * 32) + 4 * 4 + 4 * 4 * 96
    assert saved_bytes(MODEL, AUTOCAST) == 2 * 8 * 64 + 5 * 2 * 64 + 2 * (2 * 64 + 2 * 32) + 4 * 4 + 4 * 2 * 96
    assert saved_bytes(MODEL, BFLOAT16) == 2 * 6 * 64 + 2 * 2 * 64 + 2 * (2 * 64 + 2 * 32) + 4 * 4 + 4 * 2 * 96


def test_only_autocast_copies_weights() -> None:
    batch = MicroBatch(2, 1)
    assert updating(MODEL, FLOAT32, batch, checkpointing=False).parts["casts"] == 0
    assert updating(MODEL, AUTOCAST, batch, checkpointing=False).parts["casts"] == 4 * 2 * MODEL.block_matrices
    assert updating(MODEL, BFLOAT16, batch, checkpointing=False).parts["casts"] == 0


def test_checkpointing_keeps_inputs_of_all_blocks_and_the_rest_of_one() -> None:
    batch = MicroBatch(10_000, 1)
    plain = updating(MODEL, FLOAT32, batch, checkpointing=False).parts["activations"]
    assert plain == pytest.approx(10_000 * (4 * saved_bytes(MODEL, FLOAT32) + 8 * 64), rel=1e-4)
    spared = updating(MODEL, FLOAT32, batch, checkpointing=True).parts["activations"]
    assert spared == pytest.approx(10_000 * (4 * 4 * 64 + saved_bytes(MODEL, FLOAT32) + 2 * 4 * 96), rel=1e-4)


def test_logits_stop_growing_at_a_chunk() -> None:
    chunk = CHUNK_ELEMENTS // MODEL.vocab_size
    half, whole, twice = (
        logits_bytes(MODEL, FLOAT32, tokens, backward=False) for tokens in (chunk / 2, chunk, 2 * chunk)
    )
    assert whole == 2 * half == twice == 12 * chunk * 300
    assert logits_bytes(MODEL, FLOAT32, chunk, backward=True) == 20 * chunk * 300
    # Over several chunks the output head's gradient is summed up.
    assert logits_bytes(MODEL, FLOAT32, 2 * chunk, backward=True) == 20 * chunk * 300 + 4 * 300 * 64


def test_the_optimisers_step_adds_all_weights_on_a_gpu_and_the_largest_on_a_cpu() -> None:
    assert stepping_bytes(MODEL, Numbers(4, 4, on_gpu=True)) == 4 * MODEL.parameters
    assert stepping_bytes(MODEL, Numbers(4, 4, on_gpu=False)) == 8 * 300 * 64


def test_the_cache_holds_keys_and_values_of_every_block_in_the_weights_dtype() -> None:
    assert cache_bytes(MODEL, 2) == 2 * 2 * 4 * 32
    in_training, alone = (sampling(MODEL, numbers, 8, 10, 90, 2).parts["kv_cache"] for numbers in (AUTOCAST, BFLOAT16))
    assert in_training == 2 * alone == 8 * 100 * cache_bytes(MODEL, 4)


def test_many_long_prompts_take_more_while_they_are_read() -> None:
    long_prompts = sampling(MODEL, FLOAT32, 8, 1000, 1, 8)
    assert long_prompts.parts["activations"] == 8000 * passing_bytes(MODEL, FLOAT32)
    assert long_prompts.parts["logits"] == 0


def test_reading_fewer_blocks_casts_fewer_weights() -> None:
    one, four = (reading(MODEL, AUTOCAST, MicroBatch(10, 0), blocks, head=False) for blocks in (1, 4))
    assert four.parts["casts"] == 4 * one.parts["casts"] == 4 * 2 * MODEL.block_matrices
    assert four.parts["logits"] == 0


def test_a_phase_takes_its_largest_moment() -> None:
    phase = largest("update", {"weights": 1, "logits": 5}, {"weights": 4})
    assert (phase.name, phase.total) == ("update", 6)
    assert add({"flow": 1.0}, {"flow": 2.0, "logits": 1.0}) == dict.fromkeys(PARTS, 0) | {"flow": 3.0, "logits": 1.0}


def test_seven_billion_weights_in_training_are_what_fake_tensors_added_up_to() -> None:
    """Counted once with torch's fake tensors, in bytes above weights and moments; see docs/plan.md."""
    qwen, batch = model_sizes(QWEN_7B), MicroBatch(16380, 13312)
    for numbers, checkpointing, counted in (
        (FLOAT32, True, 46_434e6),
        (AUTOCAST, False, 167_706e6),
        (AUTOCAST, True, 52_286e6),
    ):
        update = updating(qwen, numbers, batch, checkpointing=checkpointing)
        assert 4 * qwen.parameters + update.total == pytest.approx(counted, rel=0.01)
    assert reading(qwen, AUTOCAST, batch, 28).total == pytest.approx(15_718e6, rel=0.01)


@pytest.mark.slow
def test_predictions_are_near_what_the_allocator_counts(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 15 %, of all bytes and of those above weights and moments; a cheap run of ``benchmarks/memory.py``."""
    import torch

    spec = importlib.util.spec_from_file_location("memory_benchmark", repository / "benchmarks" / "memory.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "memory_benchmark", benchmark)
    spec.loader.exec_module(benchmark)
    sizes = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 512}
    config = LLAMA | sizes | {"num_hidden_layers": 6, "vocab_size": 8192, "tie_word_embeddings": True}
    cases = list(benchmark.cases(config, 4, 128, torch.device("cpu")))
    assert len(cases) == 20
    for case in cases:
        assert abs(case.error) < 0.15, case
        assert abs(case.error_above_state) < 0.15, case
