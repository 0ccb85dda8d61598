"""Family 10 of the recorded vectors in one go: token ids to scores, through our policy, tapping, pairing and flow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from policy.test_policy_conformance import NAMES, recorded_sequences, write_model_folder
from recorded import assert_matches, load_recorded, recorded_network
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.deviation import deviations
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.pairing import Pairing, TappedLayers
from rlfr_cli.policy.forward import decoder_latents, forward_batches
from rlfr_cli.policy.loading import load_decoder, load_policy
from rlfr_cli.policy.tapping import tap, tapped_layers
from tiny_policies import CPU

CONTEXTS = {"token_pre": Context.NEXT, "token_post": Context.PREVIOUS}


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_token_ids_to_scores(shared: Path, tmp_path: Path, name: str, truncated: bool) -> None:
    """By the whole policy, as in training, and by the decoder up to the last tapped block, as in `rlfr score`."""
    tensors, info = load_recorded(shared, f"10_e2e_{name}")
    hyper = info["hyper"]
    folder = write_model_folder(tmp_path / "model", tensors, hyper)
    num_blocks = hyper["qwen2"]["num_hidden_layers"]
    layers = tapped_layers(num_blocks, hyper["layer_fractions"])
    pairing = Pairing(CONTEXTS[hyper["flow_context_mode"]], int(hyper["flow_shift"]))
    flow = Flow(recorded_network(tensors), TappedLayers(layers, num_blocks), (pairing,))
    sequences = recorded_sequences(tensors, hyper)

    latents: list[Tensor] = [torch.empty(0)] * len(sequences)
    if truncated:
        decoder = load_decoder(folder, CPU, layers)
        with tap(decoder, layers) as taps:
            latents = decoder_latents(decoder, taps, sequences, flow.num_prompt, torch.device("cpu"))
    else:
        for batch in forward_batches(load_policy(folder, CPU), sequences, temperature=1.0, tapped=layers):
            for index, of_row in zip(batch.indices, batch.latents, strict=True):
                latents[index] = of_row

    start, step = hyper["input_len"], pairing.step

    def recorded_noise(row: int, layer: int, draw: int) -> Tensor:
        """Theirs drew one row a position that has a neighbour, padding included; what it did not draw is NaN."""
        drawn = tensors[f"noise.{layers.index(layer)}"].unflatten(0, (len(sequences), -1))[row]
        before, after = (-step, 0) if step < 0 else (0, step)
        rows_SD = torch.nn.functional.pad(drawn, (0, 0, before, after), value=torch.nan)
        return rows_SD[start : start + len(sequences[row].response)]

    pairs = flow.pair(latents)
    result = deviations(flow.network, pairs, recorded_noise, timesteps=(float(hyper["rewarding_timesteps"]),))
    lengths = [len(sequence.response) for sequence in sequences]
    scores = pairs.paired.over_responses(result.score_M, torch.nan).split(lengths)
    found, wanted = [], []
    for row, scores_T in enumerate(scores):
        valid_T = ~scores_T.isnan()
        without_neighbour = max(step, 0)
        assert valid_T.tolist() == [True] * (lengths[row] - without_neighbour) + [False] * without_neighbour
        found.append(scores_T[valid_T])
        wanted.append(tensors["action_flow_score"][row, : lengths[row]][valid_T])
    assert_matches(torch.cat(found), torch.cat(wanted))
