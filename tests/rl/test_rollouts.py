"""Drawing and judging: what reaches the engine, the graders and the reward, and the rows that come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from rlfr_cli.artifacts.problems import Problem
from rlfr_cli.engines.generation import Generation, GenerationRequest, Sampling
from rlfr_cli.flow.noise import Key
from rlfr_cli.grading.grades import Grade
from rlfr_cli.grading.rewards import RewardInput, published_reward
from rlfr_cli.rl.rollouts import PromptedProblem, Responder


@dataclass
class EchoEngine:
    """Answers with the problem's id, and every third time is cut off."""

    name: str = "echo"
    asked: list[tuple[list[GenerationRequest], Sampling, tuple[Key, ...]]] = field(default_factory=list)
    closed: bool = False

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        *,
        key: tuple[Key, ...],
        on_finished: Callable[[int, int], None] = lambda responses, tokens: None,
    ) -> list[Generation]:
        self.asked.append((list(requests), sampling, key))
        on_finished(len(requests), 2 * len(requests))
        return [
            Generation([r.sample_index, 2], [-0.5, -1.5], r.problem_id, "length" if r.sample_index == 2 else "stop")
            for r in requests
        ]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None: ...

    def close(self) -> None:
        self.closed = True


@dataclass
class EqualityPool:
    """A response is correct when it is an accepted answer."""

    closed: bool = False

    def grade(self, responses: Sequence[str], answers: Sequence[tuple[str, ...]]) -> list[Grade]:
        return [Grade.CORRECT if r in a else Grade.WRONG for r, a in zip(responses, answers, strict=True)]

    def close(self) -> None:
        self.closed = True


PROBLEMS = [
    PromptedProblem(Problem("a", "First?", ("a", "A"), None, None, 0), (10, 11)),
    PromptedProblem(Problem("b", "Second?", ("c",), None, None, 1), (12,)),
]


def test_rows_come_problem_after_problem_and_sample_after_sample() -> None:
    engine = EchoEngine()
    told: list[tuple[int, int]] = []
    seen: list[RewardInput] = []

    def reward(inputs: list[RewardInput]) -> list[float]:
        seen.extend(inputs)
        return published_reward(inputs)

    responder = Responder(engine, EqualityPool(), reward)  # type: ignore[arg-type]
    sampling = Sampling(temperature=0.7)
    rows = responder.respond(PROBLEMS, 3, sampling, key=(5, "unit"), on_finished=lambda *n: told.append(n))

    assert [(row.problem_id, row.sample_index) for row in rows] == [(p, i) for p in "ab" for i in range(3)]
    requests, used, key = engine.asked[0]
    assert [r.prompt_token_ids for r in requests] == [(10, 11)] * 3 + [(12,)] * 3
    assert (used, key) == (sampling, (5, "unit"))
    assert told == [(6, 12)]
    assert [(i.problem, i.answers, i.response) for i in seen[2:4]] == [
        ("First?", ("a", "A"), "a"),
        ("Second?", ("c",), "b"),
    ]

    assert [row.grade for row in rows] == ["correct"] * 3 + ["wrong"] * 3
    assert [row.correct for row in rows] == [True] * 3 + [False] * 3
    assert [row.finish_reason for row in rows] == ["stop", "stop", "length"] * 2
    assert [row.reward for row in rows] == [1.0, 1.0, 0.0, 0.5, 0.5, 0.0]
    first = rows[1]
    assert (first.problem, first.answer, first.response) == ("First?", ["a", "A"], "a")
    assert (first.prompt_token_ids, first.response_token_ids) == ([10, 11], [1, 2])
    assert first.response_logprobs == [-0.5, -1.5]
    assert first.source == "policy"


def test_leaving_closes_engine_and_graders_even_after_an_error() -> None:
    engine, pool = EchoEngine(), EqualityPool()
    try:
        with Responder(engine, pool, published_reward):  # type: ignore[arg-type]
            raise KeyError
    except KeyError:
        pass
    assert engine.closed
    assert pool.closed
