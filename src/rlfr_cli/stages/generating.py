"""The generation engine of a training run: its weights are the trainer's, and that is checked.

With the hf engine the trainer's own model draws, and there is nothing to send. Any other engine is sent the weights
before it draws whenever they have changed, and at the start of a resumed run, whose engine came up with the weights of
``--model``. After each transfer a few tokens are scored by both: an engine with stale or wrong weights stops the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from rlfr_cli.config.rl import CorrectionConfig
from rlfr_cli.engines.generation import GenerationEngine
from rlfr_cli.engines.hf import HfEngine
from rlfr_cli.engines.training import TrainingEngine
from rlfr_cli.errors import WorkError
from rlfr_cli.policy.forward import TokenSequence, response_logprobs
from rlfr_cli.rl.correction import CorrectionOptions, check_engine

NUM_PROBES, PROBE_TOKENS = 4, 64


class EngineOfRun:
    """A generation engine beside a trainer.

    Args:
        engine: as it was opened.
        training: trains the policy; with several processes each has a generation engine of its own.
        config: what is done about the gap between both.
        prompts: of the first problems; scored at the first check.
        stale: the engine was opened with other weights than the policy has.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        training: TrainingEngine,
        config: CorrectionConfig,
        prompts: Sequence[Sequence[int]],
        *,
        stale: bool,
    ) -> None:
        self.engine, self.training, self.config = engine, training, config
        self.shares_weights = isinstance(engine, HfEngine)
        self.stale = stale
        self._probes = [_halves(prompt) for prompt in prompts[:NUM_PROBES] if len(prompt) > 1]
        self._before: list[torch.Tensor] | None = None
        self._checked = False

    @property
    def correction(self) -> CorrectionOptions | None:
        """What the loss does about the gap; None where there is none."""
        if self.shares_weights:
            return None
        return CorrectionOptions(correction=self.config.correction, level=self.config.level, cap=self.config.cap)

    def changed(self, probes: Sequence[TokenSequence]) -> None:
        """The trainer is about to change its weights; the next check is on these responses."""
        if self.shares_weights:
            return
        self._probes = [TokenSequence(s.prompt, s.response[:PROBE_TOKENS]) for s in probes[:NUM_PROBES]]
        with self.training.whole_policy():
            self._before = self._trainer_logprobs()
        self.stale = True

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Awake, with the trainer's weights, for as long as it draws.

        Raises:
            WorkError: the engine did not take them.
        """
        if self.shares_weights:
            with self.training.whole_policy():
                yield
            return
        self.engine.wake()
        try:
            self.take_weights()
            yield
        finally:
            self.engine.sleep()

    def take_weights(self) -> None:
        """Send the trainer's weights, if they have changed, and check that they are there; the engine is awake.

        Raises:
            WorkError: the engine did not take them.
        """
        if self.stale:
            self.engine.load_weights(self.training.named_weights())
        if self.stale or not self._checked:
            self._check()

    def check_gap(self, kl_to_trainer: float) -> None:
        """Check the mean KL of a rollout batch in nats.

        Raises:
            WorkError: it is beyond ``--engine-tolerance``.
        """
        if not self.shares_weights and not kl_to_trainer <= self.config.tolerance:
            raise WorkError(
                f"engine and trainer give the drawn tokens other probabilities: KL {kl_to_trainer:.3g} nats in the "
                f"mean, --engine-tolerance {self.config.tolerance}",
                hint="the engine's weights or arithmetic are not the trainer's; try another --dtype, or --engine hf",
            )

    def _check(self) -> None:
        with self.training.whole_policy():
            now = self._trainer_logprobs()
        if self._probes:
            check_engine(self.engine.logprobs_of(self._probes), now, self._before, self.config.tolerance)
        self.stale, self._checked = False, True

    @torch.no_grad()
    def _trainer_logprobs(self) -> list[torch.Tensor]:
        """Log-probabilities at temperature 1, as engines score given tokens."""
        if not self._probes:
            return []
        packed_K, _ = response_logprobs(self.training.policy, self._probes, 1.0)
        return [part.cpu() for part in packed_K.split([len(s.response) for s in self._probes])]


def _halves(prompt: Sequence[int]) -> TokenSequence:
    """A prompt as one half read and one half scored."""
    middle = len(prompt) // 2
    return TokenSequence(tuple(prompt[:middle]), tuple(prompt[middle:][:PROBE_TOKENS]))
