"""`--context-layer` from latents to training: the condition is another layer's state, and all commands agree on it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlfr_cli.artifacts.flow_file import read_flow, read_flow_header
from rlfr_cli.artifacts.latents import LatentsFolder
from rlfr_cli.artifacts.rollouts import RolloutRow, iter_rollouts
from rlfr_cli.artifacts.scores import ScoreRow, iter_scores
from rlfr_cli.config.diagnose import DiagnoseConfig
from rlfr_cli.config.extract_latents import StoreDtype
from rlfr_cli.config.flow import NetworkConfig, Normalisation
from rlfr_cli.config.train_rl import OnlineConfig, RolloutConfig
from rlfr_cli.errors import ConfigError, MismatchError, OutputInUseError
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.noise import keyed_seed, response_noise
from rlfr_cli.flow.published import to_published
from rlfr_cli.report.show import show
from rlfr_cli.stages import diagnose, extract_latents, fit_flow, score, train_rl
from rlfr_cli.stages.flows import load_flow, sizes_of, write_flow
from rlfr_cli.stages.latent_sequences import LatentSequences
from stages.tiny_stages import TinyArtifacts, extract_config, fit_config, score_config, train_config

CPU = torch.device("cpu")
CONTEXTS = ("final-norm", "7", "2")  # the final normed state, a block above the targets, and one of these
NETWORK: dict[str, Any] = {"width": 24, "depth": 1}


def context_latents(tiny: TinyArtifacts, out: Path, *context: str, **options: Any) -> dict[str, Any]:
    values = {"rollouts": tiny.rollouts, "layer_index": (2, 5), "store": StoreDtype.FLOAT32, "context_layer": context}
    return extract_latents.run(extract_config(tiny.policy, out, **{**values, **options}))


def fit(latents: Path | list[Path], out: Path, context: str | None, **options: Any) -> dict[str, Any]:
    network = NetworkConfig(**NETWORK, context_layer=context, **options.pop("network", {}))
    return fit_flow.run(fit_config(latents, out, network=network, **{"optimiser": {"steps": 4}, **options}))


def scores_of(tiny: TinyArtifacts, flow: Path, out: Path, **options: Any) -> list[ScoreRow]:
    """Of the rollouts, unless latents are given."""
    values: dict[str, Any] = {} if "latents" in options else {"model": str(tiny.policy), "rollouts": tiny.rollouts}
    score.run(score_config(flow, out, **values, **options))
    return list(iter_scores(out))


def apart(rows: list[ScoreRow], others: list[ScoreRow]) -> float:
    """Largest difference of two scores of a token."""
    pairs = zip(rows, others, strict=True)
    return max(float(np.abs(np.subtract(a.score[:-1], b.score[:-1])).max()) for a, b in pairs)


def hooked_states(model: Any, row: RolloutRow) -> torch.Tensor:
    """Outputs of blocks 2, 5 and 7 and of the last norm [response tokens and one before, 4, hidden], by plain hooks."""
    kept: dict[int, torch.Tensor] = {}
    modules = [*(model.model.layers[block] for block in (2, 5, 7)), model.model.norm]
    handles = [
        module.register_forward_hook(
            lambda _module, _inputs, output, place=place: kept.update(
                {place: output[0] if output.ndim == 3 else output}
            )
        )
        for place, module in enumerate(modules)
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([[*row.prompt_token_ids, *row.response_token_ids]]))
    for handle in handles:
        handle.remove()
    return torch.stack([kept[place] for place in range(4)], dim=1)[len(row.prompt_token_ids) - 1 :]


@pytest.fixture(scope="module")
def latents(tiny: TinyArtifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks 2 and 5, and behind them block 7 and the final normed state."""
    out = tmp_path_factory.mktemp("context") / "latents"
    context_latents(tiny, out, "7", "2", "final-norm", "7")
    return out


