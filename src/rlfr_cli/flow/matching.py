"""The fitting loss: conditional flow matching on the reference's latents.

x1 = target, e ~ N(0, I), x_t = t x1 + (1 - t) e, u = x1 - e; a token's error is the mean over D of (v(x_t,
t, condition, layer) - u)^2, averaged over layers, pairings and noise repeats; the loss is its weighted mean
over tokens. Targets and conditions are detached here, so no gradient ever reaches the policy.

The loss is a sum divided by a total weight that the caller may give: with the weight of the whole optimiser
batch, gradients accumulated over chunks, micro-batches and ranks add up to those of the one mean over that
batch. A rank that names its share of the batch's tokens draws the noise and times that they would have met
had one process held them all.

Shapes: N tokens of one layer, M valid tokens, P pairings, J layers, D latent size, C condition size, R
noise repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from rlfr_cli.flow.pairing import PairedLatents
from rlfr_cli.flow.velocity import VelocityNetwork

DEFAULT_TOKENS_PER_CHUNK = 4096
# Numbers drawn at once, 37 MiB. Whole passes of PyTorch's generators over memory (16 numbers on a CPU, four for each of
# the 2048 threads of 108 or 132 multiprocessors on a GPU), so that draws one after the other are those of a single one.
NOISE_AT_ONCE = 2**15 * 297


@dataclass(frozen=True)
class MatchingResult:
    """Detached float32 results of one batch; all 0, and no gradient, where no token has weight."""

    error_sum: Tensor  # [], sum of weight * error
    weight_sum: Tensor  # [], sum of weights
    errors_MJ: Tensor  # mean over pairings and repeats

    @property
    def loss(self) -> Tensor:
        """The weighted mean error of this batch alone."""
        return self.error_sum / self.weight_sum if self.weight_sum > 0 else self.error_sum


@dataclass(frozen=True)
class TokenShare:
    """Where the tokens at hand stand among those of a batch that several processes share out.

    Only tokens of positive weight count.

    Attributes:
        start: tokens of the processes before this one.
        total: tokens of all processes.
    """

    start: int
    total: int

    @classmethod
    def of(cls, counts: Sequence[int], place: int) -> TokenShare:
        """The share of process ``place``, given how many tokens each has."""
        return cls(sum(counts[:place]), sum(counts))


def sample_times(num_times: int, generator: torch.Generator) -> Tensor:
    """Times [n] in (0, 1): sigmoid of standard normals, on the generator's device."""
    return torch.randn(num_times, generator=generator, device=generator.device).sigmoid()


def choose_times(timesteps: Sequence[float], num_times: int, generator: torch.Generator) -> Tensor:
    """Times [n] drawn evenly from ``timesteps``, the published choice of the online update."""
    picks = torch.randint(len(timesteps), (num_times,), generator=generator, device=generator.device)
    return torch.tensor(timesteps, device=generator.device)[picks]


def draw_noise_and_times(
    num_tokens: int,
    latent_size: int,
    generator: torch.Generator,
    draw_times: Callable[[int, torch.Generator], Tensor] = sample_times,
    share: TokenShare | None = None,
) -> tuple[Tensor, Tensor]:
    """Noise [M, D] and times [M] of one layer, pairing and repeat, on the generator's device.

    With a ``share`` both are drawn for its total and the tokens' rows are kept: a generator that began at a later row
    would give other numbers.
    """
    share = share or TokenShare(0, num_tokens)
    rows = slice(share.start, share.start + num_tokens)
    assert rows.stop <= share.total, (share, num_tokens)
    noise_MD = _draw_rows(rows, share.total, latent_size, generator)
    return noise_MD, draw_times(share.total, generator)[rows]


def _draw_rows(rows: slice, num_rows: int, size: int, generator: torch.Generator) -> Tensor:
    """The given rows of normal noise [num_rows, size], which never lies in memory as a whole."""
    start, stop, end = rows.start * size, rows.stop * size, num_rows * size
    kept = torch.empty(stop - start, device=generator.device)
    for begin in range(0, end, NOISE_AT_ONCE):
        drawn = torch.randn(min(NOISE_AT_ONCE, end - begin), generator=generator, device=generator.device)
        first, last = max(start, begin), min(stop, begin + drawn.numel())
        if first < last:
            kept[first - start : last - start] = drawn[first - begin : last - begin]
    return kept.view(-1, size)


def noised_latents(targets_ND: Tensor, noise_ND: Tensor, times_N: Tensor) -> Tensor:
    """x_t [N, D]; times are [N], or [1] where one holds for all."""
    times = times_N[:, None]
    return times * targets_ND + (1 - times) * noise_ND


def squared_errors(velocity_ND: Tensor, targets_ND: Tensor, noise_ND: Tensor) -> Tensor:
    """Mean over D of (v - u)^2, [N], in float32 whatever the network computed in."""
    return (velocity_ND.float() - (targets_ND - noise_ND)).square().mean(dim=-1)


