"""`fit-flow`: the loss falls, the best is kept, stops change no bit, and what is judged is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlfr_cli.artifacts.flow_file import read_flow, read_flow_header
from rlfr_cli.artifacts.latents import LatentsFolder
from rlfr_cli.config.extract_latents import StoreDtype
from rlfr_cli.config.flow import NetworkConfig, Normalisation
from rlfr_cli.errors import ArtifactError, ConfigError, InputError, MismatchError, OutputInUseError, Stopped, WorkError
from rlfr_cli.flow.choices import Context
from rlfr_cli.flow.noise import response_noise
from rlfr_cli.flow.published import to_published
from rlfr_cli.flow.velocity import VelocityNetwork
from rlfr_cli.stages import extract_latents, fit_flow, fitting
from rlfr_cli.stages.flow_evaluation import TIMESTEPS
from rlfr_cli.stages.flows import load_flow, sizes_of
from rlfr_cli.stages.latent_sequences import LatentSequences
from stages.tiny_stages import TinyArtifacts, bytes_of, extract_config, fit_config, interrupt_after
from tiny_models import make_model_folder

CPU = torch.device("cpu")
NARROW = NetworkConfig(width=24, depth=1)


def metrics_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out.with_suffix(".fit") / "metrics.jsonl").read_text().splitlines()]


def heldout_losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["heldout_loss"] for line in metrics_of(out) if "heldout_loss" in line}


@pytest.fixture(scope="module")
def unbroken(tiny: TinyArtifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit of 12 steps, evaluated every four, with channel normalisation and two pairings."""
    folder = tmp_path_factory.mktemp("unbroken")
    fit_flow.run(unbroken_config(tiny, folder))
    return folder


def unbroken_config(tiny: TinyArtifacts, folder: Path, **options: Any) -> Any:
    network = NetworkConfig(
        width=24, depth=1, normalisation=Normalisation.CHANNEL, context=(Context.NEXT, Context.PREVIOUS)
    )
    optimiser = {"steps": 12}
    return fit_config(
        tiny.latents, folder / "flow.safetensors", network=network, optimiser=optimiser, eval_every=4, **options
    )


def test_the_loss_falls_and_every_step_is_logged(tiny: TinyArtifacts, tmp_path: Path) -> None:
    out = tmp_path / "flow.safetensors"
    summary = fit_flow.run(fit_config(tiny.latents, out, optimiser={"steps": 40}))
    losses = [line["loss"] for line in metrics_of(out) if "loss" in line]
    assert [line["step"] for line in metrics_of(out) if "loss" in line] == list(range(1, 41))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    heldout = heldout_losses(out)
    assert sorted(heldout) == list(range(0, 41, 4))
    assert heldout[40] < 0.9 * heldout[0]
    assert summary["heldout_loss"] == heldout[40] == read_flow_header(out).heldout_loss


def test_the_learning_rate_rises_and_goes_down_to_zero(tiny: TinyArtifacts, tmp_path: Path) -> None:
    out = tmp_path / "flow.safetensors"
    fit_flow.run(fit_config(tiny.latents, out, optimiser={"steps": 8, "warmup_fraction": 0.25, "learning_rate": 0.01}))
    rates = [line["learning_rate"] for line in metrics_of(out) if "learning_rate" in line]
    assert rates[:2] == [0.005, 0.01]
    assert sorted(rates[1:], reverse=True) == rates[1:]
    assert rates[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        ("_train_step", 2),  # before the first evaluation
        ("_train_step", 6),  # between two evaluations
        ("_statistics", 1),
        ("_heldout_loss", 1),  # logged, and nothing saved yet
        ("_heldout_loss", 3),  # logged, and the save of its step is lost
        ("_save", 3),
        ("_train", 1),
    ],
)
def test_a_stopped_fit_continues_to_the_bytes_of_an_unbroken_one(
    tiny: TinyArtifacts, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, calls: int
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, fitting.Fit, function, calls)
        with pytest.raises(Stopped) as caught:
            fit_flow.run(unbroken_config(tiny, tmp_path))
    assert caught.value.exit_code == 130
    assert "the same command continues" in str(caught.value)
    fit_flow.run(unbroken_config(tiny, tmp_path))
    assert bytes_of(tmp_path) == bytes_of(unbroken)


