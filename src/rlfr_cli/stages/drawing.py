"""The rollout batches of a run: which problems come when, and when they are drawn.

A batch is drawn in the step that trains on it or, with ``--overlap``, while the step before it trains: the engine then
takes the weights as that step finds them, and its responses are one step old when they are trained on. The trainer's
log-probabilities are taken before the first optimiser step as ever, so that age is part of the gap between engine and
trainer, which ``--engine-correction`` accounts for (``rl/correction.py``).
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlfr_cli.artifacts.rollouts import RolloutRow
from rlfr_cli.engines.ranks import Ranks
from rlfr_cli.flow.noise import Key
from rlfr_cli.ordering import shuffled_range
from rlfr_cli.rl.rollouts import Responder
from rlfr_cli.rl.rounds import draw_until_varied
from rlfr_cli.stages.common import sampling_of
from rlfr_cli.stages.generating import EngineOfRun

if TYPE_CHECKING:
    from rlfr_cli.stages.train_rl import Plan


@dataclass(frozen=True)
class Drawn:
    """A rollout batch.

    Attributes:
        rows: this rank's, graded.
        rounds: of dynamic sampling; 1 without.
        problems_drawn: by the run in all, this batch included.
        age: steps of the run, 0 or 1, by which the policy that it trains is ahead of the one that drew it.
    """

    rows: list[RolloutRow]
    rounds: int
    problems_drawn: int
    age: int


class Drawing:
    """Draws a run's rollout batches, in order.

    Args:
        plan: what `train-rl` has checked.
        responder: draws and grades.
        generator: the engine behind it, and its weights.
        ranks: the processes, each of which draws its share of a batch.
    """

    def __init__(self, plan: Plan, responder: Responder, generator: EngineOfRun, ranks: Ranks) -> None:
        self.plan, self.config = plan, plan.config
        self.responder, self.generator, self.ranks = responder, generator, ranks
        self.problems_drawn = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rlfr-drawing")
        self._ahead: Future[Drawn] | None = None

    def batch(self, step: int) -> Drawn:
        """The batch of a step; with --overlap the next one is begun.

        Raises:
            WorkError: the engine failed, or did not take the trainer's weights.
        """
        if self._ahead is not None:
            drawn = self._ahead.result()
            self._ahead = None
        else:
            with self.generator.ready():
                drawn = self._draw(step, self.problems_drawn, age=0)
        self.problems_drawn = drawn.problems_drawn
        if self.config.separation.overlap and step < self.plan.total_steps:
            self.generator.take_weights()
            self._ahead = self._thread.submit(self._draw, step + 1, self.problems_drawn, age=1)
        return drawn

    def wait(self) -> None:
        """Until nothing is being drawn: the engine may be given weights, or other work."""
        if self._ahead is not None:
            wait([self._ahead])

    def close(self) -> None:
        """End the engine, what it was drawing, and the graders."""
        self.responder.engine.close()  # first: a batch that nobody wants ends with an error, which nobody sees
        self._thread.shutdown()
        self.responder.pool.close()

    def rank_key(self) -> tuple[Key, ...]:
        """Keeps ranks apart in the hf engine, which has one generator a call; vLLM has one a response."""
        return () if self.ranks.alone or not self.generator.shares_weights else ("rank", self.ranks.rank)

    def _draw(self, step: int, start: int, *, age: int) -> Drawn:
        """The batch of a step whose problems begin at ``start`` in the order of the run."""
        rollout = self.config.rollout
        seen: Counter[int] = Counter()
        drawn = start

        def draw(count: int, round_number: int) -> list[RolloutRow]:
            nonlocal drawn
            prompted = self.plan.problems.prompted
            chosen = shuffled_range(len(prompted), drawn, drawn + count, self.config.seed, "problem order")
            drawn += count
            # A problem that comes again within a step draws further samples, under further names.
            first = []
            for index in chosen:
                first.append(seen[index] * rollout.group_size)
                seen[index] += 1
            return self.responder.respond(
                [prompted[index] for index in self.ranks.share(chosen)],
                rollout.group_size,
                sampling_of(self.config.sampling),
                key=(self.config.seed, "rollouts", step, *([round_number] if round_number else []), *self.rank_key()),
                first_samples=self.ranks.share(first),
            )

        if not rollout.dynamic_sampling:
            return Drawn(draw(rollout.prompts_per_step, 0), 1, drawn, age)
        rows, rounds = draw_until_varied(
            draw,
            wanted=rollout.prompts_per_step,
            group_size=rollout.group_size,
            max_rounds=rollout.max_sampling_rounds,
            total=lambda count: int(self.ranks.sum(torch.tensor(count))),
        )
        return Drawn(rows, rounds, drawn, age)