@pytest.fixture(scope="module")
def flows(tiny: TinyArtifacts, latents: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A flow for each of ``CONTEXTS``, fitted for long enough that the condition matters."""
    folder = tmp_path_factory.mktemp("flows")
    for name in CONTEXTS:
        fit(latents, folder / f"{name}.safetensors", name, optimiser={"steps": 40, "learning_rate": 0.01})
    return {name: folder / f"{name}.safetensors" for name in CONTEXTS}


# Latents


def test_context_states_follow_the_targets_and_are_those_of_plain_hooks(tiny: TinyArtifacts, latents: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.policy)
    folder, own = LatentsFolder(latents), LatentsFolder(tiny.latents)
    assert (folder.info.layer_indices, folder.info.context_layers) == ((2, 5), ("7", "final-norm"))
    rows = iter_rollouts(tiny.rollouts)
    for shard, without in zip(folder.iter_shards(), own.iter_shards(), strict=True):
        torch.testing.assert_close(shard.latents_NJD[:, :2], without.latents_NJD, atol=1e-4, rtol=1e-4)
        for index in range(shard.num_sequences):
            stored, _ = shard.sequence(index)
            torch.testing.assert_close(stored, hooked_states(model, next(rows)), atol=1e-4, rtol=1e-4)


def test_no_more_blocks_run_than_the_states_need(tiny: TinyArtifacts, tmp_path: Path) -> None:
    plans = [
        context_latents(tiny, tmp_path, *names, dry_run=True) for names in ((), ("1", "2"), ("6",), ("final-norm",))
    ]
    assert [plan["blocks_run"] for plan in plans] == [6, 6, 7, 8]
    assert [plan["context_layers"] for plan in plans] == [[], [1], [6], ["final-norm"]]
    assert plans[0]["bytes"] < plans[1]["bytes"] == plans[2]["bytes"] == plans[3]["bytes"]


@pytest.mark.parametrize("name", ["8", "last", "-1"])
def test_states_that_no_model_has_are_refused(tiny: TinyArtifacts, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"--context-layer .*{name}"):
        context_latents(tiny, tmp_path / "l", name)
    with pytest.raises(ConfigError, match=f"--context-layer .*{name}"):
        fit(tiny.latents, tmp_path / "f", name)
    with pytest.raises(ConfigError, match=f"--context-layer .*{name}"):
        one_step(tiny, tmp_path / "r", new_flow=True, network=NetworkConfig(context_layer=name))
    assert list(tmp_path.iterdir()) == []


# Fits


def test_a_fit_says_its_context_layer_and_writes_it_down(
    tiny: TinyArtifacts, latents: Path, flows: dict[str, Path], tmp_path: Path
) -> None:
    assert {name: read_flow_header(path).context_layer for name, path in flows.items()} == {n: n for n in CONTEXTS}
    plan = fit(latents, tmp_path / "f", "final-norm", dry_run=True)
    assert plan["context"] == ["next 1 of final-norm"]
    assert fit(latents, tmp_path / "f", "07", dry_run=True)["context"] == ["next 1 of block 7"]
    assert re.search(r"context_layer +final-norm", "\n".join(show(flows["final-norm"]).lines()))
    assert re.search(r"holds/context_layers +7, final-norm", "\n".join(show(latents).lines()))


def test_further_states_in_the_latents_change_no_fit(tiny: TinyArtifacts, latents: Path, tmp_path: Path) -> None:
    fit(latents, tmp_path / "more.safetensors", None)
    fit(tiny.latents, tmp_path / "own.safetensors", None)
    more, own = (read_flow(tmp_path / f"{name}.safetensors")[1] for name in ("more", "own"))
    for name, tensor in own.items():
        torch.testing.assert_close(more[name], tensor, atol=1e-4, rtol=1e-3)


def test_the_context_decides_what_is_learnt(flows: dict[str, Path]) -> None:
    weights = [read_flow(path)[1]["cond_embed.weight"] for path in flows.values()]
    assert not torch.allclose(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


def test_statistics_cover_the_column_of_the_context(tiny: TinyArtifacts, latents: Path, tmp_path: Path) -> None:
    flow = tmp_path / "flow.safetensors"
    fit(latents, flow, "final-norm", network={"normalisation": Normalisation.CHANNEL})
    data = LatentSequences([latents], 8192)
    whole = data.of_states(data.info.states)
    training, _ = data.split(0.25, 256, 0)
    tokens = torch.cat([whole.read(index)[1:] for index in training]).double()[:, [0, 1, 3]]
    _, tensors = read_flow(flow)
    torch.testing.assert_close(tensors["statistics.mean"].double(), tokens.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tensors["statistics.std"].double(), tokens.std(0, correction=0), atol=1e-4, rtol=1e-3)
    from_rollouts = scores_of(tiny, flow, tmp_path / "rollouts")
    assert apart(from_rollouts, scores_of(tiny, flow, tmp_path / "latents", latents=latents)) < 1e-3


def test_folders_may_hold_other_further_states(tiny: TinyArtifacts, latents: Path, tmp_path: Path) -> None:
    context_latents(tiny, tmp_path / "one", "final-norm", limit=2)
    both = LatentSequences([latents, tmp_path / "one"], 8192).of_states((2, 5, "final-norm"))
    assert torch.equal(both.read(0), both.read(24)), "the same response from each folder"
    fit([latents, tmp_path / "one"], tmp_path / "f.safetensors", "final-norm")
    with pytest.raises(MismatchError, match=r"condition from block 7, and .*one holds block 2, block 5, final-norm"):
        fit([latents, tmp_path / "one"], tmp_path / "g", "7")


def test_latents_without_the_context_layer_are_refused(
    tiny: TinyArtifacts, flows: dict[str, Path], tmp_path: Path
) -> None:
    for refused in (
        lambda: fit(tiny.latents, tmp_path / "f", "final-norm"),
        lambda: scores_of(tiny, flows["final-norm"], tmp_path / "s", latents=tiny.latents),
        lambda: fit_flow.run(fit_config(tiny.latents, tmp_path / "f", init_from=flows["final-norm"])),
    ):
        with pytest.raises(MismatchError, match=r"from final-norm, and .*latents holds block 2, block 5") as caught:
            refused()
        assert "extract latents with --context-layer final-norm" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_init_from_goes_on_with_the_flows_context_layer(latents: Path, flows: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "flow.safetensors"
    fit(latents, out, None, init_from=flows["final-norm"])
    assert read_flow_header(out).context_layer == "final-norm"
    with pytest.raises(ConfigError, match="fitted with context_layer final-norm; --context-layer asks for 7"):
        fit(latents, tmp_path / "g", "7", init_from=flows["final-norm"])


def test_a_published_flow_takes_the_context_layer_that_is_named(
    tiny: TinyArtifacts, latents: Path, flows: dict[str, Path], tmp_path: Path
) -> None:
    header, tensors = read_flow(flows["final-norm"])
    torch.save(to_published(tensors, sizes_of(header)), tmp_path / "flow_model.bin")
    for name in ("final-norm", "7"):
        network = NetworkConfig(context_layer=name)
        config = fit_config(
            latents,
            tmp_path / f"{name}.safetensors",
            network=network,
            init_from=tmp_path / "flow_model.bin",
            optimiser={"steps": 0},
        )
        fit_flow.run(config)
        assert read_flow_header(tmp_path / f"{name}.safetensors").context_layer == name
    wanted = scores_of(tiny, flows["final-norm"], tmp_path / "theirs", latents=latents)
    ours = scores_of(tiny, tmp_path / "final-norm.safetensors", tmp_path / "ours", latents=latents)
    assert apart(ours, wanted) == 0
    with pytest.raises(OutputInUseError, match="flow"):
        scores_of(tiny, tmp_path / "7.safetensors", tmp_path / "ours", latents=latents)


# Scores


@pytest.mark.parametrize("name", CONTEXTS)
def test_rollouts_and_latents_give_the_same_scores_and_the_twin_others(
    tiny: TinyArtifacts, latents: Path, flows: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """The twin has the same weights and takes each target's own layer."""
    rows = scores_of(tiny, flows[name], tmp_path / "rollouts")
    assert apart(rows, scores_of(tiny, flows[name], tmp_path / "latents", latents=latents)) < 1e-4
    header, flow = load_flow(flows[name], CPU)
    write_flow(tmp_path / "twin", replace(header, context_layer=None), flow)
    assert apart(rows, scores_of(tiny, tmp_path / "twin", tmp_path / "of twin", latents=latents)) > 1e-2


def test_a_score_by_hand_from_plain_hooks(tiny: TinyArtifacts, flows: dict[str, Path], tmp_path: Path) -> None:
    row = list(iter_rollouts(tiny.rollouts))[5]
    given = scores_of(tiny, flows["final-norm"], tmp_path)[5]
    states = hooked_states(AutoModelForCausalLM.from_pretrained(tiny.policy), row)[1:]
    network = load_flow(flows["final-norm"], CPU)[1].network
    t, errors = 0.8, []
    for column, layer in enumerate((2, 5)):
        target, condition = states[:-1, column], states[1:, 3]
        name = f"{row.problem_id}\n{row.sample_index}"
        noise = response_noise(0, name, layer, 0, num_tokens=len(states), size=128)[:-1]
        with torch.no_grad():
            velocity = network(t * target + (1 - t) * noise, torch.tensor([t]), condition, torch.tensor([layer / 8]))
        errors.append((velocity - (target - noise)).square().mean(-1))
    wanted = torch.stack(errors).mean(0)
    torch.testing.assert_close(torch.tensor(given.score[:-1]), 4 * wanted, atol=4e-4, rtol=1e-4)


def test_self_of_another_layer_is_no_copy_of_the_target(tiny: TinyArtifacts, latents: Path, tmp_path: Path) -> None:
    flow = tmp_path / "flow.safetensors"
    fit(latents, flow, "final-norm", network={"context": (Context.SELF,)})
    rows = scores_of(tiny, flow, tmp_path / "rollouts")
    assert all(None not in row.score for row in rows)
    assert apart(rows, scores_of(tiny, flow, tmp_path / "latents", latents=latents)) < 1e-4
    manifest = json.loads((tmp_path / "rollouts" / "manifest.json").read_text())
    assert "final-norm" in str(manifest)


# Diagnosis and training


def test_diagnose_measures_targets_beside_their_context(
    tiny: TinyArtifacts, flows: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, real = [], diagnose.measure

    def measure(*args: Any) -> Any:
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr(diagnose, "measure", measure)
    for name, flow in {"ours": flows["final-norm"], "own": tiny.flow}.items():
        config = {"flow": flow, "model": str(tiny.policy), "rollouts": tiny.rollouts, "device": "cpu"}
        diagnose.run(DiagnoseConfig(**config, out=tmp_path / name))
    results, others = (json.loads((tmp_path / name / "diagnosis.json").read_text()) for name in ("ours", "own"))
    assert results["settings"]["context_layer"] == "final-norm"
    assert results["context_agreement"]["between"] == ["next 1 of final-norm", "shuffled within the response"]
    assert 0 < results["context_agreement"]["spearman"] < 0.9999
    rows = scores_of(tiny, flows["final-norm"], tmp_path / "s")
    mean = np.mean([value for row in rows for value in row.score if value is not None])
    assert results["mean_score"] == pytest.approx(mean, rel=1e-4)
    # What is of the targets alone does not see the context's column.
    np.testing.assert_allclose(*(measured.tokens.latent_norm for measured in found), rtol=1e-5)
    assert [row["layer"] for row in results["top_channels"]] == [2, 5]
    for ours, theirs in zip(results["velocity_error"]["rows"], others["velocity_error"]["rows"], strict=True):
        assert ours["gaussian"] == pytest.approx(theirs["gaussian"], rel=1e-5)


def one_step(tiny: TinyArtifacts, out: Path, **options: Any) -> Path:
    values: dict[str, Any] = {"rollout": RolloutConfig(prompts_per_step=3, group_size=4, steps=1)}
    train_rl.run(train_config(tiny.policy, tiny.problems, out, **{**values, **options}))
    return out / "checkpoints" / "step-000001" / "flow.safetensors"


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_training_step_scores_as_score_does_and_teaches_the_flow(
    tiny: TinyArtifacts, flows: dict[str, Path], tmp_path: Path, name: str
) -> None:
    learnt = one_step(tiny, tmp_path / "run", flow=flows[name])
    rollouts = tmp_path / "run" / "rollouts" / "step-000001"
    score.run(
        score_config(flows[name], tmp_path / "s", model=str(tiny.policy), rollouts=rollouts, seed=keyed_seed(0, 1))
    )
    pairs = zip(iter_scores(tmp_path / "s"), iter_rollouts(rollouts), strict=True)
    assert max(float(np.abs(np.subtract(s.score[:-1], r.score[:-1])).max()) for s, r in pairs) < 1e-3
    assert read_flow_header(learnt).context_layer == name
    before, after = read_flow(flows[name])[1], read_flow(learnt)[1]
    assert not torch.equal(before["cond_embed.weight"], after["cond_embed.weight"])


def test_a_new_flow_takes_the_context_layer_of_its_option(tiny: TinyArtifacts, tmp_path: Path) -> None:
    network = NetworkConfig(**NETWORK, context_layer="final-norm")
    options: dict[str, Any] = {"network": network, "layer_fraction": (0.25,), "online": OnlineConfig(flow_warmup=0)}
    learnt = one_step(tiny, tmp_path / "run", new_flow=True, **options)
    assert read_flow_header(learnt).tapped == (2, "final-norm")
    score.run(score_config(learnt, tmp_path / "s", model=str(tiny.policy), rollouts=tiny.rollouts))
    with pytest.raises(ConfigError, match="without --new-flow"):
        train_config(tiny.policy, tiny.problems, tmp_path / "r", flow=learnt, network=network)
