"""`fit-flow --model --rollouts`: the flow of latents that no disk held is that of stored ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from rlfr_cli.artifacts.flow_file import read_flow, read_flow_header
from rlfr_cli.config.common import PromptConfig
from rlfr_cli.config.extract_latents import StoreDtype
from rlfr_cli.config.fit_flow import FitFlowConfig
from rlfr_cli.config.flow import NetworkConfig, Normalisation
from rlfr_cli.errors import ConfigError, InputError, MismatchError, OutputInUseError, Stopped, WorkError
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.noise import keyed_generator
from rlfr_cli.stages import extract_latents, extraction, fit_flow, fitting, live_latents
from rlfr_cli.stages.latent_sequences import LatentSequences
from rlfr_cli.stages.live_latents import open_live_latents
from stages.tiny_stages import TinyArtifacts, bytes_of, extract_config, fit_config, interrupt_after

SHORT = {"steps": 6}
CHANNEL = NetworkConfig(width=24, depth=1, normalisation=Normalisation.CHANNEL)


def live_config(tiny: TinyArtifacts, out: Path, **options: Any) -> FitFlowConfig:
    """Latents of the rollouts as `tiny.latents` holds them: blocks 2 and 5 in float32."""
    source: dict[str, Any] = {"rollouts": tiny.rollouts, "layer_index": (2, 5), "store": StoreDtype.FLOAT32}
    return fit_config((), out, **{"model": str(tiny.policy), **source, **options})


def losses_of(out: Path) -> list[float]:
    """Training and held-out losses in the order logged."""
    lines = (out.with_suffix(".fit") / "metrics.jsonl").read_text().splitlines()
    return [value for line in map(json.loads, lines) for key, value in line.items() if key.endswith("loss")]


def assert_same_fit(live: Path, stored: Path) -> None:
    assert len(losses_of(live)) > 10
    assert losses_of(live) == pytest.approx(losses_of(stored), rel=1e-4)
    (ours, tensors), (theirs, wanted) = read_flow(live), read_flow(stored)
    facts = ("layer_indices", "pairings", "context_layer", "normalisation", "model", "steps", "tokens_seen")
    assert [getattr(ours, fact) for fact in facts] == [getattr(theirs, fact) for fact in facts]
    for name, tensor in wanted.items():
        torch.testing.assert_close(tensors[name], tensor, atol=1e-3, rtol=1e-3)
    rows, judged = (
        json.loads((out.with_suffix(".fit") / "evaluation.json").read_text())["velocity_error"]
        for out in (live, stored)
    )
    for row, other in zip(rows, judged, strict=True):
        assert [row[name] for name in ("flow", "gaussian", "zero")] == pytest.approx(
            [other[name] for name in ("flow", "gaussian", "zero")], rel=1e-4
        )


# The same flow


def test_rollouts_read_on_the_fly_give_the_flow_of_stored_latents(tiny: TinyArtifacts, tmp_path: Path) -> None:
    network = NetworkConfig(
        width=24, depth=1, normalisation=Normalisation.CHANNEL, context=(Context.NEXT, Context.PREVIOUS)
    )
    fit_flow.run(fit_config(tiny.latents, tmp_path / "stored.safetensors", network=network))
    fit_flow.run(live_config(tiny, tmp_path / "live.safetensors", network=network))
    assert_same_fit(tmp_path / "live.safetensors", tmp_path / "stored.safetensors")


def test_bfloat16_rounds_on_the_fly_as_it_would_have_on_disk(tiny: TinyArtifacts, tmp_path: Path) -> None:
    source: dict[str, Any] = {"rollouts": tiny.rollouts, "layer_index": (2, 5), "store": StoreDtype.BFLOAT16}
    extract_latents.run(extract_config(tiny.policy, tmp_path / "latents", **source))
    stored = LatentSequences([tmp_path / "latents"], 8192)
    live = open_live_latents(live_config(tiny, tmp_path / "f", **source))
    ours, theirs = live.read_many(range(24)), stored.read_many(range(24))
    assert {latents.dtype for latents in ours} == {torch.bfloat16}
    # Other batches may round a sum the other way, which bfloat16 shows in one place in many thousands.
    different = sum(int((a != b).sum()) for a, b in zip(ours, theirs, strict=True))
    assert different / sum(a.numel() for a in ours) < 1e-3


@pytest.mark.parametrize(
    ("options", "extracted", "fitted"),
    [
        ({"max_tokens": 9, "limit": 10}, {}, {"optimiser": SHORT}),
        ({}, {"max_shift": 2}, {"network": NetworkConfig(width=24, depth=1, shift=2), "optimiser": SHORT}),
        (
            {},
            {"context_layer": ("final-norm",)},
            {"network": NetworkConfig(width=24, depth=1, context_layer="final-norm"), "optimiser": SHORT},
        ),
        ({}, {}, {"optimiser": {"max_sequence_tokens": 8, **SHORT}}),
    ],
    ids=["responses cut", "shift", "context layer", "sequences cut"],
)
def test_expert_text_read_on_the_fly_gives_the_flow_of_stored_latents(
    tiny: TinyArtifacts, tmp_path: Path, options: dict[str, Any], extracted: dict[str, Any], fitted: dict[str, Any]
) -> None:
    source: dict[str, Any] = {
        "data": str(tiny.expert),
        "id_column": "id",
        "layer_index": (2, 5),
        "store": StoreDtype.FLOAT32,
        **options,
    }
    extract_latents.run(extract_config(tiny.policy, tmp_path / "latents", **source, **extracted))
    fit_flow.run(fit_config(tmp_path / "latents", tmp_path / "stored.safetensors", **fitted))
    fit_flow.run(
        live_config(tiny, tmp_path / "live.safetensors", rollouts=None, tokens_per_batch=100, **source, **fitted)
    )
    assert_same_fit(tmp_path / "live.safetensors", tmp_path / "stored.safetensors")


def test_the_same_sequences_are_held_out(tiny: TinyArtifacts, tmp_path: Path) -> None:
    live, stored = open_live_latents(live_config(tiny, tmp_path / "f")), LatentSequences([tiny.latents], 8192)
    for seed in range(3):
        assert live.split(0.4, 256, seed) == stored.split(0.4, 256, seed)


def test_responses_without_a_token_are_no_sequences(tiny: TinyArtifacts, tmp_path: Path) -> None:
    live = open_live_latents(live_config(tiny, tmp_path / "f"))
    wanted = live.read_many([1, 3])
    without = live_latents.LiveLatents(live.config, live.model, _with_empty(live.responses, 2), (2, 5))
    assert len(without.rows) == len(live.rows) - 1
    for ours, latents in zip(without.read_many([1, 2]), wanted, strict=True):
        torch.testing.assert_close(ours, latents, atol=1e-5, rtol=1e-5)


def _with_empty(responses: Any, row: int) -> Any:
    """The same responses, one of them without a token."""
    column = responses.table["response_token_ids"].to_pylist()
    column[row] = []
    place = responses.table.schema.get_field_index("response_token_ids")
    field = responses.table.schema.field(place)
    table = responses.table.set_column(place, field, pa.array(column, field.type))
    return type(responses)(table, responses.units, responses.fingerprint, responses.max_tokens)


# What it costs


def test_a_step_reads_its_sequences_once_through_no_more_blocks_than_needed(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, blocks = [], set()
    real = extraction.decoder_latents

    def spy(decoder: Any, taps: Any, sequences: Any, *rest: Any) -> Any:
        read.append(len(sequences))
        blocks.add(len(decoder.layers))
        return real(decoder, taps, sequences, *rest)

    monkeypatch.setattr(extraction, "decoder_latents", spy)
    out = tmp_path / "flow.safetensors"
    summary = fit_flow.run(live_config(tiny, out, optimiser={"steps": 2}, holdout_fraction=0.0))
    # Statistics of 24 sequences by 8, two steps of 8, and the judgement on 24 by 16: a batch each.
    assert read == [8, 8, 8, 8, 8, 16, 8]
    assert blocks == {6}
    assert (summary["blocks_run"], summary["blocks_of_model"]) == (6, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flow.fit", "flow.safetensors"]


def test_a_dry_run_computes_nothing_and_tells_what_latents_would_take(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_latents, "load_decoder", None)
    plan = fit_flow.run(live_config(tiny, tmp_path / "f", dry_run=True))
    stored = extract_latents.run(
        extract_config(
            tiny.policy,
            tmp_path / "latents",
            rollouts=tiny.rollouts,
            layer_index=(2, 5),
            store=StoreDtype.FLOAT32,
            dry_run=True,
        )
    )
    assert plan["bytes_not_stored"] == stored["bytes"]
    same = fit_flow.run(fit_config(tiny.latents, tmp_path / "f", dry_run=True))
    assert {name: plan[name] for name in same} == same
    assert list(tmp_path.iterdir()) == []


def test_statistics_may_come_from_some_of_the_tokens(tiny: TinyArtifacts, tmp_path: Path) -> None:
    for name, config in {
        "live": live_config(tiny, tmp_path / "live.safetensors", network=CHANNEL, statistics_tokens=60),
        "stored": fit_config(tiny.latents, tmp_path / "stored.safetensors", network=CHANNEL, statistics_tokens=60),
        "all": fit_config(tiny.latents, tmp_path / "all.safetensors", network=CHANNEL),
    }.items():
        fit_flow.run(config)
        assert read_flow_header(tmp_path / f"{name}.safetensors").normalisation == "channel"
    mean = {
        name: read_flow(tmp_path / f"{name}.safetensors")[1]["statistics.mean"] for name in ("live", "stored", "all")
    }
    torch.testing.assert_close(mean["live"], mean["stored"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(mean["stored"], mean["all"], atol=1e-2)
    data = LatentSequences([tiny.latents], 8192)
    training, _ = data.split(0.25, 256, 0)
    order = torch.randperm(len(training), generator=keyed_generator("cpu", 0, "statistics")).tolist()
    tokens = torch.cat([data.read(training[place])[1:] for place in order])
    ends = torch.tensor([data.response_tokens(training[place]) for place in order]).cumsum(0)
    taken = int(ends[ends >= 60][0])  # whole sequences, the last of which passes 60 tokens
    torch.testing.assert_close(mean["stored"], tokens[:taken].mean(0), atol=1e-4, rtol=1e-4)


# Stopping and going on


def test_a_stopped_fit_continues_to_the_bytes_of_an_unbroken_one(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str) -> FitFlowConfig:
        return live_config(tiny, tmp_path / name / "flow.safetensors", network=CHANNEL, eval_every=4)

    fit_flow.run(config("unbroken"))
    for function, calls in (("_statistics", 1), ("_train_step", 6)):
        with monkeypatch.context() as patch:
            interrupt_after(patch, fitting.Fit, function, calls)
            with pytest.raises(Stopped):
                fit_flow.run(config("stopped"))
    fit_flow.run(config("stopped"))
    assert bytes_of(tmp_path / "stopped") == bytes_of(tmp_path / "unbroken")


def test_other_responses_are_another_fit(tiny: TinyArtifacts, tmp_path: Path) -> None:
    out = tmp_path / "flow.safetensors"
    fit_flow.run(live_config(tiny, out, optimiser={"steps": 1}))
    inputs = json.loads((tmp_path / "flow.fit" / "stage.json").read_text())["inputs"]
    assert inputs == json.loads((tiny.latents / "stage.json").read_text())["inputs"]
    expert = {"data": str(tiny.expert), "rollouts": None}
    with pytest.raises(OutputInUseError, match=r"inputs\.responses"):
        fit_flow.run(live_config(tiny, out, optimiser={"steps": 1}, **expert))
    with pytest.raises(OutputInUseError, match=r"config\.max_tokens"):
        fit_flow.run(live_config(tiny, out, optimiser={"steps": 1}, max_tokens=3))


def test_another_text_of_a_template_file_is_another_input(tiny: TinyArtifacts, tmp_path: Path) -> None:
    template = tmp_path / "template"
    expert: dict[str, Any] = {"data": str(tiny.expert), "rollouts": None, "optimiser": {"steps": 1}}
    for text, refused in (("Q: {problem} A:", False), ("{problem} =", True)):
        template.write_text(text)
        config = live_config(tiny, tmp_path / "f", prompt=PromptConfig(prompt_template=f"@{template}"), **expert)
        if refused:
            with pytest.raises(OutputInUseError, match=r"inputs\.prompt_template"):
                fit_flow.run(config)
        else:
            fit_flow.run(config)


# A flow that goes on


def test_init_from_names_the_layers(tiny: TinyArtifacts, tmp_path: Path) -> None:
    options: dict[str, Any] = {"init_from": tiny.flow, "dry_run": True, "optimiser": {"steps": 1}}
    assert fit_flow.run(live_config(tiny, tmp_path / "f", layer_index=(), **options))["layers"] == [2, 5]
    for asked in ({"layer_index": (3, 5)}, {"layer_index": (), "layer_fraction": (0.5,)}):
        with pytest.raises(MismatchError, match=r"fitted on blocks \[2, 5\]"):
            fit_flow.run(live_config(tiny, tmp_path / "f", **{**options, **asked}))


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of LATENTS, --rollouts, --data must be given, got none"),
        ({"latents": ("l",), "rollouts": "r", "model": "m"}, "got LATENTS and --rollouts"),
        ({"rollouts": "r", "data": "d", "model": "m"}, "got --rollouts and --data"),
        ({"data": "d"}, "--data needs --model"),
        ({"latents": ("l",), "limit": 3}, "LATENTS are read as they are, and --limit is for"),
        ({"latents": ("l",), "store": "float32", "layer_index": (1,)}, "--layer-index, --store is for"),
        ({"data": "d", "model": "m", "layer_index": (1,), "layer_fraction": (0.1,)}, "exclude each other"),
        ({"data": "d", "model": "m", "layer_fraction": ()}, "at least one layer"),
        ({"data": "d", "model": "m", "store": "int8"}, "--store int8 takes units from the channels of a whole shard"),
    ],
)
def test_exactly_one_source_with_its_own_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FitFlowConfig(**options)
    assert message in str(caught.value)


def test_a_model_beside_latents_is_said_to_have_no_effect(
    tiny: TinyArtifacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe's [common] may name it for the other commands."""
    fit_flow.run(fit_config(tiny.latents, tmp_path / "f", model="no such model", dry_run=True))
    assert "warning: LATENTS are read as they are: --model has no effect" in capsys.readouterr().err


