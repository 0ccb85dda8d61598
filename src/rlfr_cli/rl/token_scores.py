"""What may be shaped into token rewards in place of the flow's scores: controls and baselines.

Controls stand on the valid tokens of the flow's scores: uniform numbers, or the scores themselves in another order, so
that each response pays as much and for nothing. Baselines are known of every token without a flow: its negative
log-probability, and the entropy of the distribution that it was drawn from. A high score is penalised.

Lists have one tensor [T] a response, with NaN where a token has no score.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlfr_cli.config.flow import ScoreSource
from rlfr_cli.flow.noise import keyed_generator


def token_scores(
    source: ScoreSource,
    flow_scores: Sequence[torch.Tensor] | None,
    logprobs: Sequence[torch.Tensor],
    entropies: Sequence[torch.Tensor],
    keys: Sequence[str],
    seed: int,
) -> list[torch.Tensor]:
    """The scores that are paid for.

    Args:
        flow_scores: those of the flow, or None where there is none; then every token has a score.
        logprobs, entropies: of every token, in nats.
        keys: of the responses, which key the random numbers.
    """
    if source.needs_flow:
        assert flow_scores is not None, source
        if source is ScoreSource.RANDOM:
            return random_scores(seed, keys, [~scores_T.isnan() for scores_T in flow_scores])
        if source is ScoreSource.SHUFFLED:
            return shuffled_scores(seed, keys, flow_scores)
        return list(flow_scores)
    chosen = [-logprobs_T for logprobs_T in logprobs] if source is ScoreSource.LIKELIHOOD else list(entropies)
    if flow_scores is None:
        return chosen
    return [
        torch.where(scores_T.isnan(), torch.nan, values_T)
        for values_T, scores_T in zip(chosen, flow_scores, strict=True)
    ]


def random_scores(seed: int, keys: Sequence[str], valid: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Uniform scores [T] on the valid tokens, keyed by response, NaN elsewhere."""
    drawn = []
    for key, valid_T in zip(keys, valid, strict=True):
        generator = keyed_generator(valid_T.device, seed, "random scores", key)
        scores_T = torch.rand(len(valid_T), generator=generator, device=valid_T.device)
        drawn.append(torch.where(valid_T, scores_T, torch.nan))
    return drawn


def shuffled_scores(seed: int, keys: Sequence[str], scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each response's own scores [T], dealt to its valid tokens in a random order keyed by response."""
    dealt = []
    for key, scores_T in zip(keys, scores, strict=True):
        generator = keyed_generator("cpu", seed, "shuffled scores", key)
        valid_T = ~scores_T.isnan()
        order_M = torch.randperm(int(valid_T.sum()), generator=generator).to(scores_T.device)
        out_T = scores_T.clone()
        out_T[valid_T] = scores_T[valid_T][order_M]
        dealt.append(out_T)
    return dealt
