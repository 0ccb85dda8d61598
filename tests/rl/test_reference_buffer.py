"""The buffer of accepted responses: the newest stay, and a checkpoint gives the same ones back."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from rlfr_cli.policy.forward import TokenSequence
from rlfr_cli.rl.reference_buffer import KeptResponse, ReferenceBuffer

A, B, C = TokenSequence((1, 2), (3,)), TokenSequence((4,), (5, 6, 7)), TokenSequence((8, 9), (10, 11))


def test_the_newest_of_positive_weight_are_kept() -> None:
    buffer = ReferenceBuffer(2)
    buffer.add([A, B], [1.0, 0.0])
    assert [entry.sequence for entry in buffer.kept] == [A]
    buffer.add([B, C], [0.5, 2.0])
    assert list(buffer.kept) == [KeptResponse(B, 0.5), KeptResponse(C, 2.0)]


def test_a_buffer_of_nothing_keeps_nothing() -> None:
    buffer = ReferenceBuffer(0)
    buffer.add([A], [1.0])
    assert len(buffer) == 0


def test_the_buffer_survives_its_file(tmp_path: Path) -> None:
    buffer, again = ReferenceBuffer(3), ReferenceBuffer(3)
    buffer.add([A, B, C], [1.0, 0.1, 3.0])
    save_file(buffer.tensors(), tmp_path / "b.safetensors")
    again.load(load_file(tmp_path / "b.safetensors"))
    assert list(again.kept) == list(buffer.kept)
    again.load(ReferenceBuffer(3).tensors())
    assert len(again) == 0
