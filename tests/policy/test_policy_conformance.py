"""Family 10 of the recorded vectors: token ids to latents and log-probabilities, with our loading of their policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from recorded import assert_matches, load_recorded
from rlfr_cli.policy.forward import TokenSequence, decoder_latents, forward_batches
from rlfr_cli.policy.loading import load_decoder, load_policy
from rlfr_cli.policy.tapping import tap, tapped_layers
from tiny_models import make_tokenizer
from tiny_policies import CPU

NAMES = ["token_post_1_d32_layers8_s101", "token_pre_1_d32_layers8_s102"]


@pytest.fixture(params=NAMES)
def recorded(request: pytest.FixtureRequest, shared: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, info = load_recorded(shared, f"10_e2e_{request.param}")
    return tensors, info["hyper"]


def write_model_folder(folder: Path, tensors: dict[str, Tensor], hyper: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hyper["qwen2"]))
    weights = {name.removeprefix("lm/"): tensor for name, tensor in tensors.items() if name.startswith("lm/")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer().save_pretrained(folder)
    return folder


def recorded_sequences(tensors: dict[str, Tensor], hyper: dict[str, Any]) -> list[TokenSequence]:
    """Rows are prompts padded on the left up to ``input_len``, then responses padded on the right."""
    start = hyper["input_len"]
    return [
        TokenSequence(row[start - prompt : start].tolist(), row[start : start + response].tolist())
        for row, prompt, response in zip(
            tensors["sequences"], hyper["prompt_lens"], hyper["response_lens"], strict=True
        )
    ]


def test_latents_of_the_whole_row_at_the_hooked_layers(
    recorded: tuple[dict[str, Tensor], dict[str, Any]], tmp_path: Path
) -> None:
    """The whole prompt and the whole response of each row, from the truncated decoder."""
    tensors, hyper = recorded
    folder = write_model_folder(tmp_path / "model", tensors, hyper)
    layers = tapped_layers(hyper["qwen2"]["num_hidden_layers"], hyper["layer_fractions"])
    assert list(layers) == hyper["hook_layers"]
    decoder = load_decoder(folder, CPU, layers)
    start = hyper["input_len"]
    for row, sequence in enumerate(recorded_sequences(tensors, hyper)):
        prompt, response = len(sequence.prompt), len(sequence.response)
        with tap(decoder, layers) as taps:
            latents = decoder_latents(decoder, taps, [sequence], prompt, torch.device("cpu"))[0]
        wanted = tensors["hidden"][:, row, start - prompt : start + response]
        assert_matches(latents.transpose(0, 1), wanted, relative=1e-5)


def test_latents_and_logprobs_of_one_padded_batch(
    recorded: tuple[dict[str, Tensor], dict[str, Any]], tmp_path: Path
) -> None:
    tensors, hyper = recorded
    policy = load_policy(write_model_folder(tmp_path / "model", tensors, hyper), CPU)
    sequences = recorded_sequences(tensors, hyper)
    batches = list(forward_batches(policy, sequences, temperature=1.0, tapped=hyper["hook_layers"], num_prompt=2))
    assert len(batches) == 1
    start = hyper["input_len"]
    for place, row in enumerate(batches[0].indices):
        response = len(sequences[row].response)
        wanted = tensors["hidden"][:, row, start - 2 : start + response]
        assert_matches(batches[0].latents[place].transpose(0, 1), wanted, relative=1e-5)
        assert_matches(batches[0].logprobs[place], tensors["action_log_probs"][row, :response], relative=1e-5)
