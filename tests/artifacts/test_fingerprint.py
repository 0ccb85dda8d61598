"""Fingerprints are of content, whatever the paths and files it is spread over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlfr_cli.artifacts import fingerprint
from rlfr_cli.artifacts.fingerprint import ModelFingerprint, file_fingerprint, model_fingerprint
from rlfr_cli.errors import ArtifactError, InputError, MissingInputError

CONFIG = {"model_type": "tiny", "num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 11}


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weights() -> dict[str, torch.Tensor]:
    return {"b.weight": torch.arange(6.0).reshape(2, 3), "a.weight": torch.ones(4, dtype=torch.bfloat16)}


def write_model(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] = CONFIG) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_architecture_is_read_from_the_config(tmp_path: Path) -> None:
    found = model_fingerprint(write_model(tmp_path / "m", weights()))
    assert (found.model_type, found.num_blocks, found.hidden_size, found.vocab_size) == ("tiny", 2, 8, 11)
    assert ModelFingerprint.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_other_names_and_nested_text_config(tmp_path: Path) -> None:
    gpt2 = {"model_type": "gpt2", "n_layer": 3, "n_embd": 16, "vocab_size": 5}
    assert model_fingerprint(write_model(tmp_path / "g", weights(), gpt2)).num_blocks == 3
    nested = {"model_type": "outer", "hidden_size": 999, "text_config": CONFIG}
    found = model_fingerprint(write_model(tmp_path / "n", weights(), nested))
    assert (found.model_type, found.hidden_size) == ("tiny", 8)


def test_sharding_makes_no_difference(tmp_path: Path) -> None:
    whole = model_fingerprint(write_model(tmp_path / "whole", weights()))
    sharded = write_model(tmp_path / "sharded", weights())
    (sharded / "model.safetensors").unlink()
    names = {"b.weight": "model-00001.safetensors", "a.weight": "model-00002.safetensors"}
    for name, file in names.items():
        save_file({name: weights()[name]}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert model_fingerprint(sharded) == whole
    (sharded / "model-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"not whole.*model-00002"):
        model_fingerprint(sharded)


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype"])
def test_any_change_of_weights_shows(tmp_path: Path, change: str) -> None:
    tensors = weights()
    if change == "value":
        tensors["b.weight"][1, 2] = -tensors["b.weight"][1, 2]
    elif change == "name":
        tensors["c.weight"] = tensors.pop("b.weight")
    elif change == "shape":
        tensors["b.weight"] = tensors["b.weight"].reshape(3, 2)
    else:
        tensors["a.weight"] = tensors["a.weight"].view(torch.float16)
    before = model_fingerprint(write_model(tmp_path / "before", weights()))
    after = model_fingerprint(write_model(tmp_path / "after", tensors))
    assert before.weights_sha256 != after.weights_sha256
    assert before.same_architecture(after)


def test_digest_is_cached_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "m", weights())
    first = model_fingerprint(folder)
    calls = []
    original = fingerprint.weights_sha256
    monkeypatch.setattr(fingerprint, "weights_sha256", lambda files: calls.append(1) or original(files))
    assert model_fingerprint(folder) == first
    assert calls == []
    save_file({name: tensor + 1 for name, tensor in weights().items()}, folder / "model.safetensors")
    assert model_fingerprint(folder) != first
    assert calls == [1]


def test_a_cache_that_cannot_be_written_or_read_is_no_error(tmp_path: Path, cache_home: Path) -> None:
    folder = write_model(tmp_path / "m", weights())
    cache_home.write_text("a file where the folder would be")
    first = model_fingerprint(folder)
    cache_home.unlink()
    assert model_fingerprint(folder) == first
    for entry in (cache_home / "rlfr" / "fingerprints").iterdir():
        entry.write_text("{")
    assert model_fingerprint(folder) == first


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="does not exist"):
        model_fingerprint(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config\.json") as caught:
        model_fingerprint(tmp_path / "empty")
    assert caught.value.hint
    folder = write_model(tmp_path / "pickled", weights())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin can run code") as caught:
        model_fingerprint(folder)
    assert "save_pretrained" in str(caught.value.hint)


def test_a_cut_weight_file_is_said(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", weights())
    file = folder / "model.safetensors"
    for data in (file.read_bytes()[:-1], file.read_bytes()[:20], b""):
        file.write_bytes(data)
        with pytest.raises(InputError, match=r"model\.safetensors is cut"):
            model_fingerprint(folder)


def test_an_incomplete_fingerprint_is_refused() -> None:
    with pytest.raises(ArtifactError, match="not a model fingerprint"):
        ModelFingerprint.from_dict({"model_type": "tiny"})


def test_file_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    # The published test vector of SHA-256.
    assert file_fingerprint(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")
    with pytest.raises(MissingInputError):
        file_fingerprint(tmp_path / "gone")
