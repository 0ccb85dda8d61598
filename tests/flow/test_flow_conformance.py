"""Families 01 to 05 and the scores of 10 of the recorded vectors: what the published code computes.

Where rlfr differs on purpose, the test says how and checks the corrected value.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recorded import assert_matches, load_recorded, recorded_network
from rlfr_cli.flow import matching
from rlfr_cli.flow.choices import Context, Normalise
from rlfr_cli.flow.deviation import DeviationResult, deviations, layer_errors, score_weights
from rlfr_cli.flow.matching import accumulate_matching_gradients, matching_errors, matching_loss
from rlfr_cli.flow.pairing import PairedLatents, Pairing, TappedLayers, pair_tokens
from rlfr_cli.flow.shaping import ShapingOptions, shape_scores
from rlfr_cli.flow.velocity import VelocityNetwork

CONTEXTS = {"token_pre": Context.NEXT, "token_post": Context.PREVIOUS, "identity": Context.SELF}


# 01: the velocity network


@pytest.mark.parametrize("name", ["d32_L2_n40_s11", "d56_L3_n57_s13", "d64_L4_n96_s12"])
def test_velocity(shared: Path, name: str) -> None:
    recorded, _ = load_recorded(shared, f"01_velocity_{name}")
    network = recorded_network(recorded)
    with torch.no_grad():
        time = network.embed_times(recorded["t"])
        layer = network.embed_layers(recorded["layer"])
        condition = network.embed_condition(recorded["cond"])
        modulation = network.modulate(time + layer + condition)
        after_block0 = network.blocks[0](network.input_proj(recorded["x"]), modulation.blocks[0])
        velocity = network(recorded["x"], recorded["t"], recorded["cond"], recorded["layer"])
    assert_matches(time, recorded["time_embed"])
    assert_matches(layer, recorded["layer_embed"])
    assert_matches(condition, recorded["cond_embed"])
    assert_matches(after_block0, recorded["after_block0"])
    assert_matches(velocity, recorded["velocity"])


@pytest.mark.parametrize("autocast", [False, True])
def test_velocity_in_bfloat16(shared: Path, autocast: bool) -> None:
    """With bfloat16 weights, and with float32 weights under autocast. Our frequencies stay float32."""
    recorded, _ = load_recorded(shared, "01_velocity_bf16_d64_L4_n64_s14")
    network = recorded_network(recorded).to(torch.float32 if autocast else torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        velocity = network(recorded["x"], recorded["t"], recorded["cond"], recorded["layer"])
    wanted = recorded["velocity"].float()
    assert velocity.dtype == torch.bfloat16
    assert (velocity.float() - wanted).abs().max() <= 2e-2 * wanted.abs().max()


# 02: the fitting loss


def check_gradients(network: VelocityNetwork, recorded: dict[str, Tensor]) -> None:
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    assert_matches(norm[None], recorded["grad_norm"], 1e-4)
    for key in recorded:
        if key.startswith("grad/"):
            assert_matches(gradients[key.removeprefix("grad/model.")], recorded[key], 1e-4)


@pytest.mark.parametrize("name", ["d48_L3_n120_s21", "d32_L2_n64_s22"])
def test_fitting_loss(shared: Path, name: str) -> None:
    recorded, info = load_recorded(shared, f"02_fm_loss_{name}")
    network = recorded_network(recorded)
    times = recorded["u"].sigmoid()
    assert_matches(times, recorded["t"])
    errors = matching_errors(
        network, recorded["target"], recorded["cond"], times, recorded["noise"], info["hyper"]["layer"]
    )
    loss = matching_loss(errors, recorded.get("mask"))
    loss.backward()
    assert_matches(loss.detach()[None], recorded["loss"])
    check_gradients(network, recorded)


@pytest.mark.parametrize("name", ["token_post_1_mul3_d32_s24", "token_pre_1_mul2_d32_s23"])
def test_fitting_loss_of_a_batch(shared: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairing, label mask, repeats and the mean over layers, with the recorded draws put in for ours.

    A label mask is a weight here: tokens without a label weigh nothing, and nothing is drawn for them.
    """
    recorded, info = load_recorded(shared, f"02_fm_hook_{name}")
    hyper = info["hyper"]
    num_rows, length, repeats = hyper["B"], hyper["S"], hyper["flow_batch_mul"]
    latents_NJD = recorded["hidden"].permute(1, 2, 0, 3).reshape(num_rows * length, -1, hyper["dim"])
    pairing = Pairing(CONTEXTS[hyper["modes"][0]], hyper["shifts"][0])
    paired = pair_tokens(torch.arange(num_rows + 1) * length, 0, [pairing])
    weights_M = (recorded["labels"].flatten()[paired.targets_M] != -100).float()
    layers = TappedLayers(tuple(hyper["hook_layers"]), hyper["num_hidden_layers"])
    num_hooks = len(layers.indices)

    def replay(key: str) -> list[Tensor]:
        """The draws in the order in which they are asked for, of the tokens that weigh something."""
        draws = [recorded[f"{key}.{hook}.0"].unflatten(0, (repeats, -1)) for hook in range(num_hooks)]
        return [draw[weights_M > 0] for hook_draws in draws for draw in hook_draws]

    noise, times = iter(replay("noise")), iter([u.sigmoid() for u in replay("u")])
    monkeypatch.setattr(matching.torch, "randn", lambda *size, **kwargs: next(noise).flatten())
    network = recorded_network(recorded)
    result = accumulate_matching_gradients(
        network,
        PairedLatents(latents_NJD, paired, layers),
        torch.Generator(),
        weights_M=weights_M,
        noise_repeats=repeats,
        draw_times=lambda *_: next(times),
        tokens_per_chunk=5,
    )
    per_layer = (result.errors_MJ * weights_M[:, None]).sum(dim=0) / weights_M.sum()
    assert_matches(per_layer, recorded["loss_per_hook"])
    assert_matches(result.loss[None], recorded["loss"])
    check_gradients(network, recorded)


