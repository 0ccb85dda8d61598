"""An engine with weights of its own, as vLLM is one, for tests without vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from rlfr_cli.engines.hf import HfEngine
from rlfr_cli.policy.loading import Policy


class CopyingEngine:
    """Draws with a model of its own, which has the trainer's weights when it was sent them.

    Attributes:
        calls: names of the methods that were called, in order.
        drawing: a batch is being drawn.
    """

    name = "copy"

    def __init__(self, policy: Policy) -> None:
        self._engine, self.policy = HfEngine(policy), policy
        self.calls: list[str] = []
        self.drawing = False

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        assert not self.drawing
        self.calls.append("load")
        mine = dict(self.policy.model.named_parameters())
        with torch.no_grad():
            for name, tensor in weights:
                mine[name].copy_(tensor)

    def generate(self, *given: Any, **options: Any) -> Any:
        assert not self.drawing
        self.calls.append("generate")
        self.drawing = True
        drawn = self._engine.generate(*given, **options)
        self.drawing = False
        return drawn

    def logprobs_of(self, sequences: Any) -> Any:
        assert not self.drawing
        self.calls.append("check")
        return self._engine.logprobs_of(sequences)

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self) -> None:
        self.calls.append("wake")

    def close(self) -> None:
        self.calls.append("close")