def test_responses_that_the_model_cannot_read_are_refused_beforehand(
    tiny: TinyArtifacts, random_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="blocks 0 to 7"):
        fit_flow.run(live_config(tiny, tmp_path / "f", layer_index=(8,)))
    data = tmp_path / "expert.jsonl"
    data.write_text(json.dumps({"problem": "1", "solution": "2"}) + "\n")
    config = live_config(
        tiny,
        tmp_path / "f",
        model=str(random_model),
        rollouts=None,
        data=str(data),
        prompt=PromptConfig(system_prompt=""),
        layer_index=(1,),
        network=NetworkConfig(width=24, depth=1, shift=5),
    )
    with pytest.raises(InputError, match="its prompt has 4 tokens, and a shift of 5 needs as many"):
        fit_flow.run(config)
    assert [path.name for path in tmp_path.iterdir()] == ["expert.jsonl"]


def test_latents_that_are_not_finite_stop_the_fit(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = extraction.decoder_latents
    monkeypatch.setattr(extraction, "decoder_latents", lambda *args: [1e6 * latents for latents in real(*args)])
    with pytest.raises(WorkError, match="not finite numbers in float16") as caught:
        fit_flow.run(live_config(tiny, tmp_path / "f", store=StoreDtype.FLOAT16))
    assert "--store bfloat16" in str(caught.value.hint)