# 03: deviation and score


@pytest.mark.parametrize("name", ["t0.5_0.8_d48_L3_n107_s32", "t0.8_d48_L3_n100_s31", "t0.9_d48_L3_n114_s33"])
def test_score(shared: Path, name: str) -> None:
    """Differs on purpose: the published score gives every timestep the last one's weight."""
    recorded, info = load_recorded(shared, f"03_rl_score_{name}")
    timesteps = [float(t) for t in info["hyper"]["rewarding_timesteps"].split("+")]
    weights_K = score_weights(timesteps)
    with torch.no_grad():
        errors_NK = layer_errors(
            recorded_network(recorded),
            recorded["target"],
            [recorded["cond"]],
            [recorded["noise"]],
            torch.tensor(timesteps),
            info["hyper"]["layer"],
        )
    for k, t in enumerate(timesteps):
        assert_matches(errors_NK[:, k], recorded[f"single_loss.{t}"])
        assert_matches(errors_NK[:, k] * weights_K[k], recorded[f"single_score.{t}"])
    score_N = (errors_NK * weights_K).mean(dim=1)
    assert_matches(errors_NK.mean(dim=1), recorded["loss"])
    assert_matches(score_N, recorded["score_own_weights"])
    assert_matches(errors_NK.mean(dim=1) * weights_K[-1], recorded["score"])
    gap = (recorded["score"] - score_N).abs().max()
    assert float(gap) == pytest.approx(info["max_abs_score_minus_own_weights"], rel=1e-4, abs=1e-4)
    assert (gap > 1) == (len(timesteps) > 1)


# 04 and the scores of 10: pairing, averaging, alignment


def score_recorded(
    recorded: dict[str, Tensor],
    pairings: list[Pairing],
    noise_of: list[list[Tensor]],
    layers: TappedLayers,
    num_responses_K: Tensor,
) -> tuple[DeviationResult, Tensor]:
    """Score recorded latents [hooks, B, S, D] with the recorded noise [hook][pairing] of all positions.

    Noise differs between pairings there and is shared here, so each pairing is scored alone and averaged.
    Noise that the published code did not draw is NaN: were it used, the test would fail.
    """
    attended_BS = recorded["attention_mask"].bool()
    lengths_B = attended_BS.sum(dim=1)
    latents_NJD = recorded["hidden"].permute(1, 2, 0, 3)[attended_BS]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_B.cumsum(0)])
    paired = pair_tokens(offsets, lengths_B - num_responses_K, pairings)
    results = []
    for p, pairing in enumerate(pairings):
        alone = replace(paired, conditions_PM=paired.conditions_PM[p : p + 1])

        def noise(sequence: int, index: int, draw: int, p: int = p, step: int = pairing.step) -> Tensor:
            drawn = noise_of[layers.indices.index(index)][p].unflatten(0, (len(lengths_B), -1))[sequence]
            before, after = (-step, 0) if step < 0 else (0, step)
            rows_SD = torch.nn.functional.pad(drawn, (0, 0, before, after), value=torch.nan)
            return rows_SD[attended_BS[sequence]][-int(num_responses_K[sequence]) :]

        pairs = PairedLatents(latents_NJD, alone, layers)
        results.append(deviations(recorded_network(recorded), pairs, noise, tokens_per_chunk=7))
    mean = DeviationResult(
        *(
            torch.stack([getattr(result, field) for result in results]).mean(dim=0)
            for field in ("deviation_M", "score_M", "errors_MJK")
        )
    )
    return mean, paired.valid_K


