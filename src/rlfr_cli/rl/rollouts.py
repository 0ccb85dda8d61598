"""Draw responses to problems and judge them: what `sample`, `eval` and `train-rl` share.

In: problems with their prompts. Out: graded rollout rows, problem after problem, sample after sample. The random
numbers of a unit of work depend on its key alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rlfr_cli.artifacts.problems import Problem
from rlfr_cli.artifacts.rollouts import RolloutRow
from rlfr_cli.engines.generation import GenerationEngine, GenerationRequest, Sampling
from rlfr_cli.flow.noise import Key
from rlfr_cli.grading.grades import Grade
from rlfr_cli.grading.pool import GradingPool
from rlfr_cli.grading.rewards import RewardFunction, RewardInput


@dataclass(frozen=True)
class PromptedProblem:
    """A problem and the token ids of the prompt that asks for it."""

    problem: Problem
    prompt_token_ids: tuple[int, ...]


class Responder:
    """Draws, grades and rewards responses; closes its engine and graders.

    Args:
        engine: draws responses.
        pool: judges them.
        reward: outcome reward of judged responses.
    """

    def __init__(self, engine: GenerationEngine, pool: GradingPool, reward: RewardFunction) -> None:
        self.engine = engine
        self.pool = pool
        self.reward = reward

    def respond(
        self,
        problems: Sequence[PromptedProblem],
        num_samples: int,
        sampling: Sampling,
        *,
        key: tuple[Key, ...],
        first_samples: Sequence[int] | None = None,
        on_finished: Callable[[int, int], None] = lambda responses, tokens: None,
    ) -> list[RolloutRow]:
        """``num_samples`` graded responses to each problem, in order.

        Args:
            key: names this unit of work, seed included.
            first_samples: sample index of each problem's first response, 0 by default.
            on_finished: told of finished responses and tokens as they come.
        """
        first_samples = [0] * len(problems) if first_samples is None else first_samples
        requests = [
            GenerationRequest(prompted.prompt_token_ids, prompted.problem.problem_id, first + index)
            for prompted, first in zip(problems, first_samples, strict=True)
            for index in range(num_samples)
        ]
        asked = [prompted.problem for prompted in problems for _ in range(num_samples)]
        drawn = self.engine.generate(requests, sampling, key=key, on_finished=on_finished)
        grades = self.pool.grade([g.text for g in drawn], [problem.answers for problem in asked])
        rewards = self.reward(
            [
                RewardInput(problem.problem, problem.answers, generation.text, generation.finish_reason, grade)
                for problem, generation, grade in zip(asked, drawn, grades, strict=True)
            ]
        )
        return [
            RolloutRow(
                problem_id=problem.problem_id,
                sample_index=request.sample_index,
                problem=problem.problem,
                answer=list(problem.answers),
                prompt_token_ids=list(request.prompt_token_ids),
                response_token_ids=generation.token_ids,
                response_logprobs=generation.logprobs,
                response=generation.text,
                finish_reason=generation.finish_reason,
                reward=reward,
                correct=grade is Grade.CORRECT,
                grade=str(grade),
                source="policy",
            )
            for problem, request, generation, grade, reward in zip(asked, requests, drawn, grades, rewards, strict=True)
        ]

    def close(self) -> None:
        """Give back the engine and end the graders."""
        self.engine.close()
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
