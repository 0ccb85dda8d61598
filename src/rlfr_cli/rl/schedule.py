"""The course of a learning rate: a linear warm-up, then cosine, linear or constant to a share of the highest."""

from __future__ import annotations

import math

from rlfr_cli.config.schedules import Schedule


def learning_rate_at(
    step: float,
    total_steps: int,
    highest: float,
    *,
    warmup_fraction: float,
    schedule: Schedule,
    final_fraction: float,
) -> float:
    """Learning rate of optimiser step ``step``, from 0; a rollout batch of another size has steps between.

    The warm-up ends at the highest rate; the last step has ``final_fraction`` of it (except ``constant``).
    """
    warmup_steps = math.ceil(warmup_fraction * total_steps)
    if step < warmup_steps:
        return highest * min(1.0, (step + 1) / warmup_steps)
    if schedule is Schedule.CONSTANT:
        return highest
    progress = min(1.0, (step - warmup_steps + 1) / max(1, total_steps - warmup_steps))
    share = (1 + math.cos(math.pi * progress)) / 2 if schedule is Schedule.COSINE else 1 - progress
    return highest * (final_fraction + (1 - final_fraction) * share)