@pytest.mark.parametrize(
    "name",
    [
        "identity_1_d32_s45",
        "token_post_1_d32_s42",
        "token_post_2_d32_s44",
        "token_pre+token_post_1+1_d32_s46",
        "token_pre_1_d32_s41",
        "token_pre_2_d32_s43",
    ],
)
def test_pairing(shared: Path, name: str) -> None:
    """Differs on purpose: a token without a neighbour has no score here and a 0 there, which is averaged too
    when another pairing has one."""
    recorded, info = load_recorded(shared, f"04_pairing_{name}")
    hyper = info["hyper"]
    pairings = [Pairing(CONTEXTS[m], s) for m, s in zip(hyper["modes"], hyper["shifts"], strict=True)]
    layers = TappedLayers(tuple(hyper["hook_layers"]), hyper["num_hidden_layers"])
    noise_of = [[recorded[f"noise.{hook}.{p}"] for p in range(len(pairings))] for hook in range(len(layers.indices))]
    num_actions_K = torch.full((hyper["B"],), hyper["num_actions"])
    result, valid_K = score_recorded(recorded, pairings, noise_of, layers, num_actions_K)

    unpaired = max(pairing.step for pairing in pairings) if pairings[0].step > 0 else 0
    valid_BA = torch.ones(hyper["B"], hyper["num_actions"], dtype=torch.bool)
    valid_BA[:, hyper["num_actions"] - unpaired :] = False
    assert torch.equal(valid_K, valid_BA.flatten())
    assert_matches(result.deviation_M, recorded["action_flow_loss"][valid_BA])
    assert_matches(result.score_M, recorded["action_flow_score"][valid_BA])
    if len(pairings) == 1:
        assert (recorded["action_flow_score"][~valid_BA] == 0).all()


@pytest.mark.parametrize("name", ["token_post_1_d32_layers8_s101", "token_pre_1_d32_layers8_s102"])
def test_scores_end_to_end(shared: Path, name: str) -> None:
    """Differs on purpose: with `next`, the last token of a padded response is paired with padding there."""
    recorded, info = load_recorded(shared, f"10_e2e_{name}")
    hyper = info["hyper"]
    pairing = Pairing(CONTEXTS[hyper["flow_context_mode"]], int(hyper["flow_shift"]))
    layers = TappedLayers(tuple(hyper["hook_layers"]), hyper["qwen2"]["num_hidden_layers"])
    assert list(layers.positions) == hyper["layer_fractions"]
    noise_of = [[recorded[f"noise.{hook}"]] for hook in range(len(layers.indices))]
    actions_BA = recorded["action_mask"].bool()
    result, valid_K = score_recorded(recorded, [pairing], noise_of, layers, actions_BA.sum(dim=1))

    valid_BA = actions_BA.clone()
    if pairing.step > 0:
        for row, length in enumerate(actions_BA.sum(dim=1).tolist()):
            valid_BA[row, length - pairing.step : length] = False
        paired_with_padding = recorded["action_flow_score"][1, int(actions_BA[1].sum()) - 1]
        assert paired_with_padding != 0
    assert torch.equal(valid_K, valid_BA[actions_BA])
    assert_matches(result.deviation_M, recorded["action_flow_loss"][valid_BA])
    assert_matches(result.score_M, recorded["action_flow_score"][valid_BA])


# 05: shaping


def shape_padded(scores_BA: Tensor, mask_BA: Tensor, **options: object) -> Tensor:
    mask_BA = mask_BA.bool()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask_BA.sum(dim=1).cumsum(0)])
    packed_K = scores_BA[mask_BA]
    settings = ShapingOptions(**({"threshold": 0, "top_k": 0} | options))  # type: ignore[arg-type]
    shaped = shape_scores(packed_K, torch.ones_like(packed_K, dtype=torch.bool), offsets, settings)
    out_BA = torch.zeros_like(scores_BA)
    out_BA[mask_BA] = shaped.shaped_K
    return out_BA


