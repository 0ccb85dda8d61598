"""Read responses once with a policy, and keep of each valid token what ``rlfr diagnose`` looks at: a few numbers.

One forward pass a response gives log-probabilities, entropies and latents; on the latents the flow gives its score, and
its scores of what carries less (``flow/diagnostics.py``). Latents live as long as their batch. Before that, the
responses of every second problem are read by the decoder alone, for mean and deviation of every channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import combinations
from typing import Any

import numpy as np
import torch

from rlfr_cli import console
from rlfr_cli.config.diagnose import DiagnoseConfig
from rlfr_cli.config.flow import FlowRewardConfig
from rlfr_cli.flow.baselines import VelocityErrors
from rlfr_cli.flow.deviation import keyed_noise
from rlfr_cli.flow.diagnostics import (
    channel_errors,
    draw_scores,
    in_flow_units,
    only_pairing,
    random_latents,
    shuffle_conditions,
)
from rlfr_cli.flow.flow import Flow, response_key
from rlfr_cli.flow.normalisation import LatentStatistics, StatisticsAccumulator
from rlfr_cli.flow.pairing import PairedLatents
from rlfr_cli.policy.batching import token_budget_batches
from rlfr_cli.policy.forward import ForwardBatch, decoder_latents, forward_batches
from rlfr_cli.policy.loading import Policy
from rlfr_cli.policy.tapping import tap
from rlfr_cli.report.chains import Place, first_wrong_place, number_places
from rlfr_cli.report.diagnosis import ResponseTable, TokenTable
from rlfr_cli.report.diagnosis_statistics import draw_agreement, spearman
from rlfr_cli.rl.measuring import flow_rewards
from rlfr_cli.stages.flow_evaluation import TIMESTEPS, add_velocity_errors
from rlfr_cli.stages.responses import Responses

NUM_DRAWS = (1, 4, 16)
MAX_RESPONSES_WITH_DRAWS = 128
TOKEN_COLUMNS = (
    "token_id",
    "position",
    "score",
    "flow_reward",
    "negative_logprob",
    "entropy",
    "latent_norm",
    "random_latents",
    "shuffled_context",
    "first_wrong",
)


@dataclass
class Measured:
    """All that is kept of the responses.

    Attributes:
        velocity_errors: of the responses that the Gaussian has not seen.
        channel_error_JD: squared error by channel, summed over the tokens of the responses with draws.
        agreements: of each of these, rank correlation and Jaccard index [len(NUM_DRAWS), 2].
        context_agreements: rank correlation of scores under two contexts, one entry a response.
    """

    responses: ResponseTable
    tokens: TokenTable
    velocity_errors: VelocityErrors
    channel_error_JD: torch.Tensor
    agreements: np.ndarray
    context_agreements: np.ndarray


def problem_halves(responses: Responses) -> tuple[list[int], list[int]]:
    """Rows of every second problem, and rows of the others: no problem lies in both."""
    halves: tuple[list[int], list[int]] = ([], [])
    numbers: dict[str, int] = {}
    for row, name in enumerate(responses.table["problem_id"].to_pylist()):
        halves[numbers.setdefault(name, len(numbers)) % 2].append(row)
    return halves


def channel_statistics(
    policy: Policy, flow: Flow, responses: Responses, rows: Iterable[int], tokens_per_batch: int
) -> LatentStatistics:
    """Mean and deviation by tapped state and channel over the response tokens of some rows."""
    wanted = set(rows)
    statistics = StatisticsAccumulator(len(flow.tapped), policy.config.hidden_size)
    with (
        console.progress("reading every second problem", total=len(wanted), unit="responses") as bar,
        tap(policy.decoder, flow.tapped) as taps,
    ):
        for unit in responses.units:
            kept = [index for index, row in enumerate(unit) if row in wanted]
            sequences = responses.sequences(unit)
            lengths = [len(sequences[index]) for index in kept]
            for batch in token_budget_batches(lengths, tokens_per_batch):
                chosen = [sequences[kept[index]] for index in batch]
                for latents_TJD in decoder_latents(policy.decoder, taps, chosen, 1, policy.placement.device):
                    statistics.update(latents_TJD[1:])
                bar.advance(len(batch))
    return statistics.finish().to(flow.device)


def measure(
    policy: Policy,
    flow: Flow,
    responses: Responses,
    statistics: LatentStatistics,
    judged: Iterable[int],
    config: DiagnoseConfig,
    temperature: float,
) -> Measured:
    """Measure every response.

    Args:
        statistics: of raw latents; the Gaussian baseline, and the scale of random latents.
        judged: rows for the velocity error, none of which the statistics have seen.
    """
    measuring = _Measuring(flow, responses, statistics, set(judged), config, policy)
    with console.progress("measuring", total=responses.num_rows, unit="responses") as bar:
        for unit in responses.units:
            batches = forward_batches(
                policy,
                responses.sequences(unit),
                temperature=temperature,
                tapped=flow.tapped,
                num_prompt=flow.num_prompt,
                tokens_per_batch=config.tokens_per_batch,
            )
            facts = responses.rows(unit).select(
                ["problem_id", "sample_index", "problem", "response_token_ids", "correct", "grade"]
            )
            listed = facts.to_pylist()
            for batch in batches:
                measuring.add(batch, [unit[index] for index in batch.indices], [listed[i] for i in batch.indices])
                bar.advance(len(batch.indices))
    return measuring.finish()


@dataclass
class _Row:
    """What is kept of one response; ``columns`` holds the ``TOKEN_COLUMNS`` of its valid tokens."""

    problem_id: str
    graded: bool
    wrong: bool
    length: int
    negative_logprob: float
    entropy: float
    columns: dict[str, np.ndarray]
    places: list[Place | None]
    context_agreement: float
    agreement: list[tuple[float, float]] = field(default_factory=list)


class _Measuring:
    """Collects what ``measure`` sees, batch by batch."""

    def __init__(
        self,
        flow: Flow,
        responses: Responses,
        statistics: LatentStatistics,
        judged: set[int],
        config: DiagnoseConfig,
        policy: Policy,
    ) -> None:
        self.flow, self.statistics, self.judged = flow, statistics, judged
        self.seed, self.reward, self.dtype = config.seed, config.flow_reward, policy.placement.dtype
        self.decode = cache(lambda token: policy.tokenizer.decode([token]))
        count = min(responses.num_rows, MAX_RESPONSES_WITH_DRAWS)
        self.with_draws = {round(row) for row in np.linspace(0, responses.num_rows - 1, count)}
        self.rows: list[_Row | None] = [None] * responses.num_rows
        times = tuple(sorted({*TIMESTEPS, *self.reward.timestep}))
        self.velocity = VelocityErrors(in_flow_units(statistics, flow), len(flow.layers.indices), times)
        num_layers, num_channels = len(flow.layers.indices), statistics.mean_JD.shape[1]
        self.channel_error_JD = torch.zeros(num_layers, num_channels, dtype=torch.float64)

    def add(self, batch: ForwardBatch, rows: Sequence[int], facts: Sequence[dict[str, Any]]) -> None:
        """Measure one batch; facts are columns of its rollouts."""
        flow = self.flow
        keys = [response_key(fact["problem_id"], fact["sample_index"]) for fact in facts]
        pairs = flow.pair(batch.latents)
        shuffled = shuffle_conditions(pairs, self.seed, keys)
        scores = self._scores(pairs, keys)
        columns = {
            "score": scores,
            "flow_reward": flow_rewards(scores, self.reward),
            "negative_logprob": [-logprobs_T for logprobs_T in batch.logprobs],
            "entropy": batch.entropies,
            "latent_norm": [
                _norms(latents_TJD[flow.num_prompt :, : len(flow.layers.indices)]) for latents_TJD in batch.latents
            ],
            "random_latents": self._scores(
                flow.pair(random_latents(batch.latents, self.statistics, self.seed, keys)), keys
            ),
            "shuffled_context": self._scores(shuffled, keys),
        }
        arrays = {name: [values.cpu().double().numpy() for values in column] for name, column in columns.items()}
        contexts = [arrays["score"], arrays["shuffled_context"]]
        if len(flow.pairings) > 1:
            by_pairing = [self._scores(only_pairing(pairs, number), keys) for number in range(len(flow.pairings))]
            contexts = [[values.cpu().double().numpy() for values in column] for column in by_pairing]
        for place, (row, fact) in enumerate(zip(rows, facts, strict=True)):
            one = {name: column[place] for name, column in arrays.items()}
            self.rows[row] = self._row(fact, one, [column[place] for column in contexts])
        self._add_some(pairs, keys, rows)

    def _scores(self, pairs: PairedLatents, keys: Sequence[str]) -> list[torch.Tensor]:
        """Scores [T] of each response, NaN where a token is not valid; always of the same noise."""
        result = self.flow.deviations(
            pairs,
            keys,
            seed=self.seed,
            timesteps=self.reward.timestep,
            num_draws=self.reward.num_draws,
            antithetic=self.reward.antithetic,
            autocast_dtype=self.dtype,
        )
        lengths = pairs.paired.response_offsets.diff().tolist()
        return list(pairs.paired.over_responses(result.score_M, torch.nan).split(lengths))

    def _row(self, fact: dict[str, Any], columns: dict[str, np.ndarray], contexts: Sequence[np.ndarray]) -> _Row:
        ids = fact["response_token_ids"]
        valid = np.flatnonzero(~np.isnan(columns["score"]))
        graded, wrong = fact["grade"] != "ungraded", not fact["correct"]
        texts = [self.decode(token) for token in ids]
        first = first_wrong_place(fact["problem"], texts) if graded and wrong else None
        places = {first[0]: first[1]} if first else {}
        if graded and not wrong:
            places = number_places(fact["problem"], texts) or {}
        kept = {name: values[valid] for name, values in columns.items()}
        kept |= {
            "token_id": np.array(ids, dtype=np.int64)[valid],
            "position": valid,
            "first_wrong": valid == first[0] if first else np.zeros(len(valid), dtype=bool),
        }
        agreement = [spearman(a[valid], b[valid]) for a, b in combinations(contexts, 2)]
        return _Row(
            problem_id=fact["problem_id"],
            graded=graded,
            wrong=wrong,
            length=len(ids),
            negative_logprob=float(columns["negative_logprob"].mean()) if ids else math.nan,
            entropy=float(columns["entropy"].mean()) if ids else math.nan,
            columns=kept,
            places=[places.get(int(token)) for token in valid],
            context_agreement=float(np.mean(agreement)),
        )

    def _add_some(self, pairs: PairedLatents, keys: Sequence[str], rows: Sequence[int]) -> None:
        """Velocity errors of the judged responses; many draws and errors by channel of those with draws."""
        judged = self._of(pairs, [row in self.judged for row in rows])
        add_velocity_errors(self.velocity, self.flow, judged, keyed_noise(self.seed, keys, judged), self.dtype)
        drawn = self._of(pairs, [row in self.with_draws for row in rows])
        noise, times = keyed_noise(self.seed, keys, drawn), self.reward.timestep
        self.channel_error_JD += channel_errors(self.flow, drawn, noise, timesteps=times, autocast_dtype=self.dtype)
        half = NUM_DRAWS[-1]
        scores_MS = draw_scores(self.flow, drawn, noise, timesteps=times, num_draws=2 * half, autocast_dtype=self.dtype)
        for row, scores_TS in zip(
            rows, scores_MS.cpu().double().split(drawn.paired.valid_per_response_R.tolist()), strict=True
        ):
            kept = self.rows[row]
            if row in self.with_draws and kept is not None:
                both = scores_TS.numpy()
                chosen = partial(_paid_for, reward=self.reward)
                kept.agreement = draw_agreement(both[:, :half], both[:, half:], chosen, NUM_DRAWS)

    def _of(self, pairs: PairedLatents, wanted: Sequence[bool]) -> PairedLatents:
        """Only the valid tokens of the wanted responses."""
        return pairs.select(torch.tensor(wanted, device=pairs.device)[pairs.paired.sequence_M])

    def finish(self) -> Measured:
        """Everything in order of responses."""
        rows = [row for row in self.rows if row is not None]
        columns = {name: np.concatenate([row.columns[name] for row in rows]) for name in TOKEN_COLUMNS}
        return Measured(
            responses=ResponseTable(
                problem_ids=[row.problem_id for row in rows],
                graded=np.array([row.graded for row in rows]),
                wrong=np.array([row.wrong for row in rows]),
                length=np.array([row.length for row in rows]),
                negative_logprob=np.array([row.negative_logprob for row in rows]),
                entropy=np.array([row.entropy for row in rows]),
            ),
            tokens=TokenTable(
                response=np.repeat(np.arange(len(rows)), [len(row.places) for row in rows]),
                places=[place for row in rows for place in row.places],
                **columns,
            ),
            velocity_errors=self.velocity,
            channel_error_JD=self.channel_error_JD,
            agreements=np.array([row.agreement for row in rows if row.agreement]),
            context_agreements=np.array([row.context_agreement for row in rows]),
        )


def _norms(latents_TJD: torch.Tensor) -> torch.Tensor:
    """Root mean square of each token's latent, mean over layers [T]."""
    return latents_TJD.float().square().mean(dim=-1).sqrt().mean(dim=-1)


def _paid_for(scores_T: np.ndarray, reward: FlowRewardConfig) -> np.ndarray:
    """Tokens that the shaping selects, whatever they are paid and whether rewards are centred."""
    shaped = flow_rewards([torch.from_numpy(scores_T).float()], replace(reward, coef=1.0, centre_reward=False))
    return shaped[0].numpy() != 0