def matching_errors(
    network: VelocityNetwork,
    targets_ND: Tensor,
    conditions_NC: Tensor,
    times_N: Tensor,
    noise_ND: Tensor,
    layer_position: float,
) -> Tensor:
    """Errors [N] of one layer and pairing; gradients reach the network and nothing else."""
    targets_ND, conditions_NC = targets_ND.detach().float(), conditions_NC.detach().float()
    layers = torch.tensor([layer_position], device=targets_ND.device)
    velocity_ND = network(noised_latents(targets_ND, noise_ND, times_N), times_N, conditions_NC, layers)
    return squared_errors(velocity_ND, targets_ND, noise_ND)


def matching_loss(errors_N: Tensor, weights_N: Tensor | None = None, total_weight: float | None = None) -> Tensor:
    """Weighted sum of errors over ``total_weight`` (by default their own), and 0 where that is 0."""
    weights_N = torch.ones_like(errors_N) if weights_N is None else weights_N.to(errors_N.dtype)
    divisor = float(weights_N.sum()) if total_weight is None else total_weight
    return (errors_N * weights_N).sum() / (divisor if divisor > 0 else 1.0)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast to ``dtype``; nothing for ``None`` and float32."""
    if dtype in (None, torch.float32):
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def chunks(num_rows: int, size: int) -> Iterator[slice]:
    """Consecutive row ranges of at most ``size``."""
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def accumulate_matching_gradients(
    network: VelocityNetwork,
    pairs: PairedLatents,
    generator: torch.Generator,
    *,
    weights_M: Tensor | None = None,
    total_weight: float | None = None,
    share: TokenShare | None = None,
    noise_repeats: int = 1,
    draw_times: Callable[[int, torch.Generator], Tensor] = sample_times,
    tokens_per_chunk: int = DEFAULT_TOKENS_PER_CHUNK,
    autocast_dtype: torch.dtype | None = None,
    backward: bool = True,
) -> MatchingResult:
    """Add the gradients of the fitting loss on a batch to the network's, in chunks, and return its sums.

    Args:
        generator: of the latents' device. Noise and times are drawn for all of a layer's tokens beforehand, so
            the chunk size changes neither.
        weights_M: weights of the reference rules, by default 1 for each valid token. Tokens of weight 0 cost
            nothing; with no weight at all nothing is drawn and no gradient is added.
        total_weight: weight of the whole optimiser batch (all micro-batches and ranks), by default this
            batch's. The loss of the optimiser batch is its sum of ``error_sum`` over ``total_weight``.
        share: where these tokens stand among those of all ranks; by default they are all there are.
        noise_repeats: draws of noise and time for each token, layer and pairing.
        draw_times: ``sample_times``, or ``functools.partial(choose_times, timesteps)``.
        backward: ``False`` measures only.
    """
    device = pairs.device
    num_layers, num_pairings = len(pairs.layers.indices), pairs.paired.conditions_PM.shape[0]
    all_errors_MJ = torch.zeros(pairs.paired.num_valid, num_layers, device=device)
    if weights_M is None:
        weights_M = all_errors_MJ.new_ones(pairs.paired.num_valid)
    weights_M = weights_M.to(all_errors_MJ)
    weight_sum, weighted_M = weights_M.sum(), weights_M > 0
    divisor = float(weight_sum) if total_weight is None else total_weight
    if not bool(weighted_M.any()):
        return MatchingResult(weight_sum.new_zeros(()), weight_sum, all_errors_MJ)

    pairs, weights_M = pairs.select(weighted_M), weights_M[weighted_M]
    num_tokens, repeats = weights_M.numel(), num_pairings * noise_repeats
    errors_MJ = all_errors_MJ[weighted_M]
    for column, pairing, _ in product(range(num_layers), range(num_pairings), range(noise_repeats)):
        noise_MD, times_M = draw_noise_and_times(num_tokens, pairs.latent_size, generator, draw_times, share)
        for rows in chunks(num_tokens, tokens_per_chunk):
            targets, conditions = pairs.targets(column, rows), pairs.conditions(column, pairing, rows)
            position = pairs.layers.positions[column]
            with torch.set_grad_enabled(backward), autocast(device, autocast_dtype):
                errors = matching_errors(network, targets, conditions, times_M[rows], noise_MD[rows], position)
            if backward:
                (matching_loss(errors, weights_M[rows], divisor) / (num_layers * repeats)).backward()
            errors_MJ[rows, column] += errors.detach() / repeats
    all_errors_MJ[weighted_M] = errors_MJ
    return MatchingResult((errors_MJ.mean(dim=1) * weights_M).sum(), weight_sum, all_errors_MJ)