@pytest.mark.parametrize("rows", ["padded", "unpadded", "mixed"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_minmax(shared: Path, rows: str, signed: bool, power: float) -> None:
    """Differs on purpose: the published minimum is the second smallest value of a row without padding (of one
    value: NaN), and the published power loses the sign or gives NaN.
    """
    recorded, _ = load_recorded(shared, "05_norm_post_s51")
    scores_BA, mask_BA = recorded[f"in/{rows}/score"], recorded[f"in/{rows}/mask"]
    normalise = Normalise.MINMAX_SIGNED if signed else Normalise.MINMAX
    ours_BA = shape_padded(scores_BA, mask_BA, normalise=normalise, power=power)
    gamma = "1" if power == 1 else str(power)
    theirs_BA = recorded[f"norm/{rows}/minmax/bil{int(signed)}/gamma{gamma}"]
    for ours, theirs, scores, mask in zip(ours_BA, theirs_BA, scores_BA, mask_BA.bool(), strict=True):
        values = scores[mask]
        wanted = (values - values.min()) / (values.max() - values.min())
        wanted = 2 * wanted - 1 if signed else wanted
        wanted = wanted.sign() * wanted.abs() ** power
        if len(values) == 1:
            assert ours[mask].tolist() == [0.0]
            assert theirs[mask].isnan().all()
            continue
        assert_matches(ours[mask], wanted)
        if not mask.all() and power == 1:
            assert_matches(ours[mask], theirs[mask])
        if not mask.all() and power == 2:
            assert_matches(ours[mask].abs(), theirs[mask])
        if mask.all() and not signed and power == 1:
            assert theirs[mask].min() < 0 <= ours[mask].min()
            second_smallest = values.sort().values[1]
            assert_matches((values - second_smallest) / (values.max() - second_smallest), theirs[mask])


@pytest.mark.parametrize("rows", ["constant", "one_action"])
@pytest.mark.parametrize("normalise", [Normalise.MINMAX, Normalise.MINMAX_SIGNED])
def test_constant_rows_are_zero(shared: Path, rows: str, normalise: Normalise) -> None:
    """Differs on purpose: the published result is NaN."""
    recorded, _ = load_recorded(shared, "05_norm_post_s51")
    mask_BA = recorded[f"in/{rows}/mask"]
    ours_BA = shape_padded(recorded[f"in/{rows}/score"], mask_BA, normalise=normalise)
    signed = int(normalise is Normalise.MINMAX_SIGNED)
    assert (ours_BA == 0).all()
    assert recorded[f"norm/{rows}/minmax/bil{signed}/gamma1"][mask_BA.bool()].isnan().all()


@pytest.mark.parametrize("rows", ["padded", "unpadded"])
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("none", {}),
        ("thr0.6", {"threshold": 0.6}),
        ("top6", {"top_k": 6}),
        ("thr0.6_top6", {"threshold": 0.6, "top_k": 6}),
        ("thr0.3_top29", {"threshold": 0.3, "top_k": 29}),
    ],
)
def test_threshold_and_top_k(shared: Path, rows: str, case: str, options: dict[str, float]) -> None:
    """On the recorded normalised scores every row agrees, with the fault of their minimum in both."""
    recorded, _ = load_recorded(shared, "05_norm_post_s51")
    normalised_BA, mask_BA = recorded[f"postin/{rows}/uni"], recorded[f"in/{rows}/mask"]
    ours_BA = shape_padded(normalised_BA, mask_BA, normalise=Normalise.NONE, **options)
    assert_matches(ours_BA, recorded[f"post/{rows}/{case}"])


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("bil_thr0.6", {"threshold": 0.6}),
        ("bil_top6", {"top_k": 6}),
        ("bil_thr0.3_top6", {"threshold": 0.3, "top_k": 6}),
        ("bil_thr0.3_top7", {"threshold": 0.3, "top_k": 7}),
    ],
)
def test_signed_threshold_and_top_k(shared: Path, case: str, options: dict[str, float]) -> None:
    """Rows with padding agree, from the raw score on. Differs on purpose: with fewer positive (or negative)
    values than half of top_k, the published code fills up from the other side or from zeros."""
    recorded, _ = load_recorded(shared, "05_norm_post_s51")
    mask_BA = recorded["in/padded/mask"].bool()
    ours_BA = shape_padded(recorded["in/padded/score"], mask_BA, normalise=Normalise.MINMAX_SIGNED, **options)
    theirs_BA = recorded[f"post/padded/{case}"]
    padded_B = ~mask_BA.all(dim=1)
    half = options.get("top_k", 99) // 2
    for ours, theirs, mask in zip(ours_BA[padded_B], theirs_BA[padded_B], mask_BA[padded_B], strict=True):
        assert_matches(ours[mask], theirs[mask])
        assert (ours > 0).sum() <= half
        assert (ours < 0).sum() <= half
    assert int(padded_B.sum()) == 3