@pytest.mark.parametrize("files_written", [1, 2])
def test_a_kill_between_the_files_of_a_save_loses_no_consistency(
    tiny: TinyArtifacts, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_written: int
) -> None:
    """The third save stops after the best flow, or after the last flow, and before the state."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, fitting, "write_flow", 4 + files_written, SystemExit)
        with pytest.raises(SystemExit):
            fit_flow.run(unbroken_config(tiny, tmp_path))
    fit_flow.run(unbroken_config(tiny, tmp_path))
    assert bytes_of(tmp_path) == bytes_of(unbroken)


def test_the_flow_with_the_lowest_heldout_loss_is_kept(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "flow.safetensors"
    losses = iter([9.0, 4.0, 6.0, 5.0])  # at steps 0, 3, 6 and 9
    monkeypatch.setattr(fitting.Fit, "_heldout_loss", lambda self: next(losses))
    summary = fit_flow.run(fit_config(tiny.latents, out, optimiser={"steps": 9}, eval_every=3))
    assert (read_flow_header(out).steps, read_flow_header(out).heldout_loss) == (3, 4.0)
    last = read_flow_header(tmp_path / "flow.fit" / "last.safetensors")
    assert (last.steps, last.heldout_loss) == (9, 5.0)
    assert (summary["best_step"], summary["heldout_loss"]) == (3, 4.0)


def test_held_out_sequences_are_never_trained_on(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    trained: set[int] = set()
    measured: set[int] = set()
    real_read, real_accumulate = LatentSequences.read, fitting.accumulate_over_ranks

    def spy_read(self: LatentSequences, index: int) -> torch.Tensor:
        read.append(index)
        return real_read(self, index)

    def spy_accumulate(*args: Any, backward: bool = True, **kwargs: Any) -> Any:
        (trained if backward else measured).update(read)
        read.clear()
        return real_accumulate(*args, backward=backward, **kwargs)

    statistics: set[int] = set()
    real_statistics = fitting.Fit._statistics

    def spy_statistics(self: Any) -> Any:
        result = real_statistics(self)
        statistics.update(read)
        read.clear()
        return result

    monkeypatch.setattr(LatentSequences, "read", spy_read)
    monkeypatch.setattr(fitting, "accumulate_over_ranks", spy_accumulate)
    monkeypatch.setattr(fitting.Fit, "_statistics", spy_statistics)
    config = fit_config(tiny.latents, tmp_path / "flow.safetensors")
    fit_flow.run(config)
    training, heldout = LatentSequences(config.latents, 8192).split(0.25, 256, 0)
    assert len(heldout) == 4
    assert trained == set(training) == statistics
    assert measured == set(heldout)
    assert not trained & measured


def test_the_responses_to_one_problem_are_all_held_out_or_all_trained_on(tiny: TinyArtifacts) -> None:
    data = LatentSequences([tiny.latents], 8192)
    names = [name for shard in range(data.folders[0].num_shards) for name, _ in data.folders[0].read_names(shard)]
    for seed in range(5):
        training, heldout = data.split(0.4, 256, seed)
        assert len(heldout) == 8
        assert not {names[index] for index in training} & {names[index] for index in heldout}
        assert sorted([*training, *heldout]) == list(range(len(names)))


def test_one_problem_is_held_out_where_each_has_more_responses_than_are_wanted(tiny: TinyArtifacts) -> None:
    training, heldout = LatentSequences([tiny.latents], 8192).split(0.05, 256, 0)
    assert (len(training), len(heldout)) == (20, 4)


def test_a_pass_takes_every_training_sequence_once(tiny: TinyArtifacts, tmp_path: Path) -> None:
    plan = fit_flow.run(
        fit_config(tiny.latents, tmp_path / "f", dry_run=True, optimiser={"steps": None, "epochs": 3.0})
    )
    assert (plan["training_sequences"], plan["heldout_sequences"], plan["steps"]) == (20, 4, 8)
    out = tmp_path / "flow.safetensors"
    fit_flow.run(fit_config(tiny.latents, out, optimiser={"steps": None, "epochs": 1.0, "sequences_per_step": 10}))
    one_less = plan["training_tokens"] - 20  # the last token of a response has no next one
    last = tmp_path / "flow.fit" / "last.safetensors"
    assert read_flow_header(last).tokens_seen == one_less


def test_init_from_goes_on_from_that_flow(tiny: TinyArtifacts, tmp_path: Path) -> None:
    out = tmp_path / "flow.safetensors"
    fit_flow.run(fit_config(tiny.latents, out, network=NARROW, init_from=tiny.flow, optimiser={"steps": 4}))
    before = read_flow_header(tiny.flow)
    assert heldout_losses(out)[0] == pytest.approx(before.heldout_loss, rel=1e-6)
    last = read_flow_header(tmp_path / "flow.fit" / "last.safetensors")
    assert last.steps == before.steps + 4
    assert last.tokens_seen > before.tokens_seen


def test_init_from_refuses_options_that_contradict_the_flow(tiny: TinyArtifacts, tmp_path: Path) -> None:
    contradictions: dict[str, Any] = {"depth": 2, "context": (Context.SELF,), "normalisation": Normalisation.CHANNEL}
    for option, value in contradictions.items():
        network = NetworkConfig(**{"width": 24, "depth": 1, option: value})
        with pytest.raises(ConfigError, match=f"--{option} asks for") as caught:
            fit_flow.run(fit_config(tiny.latents, tmp_path / "f", network=network, init_from=tiny.flow))
        assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_init_from_refuses_a_flow_of_other_layers(tiny: TinyArtifacts, tmp_path: Path) -> None:
    extract_latents.run(
        extract_config(tiny.policy, tmp_path / "latents", rollouts=tiny.rollouts, layer_index=(3, 5), limit=2)
    )
    with pytest.raises(MismatchError, match=r"fitted on blocks \[2, 5\].*\[3, 5\]") as caught:
        fit_flow.run(fit_config(tmp_path / "latents", tmp_path / "f", init_from=tiny.flow))
    assert "--layer-index" in str(caught.value.hint)
    assert not (tmp_path / "f").exists()


def test_init_from_refuses_a_flow_of_another_architecture(
    tiny: TinyArtifacts, random_latents: Path, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match="another architecture"):
        fit_flow.run(fit_config(random_latents, tmp_path / "f", init_from=tiny.flow))


@pytest.fixture(scope="module")
def random_latents(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of another model than the embedded policy, blocks 2 and 3 of 4."""
    folder = tmp_path_factory.mktemp("random")
    (folder / "e.jsonl").write_text(json.dumps({"problem": "1+1", "solution": "two or so"}) + "\n")
    config = extract_config(random_model, folder / "latents", data=str(folder / "e.jsonl"), layer_index=(2, 3))
    extract_latents.run(config)
    return folder / "latents"


