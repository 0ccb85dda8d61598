"""The protocol of generation engines: prompts in, responses with log-probabilities out.

An engine never makes token ids again from text. Log-probabilities are of softmax(logits / temperature), before top-p
and top-k, in float32; at temperature 0 of softmax(logits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rlfr_cli.flow.noise import Key
from rlfr_cli.policy.forward import TokenSequence


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn; see ``config.common.SamplingConfig``."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class GenerationRequest:
    """One response to draw."""

    prompt_token_ids: tuple[int, ...]
    problem_id: str
    sample_index: int


@dataclass(frozen=True)
class Generation:
    """One response as drawn.

    Attributes:
        token_ids: response tokens; ends with the end token when ``finish_reason`` is ``stop``.
        logprobs: one for each token.
        text: the engine's text, without special tokens.
        finish_reason: ``stop`` or ``length``.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str


class GenerationEngine(Protocol):
    """Machinery that draws responses."""

    name: str

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        *,
        key: tuple[Key, ...],
        on_finished: Callable[[int, int], None] = lambda responses, tokens: None,
    ) -> list[Generation]:
        """Draw every request, in order.

        Args:
            key: names this unit of work; its random numbers come from a generator keyed by it.
            on_finished: told how many responses and tokens have just been finished.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the trainer's weights. Engines that share the trainer's model have nothing to do."""
        ...

    def logprobs_of(self, sequences: Sequence[TokenSequence]) -> list[torch.Tensor]:
        """Log-probabilities [T] of given response tokens at temperature 1, float32."""
        ...

    def sleep(self) -> None:
        """Give memory back until ``wake``, where the engine can."""
        ...

    def wake(self) -> None:
        """Take memory again after ``sleep``."""
        ...

    def close(self) -> None:
        """Give back what the engine holds."""
        ...
