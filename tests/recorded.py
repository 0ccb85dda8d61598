"""Reading the recorded vectors of the published implementation, for the tests of `flow/` and `rl/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from rlfr_cli.flow.published import from_published
from rlfr_cli.flow.velocity import VelocityNetwork


def load_recorded(shared: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    folder = shared / "conformance"
    return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())


def recorded_network(tensors: dict[str, Tensor]) -> VelocityNetwork:
    """The recorded weights in our network; every family was recorded with an RMS epsilon of 1e-6."""
    published = {key.removeprefix("sd/"): value for key, value in tensors.items() if key.startswith("sd/")}
    sizes, state = from_published(published, rms_epsilon=1e-6)
    network = VelocityNetwork(sizes)
    network.load_state_dict(state)
    return network


def assert_matches(ours: Tensor, recorded: Tensor, relative: float = 1e-5) -> None:
    """|ours - recorded| <= relative * (|recorded| + mean |recorded|)."""
    assert ours.shape == recorded.shape, (ours.shape, recorded.shape)
    allowed = relative * (recorded.abs() + recorded.abs().mean())
    worst = ((ours - recorded).abs() - allowed).max()
    assert worst <= 0, f"off by {float((ours - recorded).abs().max()):.3e}"
