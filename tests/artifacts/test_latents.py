"""Latents: packed shards, round trips, and reading a part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from rlfr_cli.artifacts.fingerprint import ModelFingerprint
from rlfr_cli.artifacts.folder import StageFolder
from rlfr_cli.artifacts.latents import LatentsFolder, LatentsInfo, latents_bytes, latents_shard
from rlfr_cli.errors import ArtifactError

MODEL = ModelFingerprint(model_type="t", num_blocks=4, hidden_size=6, vocab_size=9, weights_sha256="ab")
INFO = LatentsInfo(
    layer_indices=(1, 3),
    context_layers=("final-norm",),
    num_blocks=4,
    hidden_size=6,
    num_prompt_tokens=1,
    dtype="bfloat16",
    model=MODEL,
    source="cd",
)
LENGTHS = ([3, 0, 4], [5])


def make_shard(index: int, *, int8: bool = False) -> dict[str, Tensor]:
    lengths = LENGTHS[index]
    generator = torch.Generator().manual_seed(index)
    latents = torch.randn(sum(lengths), 3, 6, generator=generator).bfloat16()
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.arange(len(lengths)) + 10 * index
    return latents_shard(latents, torch.arange(sum(lengths)), offsets, ids, int8=int8)


def write(path: Path, info: LatentsInfo = INFO) -> Path:
    stage = StageFolder.open_for_writing(path, kind="latents", config={}, inputs={}, seed=0, num_units=2)
    for unit in range(2):
        names = [(f"p{unit}", sample) for sample in range(len(LENGTHS[unit]))]
        stage.write_tensors(unit, make_shard(unit, int8=info.dtype == "int8"), {"responses": names})
    assert stage.finish(info.to_extra())
    return path


def test_round_trip(tmp_path: Path) -> None:
    latents = LatentsFolder(write(tmp_path))
    assert latents.info == INFO
    assert latents.info.states == (1, 3, "final-norm")
    assert (latents.num_shards, latents.num_sequences, latents.num_tokens) == (2, 4, 12)
    for index, shard in enumerate(latents.iter_shards()):
        written = make_shard(index)
        assert torch.equal(shard.latents_NJD, written["latents"])
        assert shard.latents_NJD.dtype == torch.bfloat16
        assert (shard.token_ids_N.dtype, shard.sequence_offsets.dtype) == (torch.int32, torch.int64)
        assert torch.equal(shard.token_ids_N, written["token_ids"])
    offsets, ids = latents.read_offsets(0)
    assert (offsets.tolist(), ids.tolist()) == ([0, 3, 3, 7], [0, 1, 2])
    tokens = [latents.read_shard(0).sequence(index)[1].tolist() for index in range(3)]
    assert tokens == [[0, 1, 2], [], [3, 4, 5, 6]]


def test_a_part_of_a_shard_equals_the_whole(tmp_path: Path) -> None:
    latents = LatentsFolder(write(tmp_path))
    whole = latents.read_shard(0)
    part = latents.read_sequences(0, 1, 3)
    assert part.num_sequences == 2
    assert part.sequence_ids.tolist() == [1, 2]
    assert part.sequence_offsets.tolist() == [0, 0, 4]
    for index in range(2):
        for read, expected in zip(part.sequence(index), whole.sequence(index + 1), strict=True):
            assert torch.equal(read, expected)


def test_responses_and_their_tokens(tmp_path: Path) -> None:
    latents = LatentsFolder(write(tmp_path))
    assert latents.read_names(0) == [("p0", 0), ("p0", 1), ("p0", 2)]
    # One prompt token before each response; the second sequence is empty.
    assert latents.read_response_tokens(0) == [[1, 2], [], [4, 5, 6]]
    assert latents.read_response_tokens(1) == [[1, 2, 3, 4]]


def test_reading_a_part_does_not_read_the_rest(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "shards" / "00000.safetensors"
    data = bytearray(path.read_bytes())
    position = data.index(make_shard(0)["latents"][0].view(torch.uint8).numpy().tobytes())
    data[position] ^= 1
    path.write_bytes(data)
    latents = LatentsFolder(tmp_path)
    assert torch.equal(latents.read_sequences(0, 2, 3, verify=False).latents_NJD, make_shard(0)["latents"][3:])
    for read in (lambda: latents.read_shard(0), lambda: latents.read_sequences(0, 2, 3)):
        with pytest.raises(ArtifactError, match=r"00000\.safetensors is altered: SHA-256"):
            read()


def test_equal_latents_give_equal_bytes(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    for file in sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file()):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


@pytest.mark.parametrize(
    "changes",
    [
        {"latents_NJD": torch.zeros(4, 6)},
        {"latents_NJD": torch.zeros(3, 2, 6)},
        {"latents_NJD": torch.zeros(4, 2, 6, dtype=torch.float64)},
        {"sequence_offsets": torch.tensor([0, 4])},
        {"sequence_offsets": torch.tensor([0, 2, 3])},
        {"sequence_offsets": torch.tensor([1, 2, 4])},
        {"sequence_ids": torch.tensor([0])},
    ],
)
def test_a_shard_that_does_not_fit_together_is_refused(changes: dict[str, Any]) -> None:
    whole = {
        "latents_NJD": torch.zeros(4, 2, 6),
        "token_ids_N": torch.zeros(4),
        "sequence_offsets": torch.tensor([0, 1, 4]),
        "sequence_ids": torch.tensor([0, 1]),
    }
    latents_shard(**whole)
    with pytest.raises(AssertionError):
        latents_shard(**(whole | changes))


def test_decreasing_offsets_are_refused() -> None:
    with pytest.raises(AssertionError):
        latents_shard(torch.zeros(4, 2, 6), torch.zeros(4), torch.tensor([0, 3, 2, 4]), torch.arange(3))


def test_a_manifest_that_contradicts_the_shards_is_refused(tmp_path: Path) -> None:
    other = LatentsInfo(**{**vars(INFO), "layer_indices": (1, 2, 3)})
    write(tmp_path, other)
    with pytest.raises(ArtifactError, match=r"shape \[7, 3, 6\].* 4 layers of hidden size 6"):
        LatentsFolder(tmp_path)


def test_eight_bits_are_read_as_float32_and_a_part_as_the_whole(tmp_path: Path) -> None:
    latents = LatentsFolder(write(tmp_path, replace(INFO, dtype="int8")))
    for index in range(2):
        whole, wanted = latents.read_shard(index), make_shard(index)
        assert whole.latents_NJD.dtype == torch.float32
        torch.testing.assert_close(whole.latents_NJD, wanted["latents"].float(), atol=0.1, rtol=0)
        assert not torch.equal(whole.latents_NJD, wanted["latents"].float())
        assert torch.equal(whole.token_ids_N, wanted["token_ids"])
    part = latents.read_sequences(0, 2, 3)
    assert torch.equal(part.latents_NJD, latents.read_shard(0).latents_NJD[3:])
    with safe_open(tmp_path / "shards" / "00000.safetensors", "pt") as tensors:
        assert {name: tensors.get_slice(name).get_shape() for name in tensors.keys() if "latents" in name} == {  # noqa: SIM118
            "latents": [7, 3, 6],
            "latents_scale": [7, 3],
            "latents_centre": [3, 6],
            "latents_unit": [3, 6],
        }


def test_a_manifest_that_names_another_dtype_is_refused(tmp_path: Path) -> None:
    """Numbers in 8 bits would pass for latents."""
    write(tmp_path, replace(INFO, dtype="int8"))
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"int8"', '"bfloat16"'))
    with pytest.raises(ArtifactError, match="holds latents in I8, and the manifest speaks of bfloat16"):
        LatentsFolder(tmp_path)


def test_the_format_version_before_eight_bits_is_still_read(tmp_path: Path) -> None:
    write(tmp_path)
    for name in ("stage.json", "manifest.json"):
        text = (tmp_path / name).read_text()
        assert '"format_version": 2' in text
        (tmp_path / name).write_text(text.replace('"format_version": 2', '"format_version": 1'))
    assert LatentsFolder(tmp_path).info == INFO
    for name in ("stage.json", "manifest.json"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace('"format_version": 1', '"format_version": 3'))
    with pytest.raises(ArtifactError, match="format version 3"):
        LatentsFolder(tmp_path)


def test_bytes_by_hand() -> None:
    # 10 tokens of 3 × 8 numbers of 2 bytes, and 10 ids of 4 bytes.
    assert latents_bytes(10, 3, 8, "bfloat16") == 480 + 40
    assert latents_bytes(10, 3, 8, "float32") == 960 + 40
    # Of each of two shards also 3 × 8 centres and units, of each token 3 scales.
    assert latents_bytes(10, 3, 8, "int8", num_shards=2) == 10 * 3 * (8 + 4) + 2 * 3 * 8 * 8 + 40


def test_bytes_on_disk_are_near_the_estimate(tmp_path: Path) -> None:
    size = (write(tmp_path) / "shards" / "00001.safetensors").stat().st_size
    assert 0 < size - latents_bytes(5, 3, 6, "bfloat16") < 600
