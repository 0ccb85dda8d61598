"""Generation with transformers: batches by token budget, prompts read once for a group, finished rows leave.

A row that has finished is taken out of the batch and of the cache, so no padding is generated. All random numbers of
one call come from one generator keyed by the unit of work, so the result does not depend on what ran before it.
Shapes: B rows still running, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from rlfr_cli.engines.generation import Generation, GenerationRequest, Sampling
from rlfr_cli.flow.noise import Key, keyed_generator
from rlfr_cli.policy.batching import pad_left, token_budget_batches
from rlfr_cli.policy.forward import TokenSequence, response_logprobs
from rlfr_cli.policy.loading import Policy


@dataclass
class _Running:
    """A response being drawn."""

    index: int
    max_new_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class HfEngine:
    """Generation with the policy's own transformers model; it shares the trainer's weights.

    Args:
        policy: the policy.
        tokens_per_batch: most tokens of one batch, prompts and responses at full length.
    """

    name = "hf"

    def __init__(self, policy: Policy, tokens_per_batch: int = 16384) -> None:
        self.policy = policy
        self.tokens_per_batch = tokens_per_batch

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        *,
        key: tuple[Key, ...],
        on_finished: Callable[[int, int], None] = lambda responses, tokens: None,
    ) -> list[Generation]:
        """Draw every request, in order; see ``GenerationEngine``."""
        generator = keyed_generator(self.policy.placement.device, *key)
        was_training = self.policy.model.training
        self.policy.model.eval()
        results: list[Generation | None] = [None] * len(requests)
        full_lengths = [len(r.prompt_token_ids) + sampling.max_new_tokens for r in requests]
        # One autocast around the whole call, and no inference mode, which has no cache of casts: each float32 weight
        # of a policy in training is then cast once, not for every token.
        with self.policy.placement.autocast():
            for batch in token_budget_batches(full_lengths, self.tokens_per_batch):
                rows = [requests[index] for index in batch]
                for position, generation in self._generate_batch(rows, sampling, generator):
                    results[batch[position]] = generation
                    on_finished(1, len(generation.token_ids))
        self.policy.model.train(was_training)
        return [generation for generation in results if generation is not None]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Nothing to do: the engine draws from the model that is trained."""

    @torch.no_grad()
    def logprobs_of(self, sequences: Sequence[TokenSequence]) -> list[torch.Tensor]:
        """Log-probabilities [T] of given response tokens at temperature 1, float32."""
        packed_K, _ = response_logprobs(self.policy, sequences, 1.0)
        return list(packed_K.split([len(sequence.response) for sequence in sequences]))

    def sleep(self) -> None:
        """Nothing to give back: the model is the trainer's."""

    def wake(self) -> None:
        """Nothing to take again."""

    def close(self) -> None:
        """Nothing to give back."""

    def _generate_batch(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, generator: torch.Generator
    ) -> Iterable[tuple[int, Generation]]:
        policy, device = self.policy, self.policy.placement.device
        context = policy.context_length or 2**62
        running = [
            _Running(index, min(sampling.max_new_tokens, context - len(request.prompt_token_ids)))
            for index, request in enumerate(requests)
        ]
        logits_BV, cache, mask_BS = self._read_prompts([request.prompt_token_ids for request in requests])
        while True:
            tokens_B, logprobs_B = draw_tokens(logits_BV, sampling, generator)
            going = []
            drawn = zip(running, tokens_B.tolist(), logprobs_B.tolist(), strict=True)
            for row, (response, token, logprob) in enumerate(drawn):
                response.token_ids.append(token)
                response.logprobs.append(logprob)
                finish_reason = self._finish_reason(response, sampling)
                if finish_reason is None:
                    going.append(row)
                else:
                    text = policy.tokenizer.decode(response.token_ids, skip_special_tokens=True)
                    yield (
                        response.index,
                        Generation(response.token_ids, response.logprobs, text, finish_reason),
                    )
            if not going:
                return
            if len(going) < len(running):
                keep_B = torch.tensor(going, device=device)
                cache.batch_select_indices(keep_B)
                mask_BS, tokens_B = mask_BS[keep_B], tokens_B[keep_B]
                running = [running[row] for row in going]
            mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(running), 1)], dim=1)
            logits_BV = policy.model(
                input_ids=tokens_B[:, None],
                attention_mask=mask_BS,
                position_ids=mask_BS.sum(1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]

    def _read_prompts(self, prompts: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
        """Read each distinct prompt once; logits [B, V], cache and mask [B, S] are then laid out for all rows."""
        policy, device = self.policy, self.policy.placement.device
        distinct = list(dict.fromkeys(prompts))
        place = {prompt: row for row, prompt in enumerate(distinct)}
        rows_B = torch.tensor([place[prompt] for prompt in prompts], device=device)
        ids, mask = pad_left(distinct, 0, device)
        cache = DynamicCache(config=policy.config)
        logits = policy.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        cache.batch_select_indices(rows_B)
        return logits[rows_B], cache, mask[rows_B]

    def _finish_reason(self, response: _Running, sampling: Sampling) -> str | None:
        if response.token_ids[-1] in self.policy.end_token_ids:
            return "stop"
        if sampling.stop:
            # A stop string may straddle tokens; a token adds at least one character in any tokenizer used here.
            tail = response.token_ids[-2 * max(map(len, sampling.stop)) :]
            text = self.policy.tokenizer.decode(tail, skip_special_tokens=True)
            if any(stop in text for stop in sampling.stop):
                return "stop"
        return "length" if len(response.token_ids) >= response.max_new_tokens else None


def draw_tokens(
    logits_BV: torch.Tensor, sampling: Sampling, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row.

    Returns:
        Tokens [B] and their log-probabilities [B] under softmax(logits / temperature), before top-p and top-k.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature > 0:
        logits_BV = logits_BV / sampling.temperature
    logprobs_BV = logits_BV.log_softmax(-1)
    if sampling.temperature == 0:
        tokens_B = logprobs_BV.argmax(-1)
    else:
        probabilities_BV = filter_probabilities(logprobs_BV.exp(), sampling.top_p, sampling.top_k)
        tokens_B = torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]
    return tokens_B, logprobs_BV.gather(-1, tokens_B[:, None])[:, 0]


def filter_probabilities(probabilities_BV: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """Zero what top-k and then top-p leave out; the likeliest token always stays. Rows need not sum to 1."""
    if top_k > 0:
        kth_B1 = probabilities_BV.topk(min(top_k, probabilities_BV.shape[-1]), dim=-1).values[:, -1:]
        probabilities_BV = probabilities_BV.where(probabilities_BV >= kth_B1, 0.0)
    if top_p < 1:
        ordered_BV, places_BV = probabilities_BV.sort(dim=-1, descending=True)
        total_B1 = ordered_BV.sum(-1, keepdim=True)
        before_BV = ordered_BV.cumsum(-1) - ordered_BV
        ordered_BV = ordered_BV.where(before_BV < top_p * total_B1, 0.0)
        probabilities_BV = torch.zeros_like(probabilities_BV).scatter(-1, places_BV, ordered_BV)
    return probabilities_BV
