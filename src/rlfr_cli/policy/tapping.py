"""Tap latents: the output of a decoder block, taken by a hook on the block, before any final norm.

The final normed state, which may condition a flow, is the output of the whole decoder: what the output head reads. A
model's ``hidden_states`` are normed at the end of a truncated model, so they are never used. Only the rows asked for
are kept. Shapes: B rows, S positions, N kept tokens, J tapped states, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rlfr_cli.errors import ConfigError, InputError
from rlfr_cli.states import FINAL_NORM, State


def tapped_layers(num_blocks: int, fractions: Sequence[float], indices: Sequence[int] = ()) -> tuple[int, ...]:
    """Block indices of ``--layer-fraction`` or ``--layer-index``.

    Index = Python's round(fraction × blocks), halves to even, at most blocks − 1, as in the published code.

    Raises:
        ConfigError: an index outside the model, or the same block twice.
    """
    layers = tuple(indices) or tuple(min(round(fraction * num_blocks), num_blocks - 1) for fraction in fractions)
    for index in layers:
        if not 0 <= index < num_blocks:
            raise ConfigError(f"--layer-index {index}: this model has blocks 0 to {num_blocks - 1}")
    if len(set(layers)) != len(layers):
        raise ConfigError(
            f"the tapped layers {list(layers)} name a block twice: this model has {num_blocks} blocks",
            hint="name different blocks with --layer-index",
        )
    return layers


def decoder_blocks(decoder: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks: the outermost module list as long as the config's number of blocks."""
    config: Any = decoder.config
    num_blocks = config.get_text_config().num_hidden_layers
    found = [
        (name.count("."), name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks
    ]
    if not found:
        raise InputError(f"no list of {num_blocks} decoder blocks in {type(decoder).__name__}")
    return min(found, key=lambda entry: entry[:2])[2]


def block_output(output: Any) -> torch.Tensor:
    """Hidden states [B, S, D] of a block's or decoder's output: a tensor, or the first entry of what holds more.

    Blocks of transformers 5 return a tensor, those of earlier versions a tuple, and decoders a ``ModelOutput``.
    """
    return output if isinstance(output, torch.Tensor) else output[0]


class Taps:
    """What the hooks of one forward pass have kept; ``latents`` stacks it as [N, J, D]."""

    def __init__(self, tapped: Sequence[State]) -> None:
        self.tapped = tuple(tapped)
        self.rows_N: torch.Tensor | None = None
        self._kept: dict[State, torch.Tensor] = {}

    def keep(self, state: State, hidden_BSD: torch.Tensor) -> None:
        assert self.rows_N is not None, "select() comes before the forward pass"
        self._kept[state] = hidden_BSD.detach().reshape(-1, hidden_BSD.shape[-1])[self.rows_N]

    def select(self, rows_N: torch.Tensor) -> None:
        """Name the rows of the flattened [B × S] positions that the next forward pass keeps."""
        self.rows_N = rows_N
        self._kept = {}

    def latents(self) -> torch.Tensor:
        """Latents [N, J, D] of the last forward pass, states in the order asked for."""
        assert len(self._kept) == len(self.tapped), "a tapped block did not run"
        return torch.stack([self._kept[state] for state in self.tapped], dim=1)


@contextmanager
def tap(decoder: nn.Module, tapped: Sequence[State]) -> Iterator[Taps]:
    """Hook the named blocks, and for the final normed state the decoder; the hooks leave with the block of code.

    Raises:
        ValueError: the final normed state of a decoder that ``load_decoder`` has truncated: it would be another one.
    """
    left_out = getattr(decoder, "blocks_left_out", 0)
    if FINAL_NORM in tapped and left_out:
        raise ValueError(f"{FINAL_NORM} was asked of a decoder without the last {left_out} of its blocks")
    blocks = decoder_blocks(decoder)
    taps = Taps(tapped)

    def hook_of(state: State) -> Any:
        return lambda _module, _inputs, output: taps.keep(state, block_output(output))

    modules = {state: blocks[state] if isinstance(state, int) else decoder for state in tapped}
    handles = [module.register_forward_hook(hook_of(state)) for state, module in modules.items()]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()