def publish(flow: Path, path: Path) -> Path:
    """Write a flow as the published code would have saved it."""
    header, tensors = read_flow(flow)
    torch.save(to_published(tensors, sizes_of(header)), path)
    return path


def test_a_published_flow_is_imported_as_it_is(tiny: TinyArtifacts, tmp_path: Path) -> None:
    published = publish(tiny.flow, tmp_path / "flow_model.bin")
    out = tmp_path / "flow.safetensors"
    summary = fit_flow.run(
        fit_config(tiny.latents, out, network=NetworkConfig(), init_from=published, optimiser={"steps": 0})
    )
    theirs, ours = read_flow(tiny.flow)[1], read_flow(out)[1]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert summary["steps"] == summary["best_step"] == 0
    assert len(summary["velocity_error"]) == 2 * len(TIMESTEPS)

    latents = [LatentSequences((tiny.latents,), 8192).read(index) for index in range(3)]
    scores = []
    for path in (tiny.flow, out):
        flow = load_flow(path, CPU)[1]
        pairs = flow.pair(latents, 1)
        scores.append(flow.deviations(pairs, ["a", "b", "c"], seed=0, timesteps=(0.8,)).score_M)
    assert torch.equal(*scores)


def test_a_published_flow_takes_context_and_layers_from_options_and_latents(
    tiny: TinyArtifacts, tmp_path: Path
) -> None:
    published = publish(tiny.flow, tmp_path / "flow_model.bin")
    network = NetworkConfig(context=(Context.PREVIOUS,))
    fit_flow.run(
        fit_config(
            tiny.latents, tmp_path / "f.safetensors", network=network, init_from=published, optimiser={"steps": 1}
        )
    )
    header = read_flow_header(tmp_path / "f.safetensors")
    assert header.pairings == ({"context": "previous", "shift": 1},)
    assert (header.width, header.depth, header.layer_indices) == (24, 1, (2, 5))
    assert header.model == LatentsFolder(tiny.latents).info.model


def test_a_published_flow_of_another_size_is_refused(tiny: TinyArtifacts, random_latents: Path, tmp_path: Path) -> None:
    published = publish(tiny.flow, tmp_path / "flow_model.bin")
    with pytest.raises(MismatchError, match="latents of size 128; this model's have 32"):
        fit_flow.run(fit_config(random_latents, tmp_path / "f", init_from=published))


