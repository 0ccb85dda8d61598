"""Every setting of a flow, written to its file and read back: scores are those of a loop that spells it out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlfr_cli.artifacts.fingerprint import ModelFingerprint
from rlfr_cli.config.flow import NetworkConfig, Normalisation
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.flow import Flow
from rlfr_cli.flow.noise import response_noise
from rlfr_cli.flow.normalisation import LatentStatistics
from rlfr_cli.flow.velocity import VelocityNetwork
from rlfr_cli.stages.flows import load_flow, new_flow, new_header, sizes_of, write_flow

CPU = torch.device("cpu")
HIDDEN, NUM_BLOCKS = 12, 8
MODEL = ModelFingerprint(
    model_type="qwen2", num_blocks=NUM_BLOCKS, hidden_size=HIDDEN, vocab_size=9, weights_sha256="ab" * 32
)
STEP = {Context.NEXT: 1, Context.PREVIOUS: -1, Context.SELF: 0}


@dataclass(frozen=True)
class Setting:
    """One way to make a flow and to score with it."""

    context: tuple[Context, ...] = (Context.NEXT,)
    shift: int = 1
    layers: tuple[int, ...] = (2, 5)
    timesteps: tuple[float, ...] = (0.8,)
    time_scale: float = 1.0
    normalised: bool = False


SETTINGS = {
    "previous": Setting(context=(Context.PREVIOUS,)),
    "self": Setting(context=(Context.SELF,)),
    "next by 3": Setting(shift=3),
    "previous by 2": Setting(context=(Context.PREVIOUS,), shift=2),
    "all three": Setting(context=(Context.NEXT, Context.PREVIOUS, Context.SELF)),
    "both by 2": Setting(context=(Context.PREVIOUS, Context.NEXT), shift=2),
    "one layer": Setting(layers=(7,)),
    "layers out of order": Setting(layers=(6, 0, 3)),
    "all layers": Setting(layers=tuple(range(NUM_BLOCKS))),
    "three timesteps": Setting(timesteps=(0.2, 0.8, 0.95)),
    "time scale": Setting(time_scale=1000.0),
    "normalised": Setting(normalised=True),
    "everything": Setting((Context.PREVIOUS, Context.SELF), 2, (5, 1), (0.5, 0.9), 100.0, True),
}


def saved_flow(setting: Setting, path: Path) -> tuple[Flow, Flow]:
    """A random flow of this setting, and the same one after its file."""
    config = NetworkConfig(
        context=setting.context,
        shift=setting.shift,
        width=10,
        depth=2,
        time_scale=setting.time_scale,
        normalisation=Normalisation.CHANNEL if setting.normalised else Normalisation.NONE,
    )
    header = new_header(config, model=MODEL, layer_indices=setting.layers, rms_epsilon=1e-5)
    flow = new_flow(header, 0, CPU)
    generator = torch.Generator().manual_seed(0)
    for parameter in flow.network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    if setting.normalised:
        shape = (len(setting.layers), HIDDEN)
        mean = 3 * torch.randn(shape, generator=generator)
        flow.statistics = LatentStatistics(mean, torch.rand(shape, generator=generator) + 0.5)
    write_flow(path, header, flow)
    read, loaded = load_flow(path, CPU)
    assert read == header
    return flow, loaded


def latents_of(flow: Flow) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (len(flow.layers.indices), HIDDEN)
    return [2 * torch.randn(flow.num_prompt + tokens, *shape, generator=generator) for tokens in (7, 1, 4)]


@torch.no_grad()
def score_by_loop(flow: Flow, setting: Setting, latents: Tensor, key: str) -> list[float | None]:
    """Token by token. The time scale is put on the numbers given to a network that has none."""
    plain = VelocityNetwork(replace(flow.network.sizes, time_scale=1.0))
    plain.load_state_dict(flow.network.state_dict())
    num_prompt = max(1, *(setting.shift * abs(STEP[context]) for context in setting.context))
    assert flow.num_prompt == num_prompt
    if setting.normalised:
        assert flow.statistics is not None
        latents = (latents - flow.statistics.mean_JD) / flow.statistics.std_JD
    tokens = len(latents) - num_prompt
    scores: list[float | None] = []
    for token in range(tokens):
        neighbours = [num_prompt + token + STEP[context] * setting.shift for context in setting.context]
        if not all(0 <= place < len(latents) for place in neighbours):
            scores.append(None)
            continue
        values = []
        for column, layer in enumerate(setting.layers):
            target = latents[num_prompt + token, column]
            noise = response_noise(3, key, layer, 0, num_tokens=tokens, size=HIDDEN)[token]
            for place in neighbours:
                for t in setting.timesteps:
                    velocity = plain(
                        (t * target + (1 - t) * noise)[None],
                        torch.tensor([t * setting.time_scale]),
                        latents[place, column][None],
                        torch.tensor([layer / NUM_BLOCKS * setting.time_scale]),
                    )[0]
                    values.append(t / (1 - t) * float((velocity - (target - noise)).square().mean()))
        scores.append(sum(values) / len(values))
    return scores


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_of_a_saved_flow_are_those_of_a_loop(name: str, tmp_path: Path) -> None:
    setting = SETTINGS[name]
    flow, loaded = saved_flow(setting, tmp_path / "flow.safetensors")
    latents, keys = latents_of(loaded), ["a", "b", "c"]
    results = []
    for each in (flow, loaded):
        pairs = each.pair(latents)
        result = each.deviations(pairs, keys, seed=3, timesteps=setting.timesteps)
        results.append(pairs.paired.over_responses(result.score_M, torch.nan))
    assert torch.equal(results[0].nan_to_num(-1), results[1].nan_to_num(-1))
    ours = [None if value != value else value for value in results[1].tolist()]
    wanted = [
        value
        for latent, key in zip(latents, keys, strict=True)
        for value in score_by_loop(loaded, setting, latent, key)
    ]
    assert [value is None for value in ours] == [value is None for value in wanted]
    known = [(a, b) for a, b in zip(ours, wanted, strict=True) if a is not None and b is not None]
    assert len(known) >= 4
    assert [a for a, _ in known] == pytest.approx([b for _, b in known], rel=1e-4)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "everything"])
def test_each_setting_changes_the_score(name: str, tmp_path: Path) -> None:
    """The same weights and latents under the default setting score otherwise: no setting is lost on the way."""
    setting = SETTINGS[name]
    _, flow = saved_flow(setting, tmp_path / "flow.safetensors")
    sizes = replace(flow.network.sizes, time_scale=1.0)
    network = VelocityNetwork(sizes)
    network.load_state_dict(flow.network.state_dict())
    default = Setting(layers=setting.layers)
    plain = Flow(network, dataclasses.replace(flow.layers), saved_flow(default, tmp_path / "plain")[1].pairings)
    latents = torch.randn(flow.num_prompt + 9, len(setting.layers), HIDDEN, generator=torch.Generator().manual_seed(2))
    found = []
    for each, timesteps in ((flow, setting.timesteps), (plain, default.timesteps)):
        pairs = each.pair([latents], flow.num_prompt)
        score_M = each.deviations(pairs, ["a"], seed=3, timesteps=timesteps).score_M
        found.append(pairs.paired.over_responses(score_M, torch.nan)[:6])
    share_of_equal = float(torch.isclose(found[0], found[1], rtol=1e-3).float().mean())
    # Which layers there are is the same in both.
    assert share_of_equal == 1 if "layer" in name else share_of_equal < 0.2


def test_sizes_are_read_from_the_header(tmp_path: Path) -> None:
    setting = SETTINGS["everything"]
    _, flow = saved_flow(setting, tmp_path / "flow.safetensors")
    header, _ = load_flow(tmp_path / "flow.safetensors", CPU)
    assert flow.network.sizes == sizes_of(header)
    assert (header.time_scale, header.rms_epsilon, header.normalisation) == (100.0, 1e-5, "channel")
    assert header.pairings == ({"context": "previous", "shift": 2}, {"context": "self", "shift": 1})
    assert (header.layer_indices, header.num_blocks) == ((5, 1), NUM_BLOCKS)
