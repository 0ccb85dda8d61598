"""The flow file: round trip, digest, and whether it fits a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlfr_cli.artifacts.fingerprint import ModelFingerprint
from rlfr_cli.artifacts.flow_file import (
    FlowHeader,
    check_flow_fits,
    flow_fingerprint,
    read_flow,
    read_flow_header,
    save_flow,
)
from rlfr_cli.errors import ArtifactError, MismatchError, MissingInputError

MODEL = ModelFingerprint(model_type="qwen2", num_blocks=24, hidden_size=8, vocab_size=9, weights_sha256="ab" * 32)
HEADER = FlowHeader(
    latent_size=8,
    condition_size=8,
    width=16,
    depth=2,
    num_frequencies=256,
    rms_epsilon=1e-6,
    time_scale=1.0,
    layer_indices=(6, 12, 18),
    num_blocks=24,
    pairings=({"context": "next", "shift": 1}, {"context": "previous", "shift": 2}),
    model=MODEL,
    steps=100,
    tokens_seen=12345,
    train_loss=0.5,
    heldout_loss=0.75,
)


def tensors() -> dict[str, torch.Tensor]:
    return {
        "input.weight": torch.arange(6.0).reshape(2, 3),
        "scale": torch.tensor(2.0),
        "output.bias": torch.ones(3, dtype=torch.bfloat16),
    }


def test_round_trip(tmp_path: Path) -> None:
    save_flow(tmp_path / "flow.safetensors", HEADER, tensors())
    header, read = read_flow(tmp_path / "flow.safetensors")
    assert header == HEADER == read_flow_header(tmp_path / "flow.safetensors")
    assert read.keys() == tensors().keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors().items())
    assert read["output.bias"].dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["flow.safetensors"]


def test_equal_flows_give_equal_bytes_and_fingerprints(tmp_path: Path) -> None:
    save_flow(tmp_path / "a", HEADER, tensors())
    save_flow(tmp_path / "b", HEADER, dict(reversed(tensors().items())))
    save_flow(tmp_path / "c", HEADER, tensors() | {"scale": torch.tensor(-2.0)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert flow_fingerprint(tmp_path / "a") == flow_fingerprint(tmp_path / "b")
    assert flow_fingerprint(tmp_path / "a") != flow_fingerprint(tmp_path / "c")


def test_a_fingerprint_is_of_what_a_flow_computes(tmp_path: Path) -> None:
    """Equal weights with another context give other scores; what was counted while fitting changes none."""
    changes = [{}, {"context_layer": "final-norm"}, {"context_layer": "20"}, {"layer_indices": (6, 12, 19)}]
    changes += [{"pairings": ({"context": "previous", "shift": 1},)}, {"time_scale": 2.0}]
    for number, change in enumerate(changes):
        save_flow(tmp_path / str(number), replace(HEADER, **change), tensors())
    assert len({flow_fingerprint(tmp_path / str(number)) for number in range(len(changes))}) == len(changes)
    save_flow(tmp_path / "more", replace(HEADER, steps=101, heldout_loss=0.5, policy_step=3, model=None), tensors())
    assert flow_fingerprint(tmp_path / "more") == flow_fingerprint(tmp_path / "0")


def test_contexts_in_words_and_states_in_columns() -> None:
    assert HEADER.contexts == ["next 1", "previous 2"]
    assert HEADER.tapped == (6, 12, 18)
    final, above, among = (replace(HEADER, context_layer=name) for name in ("final-norm", "20", "12"))
    assert final.contexts == ["next 1 of final-norm", "previous 2 of final-norm"]
    assert final.tapped == (6, 12, 18, "final-norm")
    assert (above.contexts[0], above.tapped) == ("next 1 of block 20", (6, 12, 18, 20))
    assert (among.contexts[0], among.tapped) == ("next 1 of block 12", (6, 12, 18))


def test_statistics_go_with_channel_normalisation(tmp_path: Path) -> None:
    channel = replace(HEADER, normalisation="channel")
    statistics = {"statistics.mean": torch.zeros(3, 8), "statistics.std": torch.ones(3, 8)}
    save_flow(tmp_path / "flow", channel, tensors() | statistics)
    assert torch.equal(read_flow(tmp_path / "flow")[1]["statistics.std"], torch.ones(3, 8))
    with pytest.raises(AssertionError):
        save_flow(tmp_path / "flow", channel, tensors())
    with pytest.raises(AssertionError):
        save_flow(tmp_path / "flow", HEADER, tensors() | statistics)
    save_flow(tmp_path / "flow", channel, tensors() | statistics | {"statistics.std": torch.ones(3, 7)})
    with pytest.raises(ArtifactError, match=r"statistics\.std has shape \[3, 7\]"):
        read_flow_header(tmp_path / "flow")


def test_a_cut_or_altered_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "flow.safetensors"
    save_flow(path, HEADER, tensors())
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:100], b""):
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=r"flow\.safetensors is cut"):
            read_flow(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    read_flow_header(path)
    with pytest.raises(ArtifactError, match=r"flow\.safetensors is altered: SHA-256"):
        read_flow(path)


def test_what_is_no_flow_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="does not exist"):
        read_flow_header(tmp_path / "gone.safetensors")
    save_file(tensors(), tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="not a flow file of rlfr") as caught:
        read_flow_header(tmp_path / "model.safetensors")
    assert "fit-flow" in str(caught.value.hint)


def test_another_format_version_or_key_is_refused(tmp_path: Path) -> None:
    save_flow(tmp_path / "flow", replace(HEADER, format_version=2), tensors())
    with pytest.raises(ArtifactError, match="has format version 2; this version of rlfr reads version 1"):
        read_flow_header(tmp_path / "flow")
    values = HEADER.to_dict()
    values["hidden"] = values.pop("width")
    with pytest.raises(ArtifactError, match=r"lacks \['width'\] and has the unknown \['hidden'\]"):
        FlowHeader.from_dict(values)


def test_the_model_it_was_fitted_on_fits() -> None:
    assert check_flow_fits(HEADER, model=MODEL, other_weights="error") == []


def test_another_architecture_is_an_error_naming_both() -> None:
    other = replace(MODEL, num_blocks=28)
    with pytest.raises(MismatchError, match=r"qwen2, 24 blocks.*qwen2, 28 blocks") as caught:
        check_flow_fits(HEADER, model=other, allow_other_weights=True)
    assert caught.value.hint


def test_other_weights_are_a_warning_or_an_error() -> None:
    other = replace(MODEL, weights_sha256="cd" * 32)
    (warning,) = check_flow_fits(HEADER, model=other)
    assert "abababab" in warning
    assert "cdcdcdcd" in warning
    with pytest.raises(MismatchError, match="other weights") as caught:
        check_flow_fits(HEADER, model=other, other_weights="error")
    assert "--allow-other-weights" in str(caught.value.hint)
    assert check_flow_fits(HEADER, model=other, allow_other_weights=True, other_weights="error") == [warning]


def test_an_imported_flow_is_held_against_the_sizes() -> None:
    imported = replace(HEADER, model=None)
    assert "imported" in check_flow_fits(imported, model=MODEL)[0]
    with pytest.raises(MismatchError, match="24 blocks and hidden size 8, and this model has 24 and 9"):
        check_flow_fits(imported, model=replace(MODEL, hidden_size=9))
