"""A published ``flow_model.bin`` on disk: imported with the recorded numbers, given back bit for bit, refused else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from recorded import assert_matches, load_recorded
from rlfr_cli.artifacts.flow_file import FlowHeader, read_flow, read_flow_header, save_flow
from rlfr_cli.errors import ArtifactError, MismatchError, MissingInputError
from rlfr_cli.flow.published import FREQUENCY_KEYS, from_published, to_published
from rlfr_cli.flow.velocity import VelocityNetwork
from rlfr_cli.stages.flows import load_flow, sizes_of
from rlfr_cli.stages.importing import import_published

CPU = torch.device("cpu")
NAMES = ["d32_L2_n40_s11", "d56_L3_n57_s13", "d64_L4_n96_s12", "bf16_d64_L4_n64_s14"]
SQUARE = ["d32_L2_n40_s11", "d64_L4_n96_s12", "bf16_d64_L4_n64_s14"]  # target and condition of one size


def published_of(shared: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The recorded tensors, and the state dict among them as the published code saves it."""
    recorded, _ = load_recorded(shared, f"01_velocity_{name}")
    return recorded, {key.removeprefix("sd/"): value for key, value in recorded.items() if key.startswith("sd/")}


def header_for(hidden_size: int) -> FlowHeader:
    """What options and latents say; sizes of the network are other ones than those of the file."""
    return FlowHeader(
        latent_size=hidden_size,
        condition_size=hidden_size,
        width=7,
        depth=9,
        num_frequencies=256,
        rms_epsilon=1e-6,
        time_scale=1.0,
        layer_indices=(7, 14),
        num_blocks=28,
        pairings=({"context": "next", "shift": 1},),
    )


@pytest.mark.parametrize("name", SQUARE)
def test_an_imported_file_has_the_recorded_velocity_also_after_our_own_file(
    shared: Path, tmp_path: Path, name: str
) -> None:
    recorded, state = published_of(shared, name)
    torch.save(state, tmp_path / "flow_model.bin")
    header, flow = import_published(tmp_path / "flow_model.bin", header_for(recorded["x"].shape[1]), CPU)
    assert (header.depth, header.width) == (int(name.partition("_L")[2][0]), recorded["x"].shape[1])
    assert (header.layer_indices, header.num_blocks) == ((7, 14), 28)
    save_flow(tmp_path / "flow.safetensors", header, flow.network.state_dict())
    _, loaded = load_flow(tmp_path / "flow.safetensors", CPU)
    assert all(p.dtype == torch.float32 for p in loaded.network.parameters())
    inputs = [recorded[key].float() for key in ("x", "t", "cond", "layer")]
    with torch.no_grad():
        velocity = loaded.network(*inputs)
    wanted = recorded["velocity"].float()
    if name.startswith("bf16"):
        assert (velocity - wanted).abs().max() <= 2e-2 * wanted.abs().max()
    else:
        assert_matches(velocity, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_published_state_comes_back_bit_for_bit(shared: Path, name: str) -> None:
    """Frequencies alone are derived anew: those of a bfloat16 file were rounded."""
    _, state = published_of(shared, name)
    sizes, ours = from_published(state, rms_epsilon=1e-6)
    network = VelocityNetwork(sizes)
    network.load_state_dict({key: value.float() for key, value in ours.items()}, strict=True)
    again = to_published(network.state_dict(), sizes)
    assert again.keys() == state.keys()
    for key, value in state.items():
        assert again[key].shape == value.shape
        if key in FREQUENCY_KEYS:
            torch.testing.assert_close(again[key], value.float(), rtol=4e-3 if "bf16" in name else 1e-6, atol=0)
        else:
            assert torch.equal(again[key].to(value.dtype), value)
            assert torch.equal(again[key], value.float())


def test_a_file_written_from_our_flow_is_the_published_one(shared: Path, tmp_path: Path) -> None:
    """Imported, kept in our file, published again, and imported once more: the same bits each time."""
    recorded, state = published_of(shared, SQUARE[0])
    torch.save(state, tmp_path / "first.bin")
    header, flow = import_published(tmp_path / "first.bin", header_for(recorded["x"].shape[1]), CPU)
    save_flow(tmp_path / "flow.safetensors", header, flow.network.state_dict())
    kept, tensors = read_flow(tmp_path / "flow.safetensors")
    torch.save(to_published(tensors, sizes_of(kept)), tmp_path / "second.bin")
    again, same = import_published(tmp_path / "second.bin", header_for(recorded["x"].shape[1]), CPU)
    assert again == header == read_flow_header(tmp_path / "flow.safetensors")
    for name, value in flow.network.state_dict().items():
        assert torch.equal(same.network.state_dict()[name], value)


def test_latents_of_another_size_are_refused_with_both_numbers(shared: Path, tmp_path: Path) -> None:
    _, state = published_of(shared, SQUARE[0])
    torch.save(state, tmp_path / "flow_model.bin")
    with pytest.raises(MismatchError, match="latents of size 32; this model's have 64") as refused:
        import_published(tmp_path / "flow_model.bin", header_for(64), CPU)
    assert refused.value.hint


def test_what_is_no_flow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no such file"):
        import_published(tmp_path / "gone.bin", header_for(32), CPU)
    torch.save({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model.bin")
    with pytest.raises(MismatchError, match=r"no tensor model\.input_proj\.weight") as refused:
        import_published(tmp_path / "model.bin", header_for(32), CPU)
    assert "flow_model.bin" in str(refused.value.hint)
    torch.save({"weights": [1, 2]}, tmp_path / "list.bin")
    with pytest.raises(ArtifactError, match="dict of tensors"):
        import_published(tmp_path / "list.bin", header_for(32), CPU)
