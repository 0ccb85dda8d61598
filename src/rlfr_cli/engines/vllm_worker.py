"""What rlfr adds to vLLM's workers, the processes that hold the model: new weights, and unfiltered log-probabilities.

vLLM mixes the class below into its own worker (``worker_extension_cls``) and calls it by name on every worker
(``collective_rpc``). ``self`` is vLLM's worker. Written against vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import safe_open


class WorkerExtension:
    """Methods of vLLM's workers; their names say whose they are."""

    def rlfr_load_weights(self: Any, files: Sequence[str]) -> None:
        """Take the weights of safetensors files, named as in a checkpoint of the model.

        Raises:
            ValueError: they leave parameters of the model as they were, of which vLLM itself only warns.
        """
        model = self.get_model()
        wanted = {name for name, _ in model.named_parameters()}
        loaded: set[str] = set()
        load_weights = model.load_weights

        def load_and_note(weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
            loaded.update(load_weights(weights) or ())
            return loaded

        model.load_weights = load_and_note
        try:
            self.reload_weights(weights_iterator=read_tensors(files))
        finally:
            del model.load_weights  # the class's own again
        pack_output_head(model)
        missing = sorted(wanted - loaded)
        if missing and self.model_config.quantization is None:
            raise ValueError(f"the weights lack {len(missing)} of {len(wanted)} parameters, such as {missing[0]}")

    def rlfr_record_unfiltered_logprobs(self: Any) -> None:
        """From now on record the softmax of logits / temperature before top-k and top-p, and not after them.

        vLLM's "processed" log-probabilities are of what these leave, and its "raw" ones lack the temperature.
        """
        sampler = getattr(self.model_runner, "sampler", None)  # only the last pipeline stage has one
        if sampler is not None and hasattr(sampler, "topk_topp_sampler"):
            unfiltered_logprobs_v1(sampler.topk_topp_sampler)
        elif sampler is not None and hasattr(sampler, "_sample_random"):
            unfiltered_logprobs_v2(sampler)


def read_tensors(files: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of these files, one at a time."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no dict: it cannot be iterated)
                yield name, tensors.get_tensor(name)


def pack_output_head(model: Any) -> None:
    """Pack the weights of the output head anew, where a CPU computes with a packed copy.

    vLLM 0.32 does so for layers that a checkpoint names, and a head that is tied to the embedding is not among them:
    it would go on with its old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and isinstance(layer.quant_method, UnquantizedEmbeddingMethod):
            layer.quant_method.process_weights_after_loading(layer)


def unfiltered_logprobs_v1(sampler: Any) -> None:
    """Wrap the last step of vLLM's first sampler, which filters, draws and returns tokens with log-probabilities."""
    draw = sampler.forward

    def forward(logits: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = logits.log_softmax(-1, dtype=torch.float32)  # before draw, which filters in place
        tokens, _ = draw(logits, *others)
        return tokens, logprobs

    sampler.forward = forward


def unfiltered_logprobs_v2(sampler: Any) -> None:
    """Wrap the last step of the sampler of vLLM's second model runner, which returns logits in their place."""
    draw = sampler._sample_random

    def sample_random(logits: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        before = logits.clone()
        tokens, _ = draw(logits, *others)
        return tokens, before

    sampler._sample_random = sample_random
