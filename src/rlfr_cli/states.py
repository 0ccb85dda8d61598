"""The states of a decoder that latents are taken from, and their names.

A state is a decoder block's output, named by the block's index, or the final normed state, which the output head
reads. Latents hold the targets' blocks first, and behind them the states that only serve as conditions. Standard
library only, so that configs can use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlfr_cli.errors import ConfigError

FINAL_NORM = "final-norm"
State = int | str  # the index of a block, or FINAL_NORM


def parse_state(name: str) -> State:
    """The state that ``--context-layer`` names: ``20``, or ``final-norm``.

    Raises:
        ConfigError: neither the index of a block nor ``final-norm``.
    """
    if name == FINAL_NORM:
        return FINAL_NORM
    if not (name.isascii() and name.isdigit()):
        raise ConfigError(f"--context-layer must be the index of a decoder block, or {FINAL_NORM}, got {name!r}")
    return int(name)


def state_of_model(name: str, num_blocks: int) -> State:
    """The same for a model of so many blocks.

    Raises:
        ConfigError: the model has no such block.
    """
    state = parse_state(name)
    if isinstance(state, int) and state >= num_blocks:
        raise ConfigError(f"--context-layer {name}: this model has blocks 0 to {num_blocks - 1}, and {FINAL_NORM}")
    return state


def states_in_order(layer_indices: Sequence[int], context: Iterable[State]) -> tuple[State, ...]:
    """States in the order of the layer axis: the targets' blocks, then those of the context that are not among them."""
    return tuple(dict.fromkeys((*layer_indices, *context)))


def blocks_needed(states: Iterable[State], num_blocks: int) -> int:
    """How many of a model's blocks must run, from the first on, to give these states."""
    return max(num_blocks if isinstance(state, str) else state + 1 for state in states)


def state_text(state: State) -> str:
    """``block 20``, or ``final-norm``."""
    return FINAL_NORM if state == FINAL_NORM else f"block {state}"