def test_a_pickle_that_is_no_state_dict_is_refused(tiny: TinyArtifacts, tmp_path: Path) -> None:
    torch.save({"a": Path("/")}, tmp_path / "code.bin")  # only tensors are read from a pickle
    (tmp_path / "text.bin").write_text("not a pickle")
    torch.save([1, 2], tmp_path / "list.bin")
    for name in ("code.bin", "text.bin", "list.bin"):
        with pytest.raises(ArtifactError):
            fit_flow.run(fit_config(tiny.latents, tmp_path / "f", init_from=tmp_path / name))
    assert not (tmp_path / "f").exists()


def test_zero_steps_of_a_new_flow_are_refused(tiny: TinyArtifacts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--steps 0"):
        fit_config(tiny.latents, tmp_path / "f", optimiser={"steps": 0})


def test_no_shard_is_read_whole(tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    real = LatentsFolder.read_sequences

    def spy(self: LatentsFolder, index: int, start: int, stop: int, **options: Any) -> Any:
        nonlocal largest
        shard = real(self, index, start, stop, **options)
        largest = max(largest, shard.num_sequences)
        return shard

    monkeypatch.setattr(LatentsFolder, "read_shard", None)
    monkeypatch.setattr(LatentsFolder, "iter_shards", None)
    monkeypatch.setattr(LatentsFolder, "read_sequences", spy)
    fit_flow.run(fit_config(tiny.latents, tmp_path / "flow.safetensors"))
    assert largest == 1


def test_several_folders_of_one_model_are_one_set(tiny: TinyArtifacts, tmp_path: Path) -> None:
    config = extract_config(
        tiny.policy, tmp_path / "expert", data=str(tiny.expert), layer_index=(2, 5), store=StoreDtype.BFLOAT16
    )
    extract_latents.run(config)
    both = fit_flow.run(fit_config([tiny.latents, tmp_path / "expert"], tmp_path / "f", dry_run=True))
    assert both["training_sequences"] + both["heldout_sequences"] == 24 + 14
    fit_flow.run(fit_config([tiny.latents, tmp_path / "expert"], tmp_path / "f", optimiser={"steps": 2}))


def test_folders_of_other_models_layers_or_shifts_are_refused(
    tiny: TinyArtifacts, random_latents: Path, tmp_path: Path
) -> None:
    extract_latents.run(
        extract_config(tiny.policy, tmp_path / "layers", data=str(tiny.expert), layer_index=(2, 4), limit=2)
    )
    extract_latents.run(
        extract_config(tiny.policy, tmp_path / "shift", data=str(tiny.expert), layer_index=(2, 5), limit=2, max_shift=2)
    )
    wanted = {
        random_latents: "differ in the model: qwen2, 8 blocks, hidden size 128",
        tmp_path / "layers": r"differ in layers: \(2, 5\) and \(2, 4\)",
        tmp_path / "shift": "differ in prompt tokens kept: 1 and 2",
    }
    for other, message in wanted.items():
        with pytest.raises(MismatchError, match=message) as caught:
            fit_flow.run(fit_config([tiny.latents, other], tmp_path / "f"))
        assert caught.value.hint
    assert not (tmp_path / "f").exists()


def test_channel_statistics_are_those_of_the_training_tokens(tiny: TinyArtifacts, unbroken: Path) -> None:
    data = LatentSequences((tiny.latents,), 8192)
    training, _ = data.split(0.25, 256, 0)
    tokens = torch.cat([data.read(index)[1:] for index in training]).double()  # the first is a prompt token
    _, tensors = read_flow(unbroken / "flow.safetensors")
    torch.testing.assert_close(tensors["statistics.mean"].double(), tokens.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tensors["statistics.std"].double(), tokens.std(0, correction=0), atol=1e-4, rtol=1e-3)
    assert read_flow_header(unbroken / "flow.safetensors").normalisation == "channel"


def test_without_normalisation_a_flow_holds_no_statistics(tiny: TinyArtifacts) -> None:
    header, tensors = read_flow(tiny.flow)
    assert header.normalisation == "none"
    assert not [name for name in tensors if name.startswith("statistics")]


def test_every_layer_and_timestep_is_judged_beside_its_baselines(unbroken: Path, tiny: TinyArtifacts) -> None:
    summary = fit_flow.run(unbroken_config(tiny, unbroken))  # complete: what is stored is told again
    rows = summary["velocity_error"]
    assert [(row["layer"], row["timestep"]) for row in rows] == [(layer, t) for layer in (2, 5) for t in TIMESTEPS]
    for row in rows:
        assert row["share_of_gaussian_removed"] == pytest.approx(1 - row["flow"] / row["gaussian"], rel=1e-6)
        assert 0 < row["gaussian"] <= row["zero"] * (1 + 1e-9)
    assert summary["judged_on"] == "held-out sequences"


def test_a_flow_is_judged_on_the_valid_response_tokens_that_were_held_out(tiny: TinyArtifacts) -> None:
    rows = json.loads((tiny.flow.with_suffix(".fit") / "evaluation.json").read_text())["velocity_error"]
    data = LatentSequences((tiny.latents,), 8192)
    _, heldout = data.split(0.25, 256, 0)
    for column, layer in enumerate((2, 5)):
        errors = []
        for index in heldout:
            response = data.read(index)[1:, column]  # without the prompt token
            noise = response_noise(0, f"judged {index}", layer, 0, num_tokens=len(response), size=128)
            errors.append((response - noise)[:-1].square().mean(-1))  # the last token has no next one
        zero = [row["zero"] for row in rows if row["layer"] == layer]
        assert zero == pytest.approx([float(torch.cat(errors).mean())] * len(TIMESTEPS), rel=1e-5)


def test_a_flow_that_does_not_beat_the_gaussian_is_said_so_loudly(
    tiny: TinyArtifacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = fit_config(tiny.latents, tmp_path / "flow.safetensors", optimiser={"steps": 1})
    summary = fit_flow.run(config)
    said = capsys.readouterr().err
    assert "warning:" in said
    assert "NOT" in said
    assert "NOT" in summary["verdict"]
    assert all(row["share_of_gaussian_removed"] < 0 for row in summary["velocity_error"])


def test_nothing_held_out_keeps_the_last_flow(tiny: TinyArtifacts, tmp_path: Path) -> None:
    out = tmp_path / "flow.safetensors"
    summary = fit_flow.run(fit_config(tiny.latents, out, holdout_fraction=0.0, optimiser={"steps": 4}))
    assert summary["heldout_sequences"] == 0
    assert summary["heldout_loss"] is None
    assert "training sequences" in summary["judged_on"]
    assert read_flow_header(out).steps == 4
    assert not heldout_losses(out)


def test_the_seed_decides_everything(tiny: TinyArtifacts, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit_flow.run(fit_config(tiny.latents, tmp_path / name / "f.safetensors", seed=seed, optimiser={"steps": 2}))
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert heldout_losses(tmp_path / "c" / "f.safetensors") != heldout_losses(tmp_path / "a" / "f.safetensors")


def test_chunks_change_memory_and_not_the_loss(tiny: TinyArtifacts, unbroken: Path, tmp_path: Path) -> None:
    fit_flow.run(unbroken_config(tiny, tmp_path, tokens_per_chunk=50))
    losses, wanted = (heldout_losses(folder / "flow.safetensors") for folder in (tmp_path, unbroken))
    assert losses == pytest.approx(wanted, rel=1e-4)


def test_a_loss_that_is_not_finite_skips_the_step_and_a_third_stops(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad: set[int] = {2}
    real = fitting.Fit._pair

    def poisoned(self: Any, sequences: Any) -> Any:
        pairs = real(self, sequences)
        if self.step in bad and torch.is_grad_enabled():
            pairs.latents_NJD.fill_(torch.nan)
        return pairs

    monkeypatch.setattr(fitting.Fit, "_pair", poisoned)
    out = tmp_path / "one" / "flow.safetensors"
    fit_flow.run(fit_config(tiny.latents, out, optimiser={"steps": 4}))
    losses = {line["step"]: line["loss"] for line in metrics_of(out) if "loss" in line}
    assert [step for step, loss in losses.items() if loss is None] == [2]

    bad.update(range(2, 10))
    with pytest.raises(WorkError, match="3 steps in a row") as caught:
        fit_flow.run(fit_config(tiny.latents, tmp_path / "many" / "flow.safetensors", eval_every=20))
    assert caught.value.exit_code == 1
    assert "--learning-rate" in str(caught.value.hint)


def test_responses_without_any_pair_are_refused(tiny: TinyArtifacts, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no token has its neighbour") as caught:
        fit_flow.run(fit_config(tiny.latents, tmp_path / "f", optimiser={"max_sequence_tokens": 2}))
    assert "--max-sequence-tokens" in str(caught.value.hint)
    with pytest.raises(MismatchError, match="a shift of 2 needs as many prompt tokens") as mismatch:
        fit_flow.run(fit_config(tiny.latents, tmp_path / "f", network=NetworkConfig(shift=2)))
    assert "--max-shift 2" in str(mismatch.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_complete_fit_is_told_again_and_another_config_refused(
    tiny: TinyArtifacts, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bytes_of(unbroken)
    summary = fit_flow.run(unbroken_config(tiny, unbroken))
    assert "complete already; nothing to do" in capsys.readouterr().err
    assert summary["heldout_loss"] == read_flow_header(unbroken / "flow.safetensors").heldout_loss
    with pytest.raises(OutputInUseError, match=r"config\.seed: 0 there, 1 here") as caught:
        fit_flow.run(unbroken_config(tiny, unbroken, seed=1))
    assert "--overwrite" in str(caught.value.hint)
    assert "--out" in str(caught.value.hint)
    assert bytes_of(unbroken) == before


def test_a_file_of_another_origin_is_never_replaced_unasked(tiny: TinyArtifacts, tmp_path: Path) -> None:
    out = tmp_path / "flow.safetensors"
    out.write_text("somebody's")
    with pytest.raises(OutputInUseError, match="nothing beside it says how it was fitted"):
        fit_flow.run(fit_config(tiny.latents, out))
    with pytest.raises(OutputInUseError, match="is a folder"):
        fit_flow.run(fit_config(tiny.latents, tmp_path))
    assert bytes_of(tmp_path) == {"flow.safetensors": b"somebody's"}
    fit_flow.run(fit_config(tiny.latents, out, overwrite=True, optimiser={"steps": 1}))
    assert read_flow_header(out).layer_indices == (2, 5)


def test_names_with_dots_do_not_share_a_folder() -> None:
    folders = {fit_flow.fit_folder_of(Path(name)).name for name in ("f-0.5", "f-0.8", "f-0.8.safetensors", "f")}
    assert folders == {"f-0.5.fit", "f-0.8.fit", "f.fit"}


def test_a_dry_run_writes_nothing(tiny: TinyArtifacts, tmp_path: Path) -> None:
    plan = fit_flow.run(fit_config(tiny.latents, tmp_path / "f.safetensors", dry_run=True))
    weights = load_file(tiny.flow)
    assert plan["parameters"] == sum(value.numel() for value in weights.values())
    assert plan["context"] == ["next 1"]
    assert list(tmp_path.iterdir()) == []


def test_latents_of_other_weights_are_other_inputs(tiny: TinyArtifacts, tmp_path: Path) -> None:
    """The same architecture with other weights cannot be mixed with the first one's latents."""
    models = [make_model_folder(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    (tmp_path / "e.jsonl").write_text(json.dumps({"problem": "1+1", "solution": "two or so"}) + "\n")
    for model in models:
        extract_latents.run(extract_config(model, tmp_path / f"of-{model.name}", data=str(tmp_path / "e.jsonl")))
    with pytest.raises(MismatchError, match=r"differ in the model: .*weights"):
        fit_flow.run(fit_config([tmp_path / "of-a", tmp_path / "of-b"], tmp_path / "f"))


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"depth": 3}, "depth"),
        ({"width": 48}, "width"),
        ({"time_scale": 100.0}, "time_scale"),
        ({"normalisation": "channel"}, "normalisation"),
    ],
)
def test_options_that_contradict_a_published_flow_are_refused(
    options: dict[str, Any], fact: str, tiny: TinyArtifacts, tmp_path: Path
) -> None:
    published = publish(tiny.flow, tmp_path / "flow_model.bin")
    with pytest.raises(ConfigError, match=f"was fitted with {fact}"):
        fit_flow.run(fit_config(tiny.latents, tmp_path / "f", network=NetworkConfig(**options), init_from=published))
    assert not (tmp_path / "f").exists()


def test_a_published_flow_with_conditions_of_another_size_is_refused(tiny: TinyArtifacts, tmp_path: Path) -> None:
    sizes = replace(sizes_of(read_flow_header(tiny.flow)), condition_size=40)
    torch.save(to_published(VelocityNetwork(sizes).state_dict(), sizes), tmp_path / "flow_model.bin")
    with pytest.raises(MismatchError, match="conditions of size 40; this model's latents have 128"):
        fit_flow.run(fit_config(tiny.latents, tmp_path / "f", init_from=tmp_path / "flow_model.bin"))
