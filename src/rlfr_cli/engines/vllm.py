"""Generation with vLLM: all requests at once, one a response, each with a seed of its own.

Token ids and log-probabilities are those of vLLM's engine; the text is the tokenizer's, as with the hf engine. vLLM
runs in processes of its own behind its asynchronous engine (``vllm.AsyncLLMEngine``, the only one that spreads
requests over several copies of a model), on an event loop in a thread here. A script that opens this engine needs
``if __name__ == "__main__":``, since those processes import it again. Written against vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import torch

from rlfr_cli.config.engine import WeightTransfer
from rlfr_cli.engines.generation import Generation, GenerationRequest, Sampling
from rlfr_cli.engines.vllm_arguments import VllmSetup, check_sampling
from rlfr_cli.engines.vllm_process import LoopThread, all_of, start
from rlfr_cli.engines.vllm_weights import WeightRoute, open_route
from rlfr_cli.errors import ConfigError, WorkError
from rlfr_cli.flow.noise import Key, keyed_seed
from rlfr_cli.policy.forward import TokenSequence

Result = TypeVar("Result")

FINISH_REASONS = ("stop", "length")
SECONDS_TO_END = 20  # after which vLLM's processes are killed
PROBES = 4
TEMPERATURE_OF_PROBES = 2.0


class VllmEngine:
    """Generation with vLLM.

    Args:
        setup: what vLLM is started with; see ``check_arguments``.
        tokenizer: the policy's; makes the text of responses.
        end_token_ids: tokens that end a response.
        context_length: the model's, None where its config names none.
        weight_transfer: how ``load_weights`` reaches the engine.
        trainer_device: where those weights come from.

    Raises:
        WorkError: vLLM does not start.
    """

    name = "vllm"

    def __init__(
        self,
        setup: VllmSetup,
        tokenizer: Any,
        end_token_ids: Iterable[int],
        context_length: int | None,
        *,
        weight_transfer: WeightTransfer = WeightTransfer.FILE,
        trainer_device: torch.device | None = None,
    ) -> None:
        config = setup.config
        self.tokenizer = tokenizer
        self.end_token_ids = sorted(end_token_ids)
        self.max_model_len: int = config.model_config.max_model_len
        self.context_length = context_length or self.max_model_len
        self._engine = start(setup)
        self._loop = LoopThread()
        self._sleeps = bool(setup.arguments.get("enable_sleep_mode"))
        self._num_drawn = 0
        self._whole = True
        self._records_unfiltered = False
        num_workers = config.parallel_config.world_size_across_dp
        self._route: WeightRoute = open_route(
            weight_transfer,
            self._call_workers,
            config.model_config.dtype,
            num_workers,
            trainer_device or torch.device("cpu"),
        )

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        *,
        key: tuple[Key, ...],
        on_finished: Callable[[int, int], None] = lambda responses, tokens: None,
    ) -> list[Generation]:
        """Draw every request, in order; see ``GenerationEngine``.

        A response's random numbers come from a seed keyed by ``key``, its problem and its sample index. They are the
        same in every batch, but vLLM's log-probabilities differ in their last bits from batch to batch, and so, at
        times, do tokens. ``on_finished`` is called from another thread.
        """
        check_sampling(sampling)
        self._check_whole()
        if sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0):
            self._record_unfiltered()
        seeds = [keyed_seed(*key, request.problem_id, request.sample_index) for request in requests]
        params = [self._params(request, sampling, seed) for request, seed in zip(requests, seeds, strict=True)]

        async def draw(request: GenerationRequest, params: Any) -> Generation:
            generation = self._generation((await self._draw(request.prompt_token_ids, params)).outputs[0])
            on_finished(1, len(generation.token_ids))
            return generation

        return self._run(all_of([draw(*pair) for pair in zip(requests, params, strict=True)]))

    def logprobs_of(self, sequences: Sequence[TokenSequence]) -> list[torch.Tensor]:
        """Log-probabilities [T] of given response tokens under softmax(logits), temperature 1, in float32.

        vLLM scores the tokens of a prompt without a temperature.
        """
        from vllm import SamplingParams

        self._check_whole()

        async def score(sequence: TokenSequence) -> torch.Tensor:
            *read, last = [*sequence.prompt, *sequence.response]
            # A prompt may not fill the context, so the last token is scored as a possible next one.
            params = SamplingParams(
                temperature=0.0,
                max_tokens=1,
                prompt_logprobs=0,
                logprob_token_ids=[last],
                detokenize=False,
                ignore_eos=True,
            )
            output = await self._draw(read, params)
            within = zip(read, output.prompt_logprobs, strict=True)
            logprobs = [entry[token].logprob for token, entry in list(within)[len(sequence.prompt) :]]
            return torch.tensor([*logprobs, output.outputs[0].logprobs[0][last].logprob], dtype=torch.float32)

        return self._run(all_of([score(sequence) for sequence in sequences]))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the trainer's weights, all of them, named as in a checkpoint of the model.

        What was computed of prompts under the old weights is forgotten.

        Raises:
            WorkError: vLLM refuses them, such as a name that it does not know or a parameter that is left out. Nothing
                is drawn any more, unless weights are taken after all.
        """
        self._whole = False
        try:
            self._route.send(weights)
        except Exception as error:  # workers hand on whatever their model's loader raises
            raise WorkError(f"vLLM did not take the weights: {error}") from error
        self._reset_prefix_cache()
        self._whole = True

    def sleep(self, *, discard_weights: bool = False) -> None:
        """Give GPU memory back until ``wake``; nothing on a CPU, or where sleeping was not asked for.

        Args:
            discard_weights: forget the weights, which ``load_weights`` must bring again, and do not keep them in
                the machine's memory.
        """
        if self._sleeps:
            self._run(self._engine.sleep(level=2 if discard_weights else 1))

    def wake(self) -> None:
        """Take GPU memory again after ``sleep``."""
        if self._sleeps:
            self._run(self._engine.wake_up())

    def close(self) -> None:
        """End vLLM's processes."""
        if self._engine is not None:
            self._loop.end_tasks()  # first: they would take an engine that ends for one that has died
            self._engine.shutdown(timeout=SECONDS_TO_END)
            self._engine = None
            self._loop.close()

    def _params(self, request: GenerationRequest, sampling: Sampling, seed: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        num_prompt = len(request.prompt_token_ids)
        max_tokens = min(sampling.max_new_tokens, self.context_length - num_prompt)
        assert num_prompt + max_tokens <= self.max_model_len, "the engine was opened for shorter sequences"
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=seed,
            max_tokens=max_tokens,
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            # The end tokens are rlfr's own; vLLM's would be read from other files.
            stop_token_ids=self.end_token_ids,
            ignore_eos=True,
            logprobs=0,  # of the drawn token alone
            flat_logprobs=True,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def _draw(self, prompt: Sequence[int], params: Any) -> Any:
        from vllm.inputs import tokens_input

        self._num_drawn += 1
        async for output in self._engine.generate(tokens_input(list(prompt)), params, str(self._num_drawn)):
            last = output
        return last

    def _generation(self, completion: Any) -> Generation:
        if completion.finish_reason not in FINISH_REASONS:
            raise WorkError(f"vLLM ended a response with the reason {completion.finish_reason!r}")
        token_ids = list(completion.token_ids)
        flat = completion.logprobs
        logprobs = [flat.logprobs[start] for start in flat.start_indices][: len(token_ids)]
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return Generation(token_ids, logprobs, text, completion.finish_reason)

    def _record_unfiltered(self) -> None:
        """Have the workers record log-probabilities before top-k and top-p, and see that they do.

        Of one token left by top-k, vLLM's own log-probability is exactly 0.
        """
        if self._records_unfiltered:
            return
        from vllm import SamplingParams

        self._call_workers("rlfr_record_unfiltered_logprobs")
        params = SamplingParams(temperature=TEMPERATURE_OF_PROBES, top_k=1, max_tokens=1, logprobs=0, detokenize=False)
        outputs = self._run(all_of([self._draw([token], params) for token in range(PROBES)]))
        seen = [entry.logprob for output in outputs for entry in output.outputs[0].logprobs[0].values()]
        if not any(seen):
            raise ConfigError(
                "this version of vLLM does not give log-probabilities before --top-p and --top-k",
                hint="use --top-p 1 --top-k 0, or --engine hf",
            )
        self._records_unfiltered = True

    def _check_whole(self) -> None:
        if not self._whole:
            raise WorkError("vLLM was left with half of new weights, and draws nothing")

    def _reset_prefix_cache(self) -> None:
        if not self._run(self._engine.reset_prefix_cache()):
            raise WorkError("vLLM kept what it had computed under the old weights")

    def _run(self, task: Coroutine[Any, Any, Result]) -> Result:
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            return self._loop.run(task)
        except (EngineDeadError, EngineGenerateError, VLLMValidationError) as error:
            raise WorkError(f"vLLM failed: {error}", hint="what its processes said stands above") from error

    def _call_workers(self, method: str, **arguments: Any) -> Any:
        return self._run(self._engine.collective_rpc(method, kwargs=arguments))
