"""`train-rl` with adapters: what a run leaves, that stops change no bit, and `rlfr merge` of adapters alone."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlfr_cli.artifacts.fingerprint import model_fingerprint
from rlfr_cli.artifacts.flow_file import read_flow_header
from rlfr_cli.artifacts.run_folder import RunFolder
from rlfr_cli.config.lora import LoraConfig
from rlfr_cli.config.rl import OptimiserConfig, RolloutConfig
from rlfr_cli.config.train_rl import RunConfig, TrainRlConfig
from rlfr_cli.errors import (
    ConfigError,
    InputError,
    MismatchError,
    MissingInputError,
    MissingPackageError,
    OutputInUseError,
    Stopped,
)
from rlfr_cli.report.page_inputs import write_rollouts_page
from rlfr_cli.report.show import show
from rlfr_cli.stages import score, train_rl
from rlfr_cli.stages.merge import merge
from rlfr_cli.stages.trainer import Trainer
from stages.tiny_stages import (
    TinyArtifacts,
    bytes_of,
    interrupt_after,
    rlfr,
    rows_of_metrics,
    score_config,
    train_config,
)

STEPS = 4
TARGETS = ("q_proj", "down_proj")


def lora_config(tiny: TinyArtifacts, out: Path, *, steps: int = STEPS, **options: Any) -> TrainRlConfig:
    """Adapters of rank 4 and a flow that learns; a checkpoint every second step."""
    values: dict[str, Any] = {
        "flow": tiny.flow,
        "lora": LoraConfig(rank=4, target=TARGETS),
        "rollout": RolloutConfig(prompts_per_step=3, group_size=4, steps=steps),
        "optimiser": OptimiserConfig(learning_rate=3e-3, minibatch_responses=6),
        "run": RunConfig(tensorboard=False, save_every=2, keep_checkpoints=9),
    }
    return train_config(tiny.policy, tiny.problems, out, **{**values, **options})


def alone(config: TrainRlConfig, out: Path) -> TrainRlConfig:
    """The same run with checkpoints of adapters alone."""
    return replace(config, out=out, lora=replace(config.lora, checkpoint="adapter"))


def checkpoint(run: Path, step: int = STEPS) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def untimed(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in rows_of_metrics(run)]


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(5, 25)[None]).logits


@pytest.fixture(scope="module")
def merged(tiny: TinyArtifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not stopped, with merged checkpoints."""
    run = tmp_path_factory.mktemp("lora") / "run"
    train_rl.run(lora_config(tiny, run))
    return run


@pytest.fixture(scope="module")
def adapters(tiny: TinyArtifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped once, with checkpoints of adapters alone."""
    run = tmp_path_factory.mktemp("lora") / "adapters"
    config = alone(lora_config(tiny, run), run)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, Trainer, "save", 1)
        with pytest.raises(Stopped):
            train_rl.run(config)
    train_rl.run(replace(config, resume=True))
    return run


def test_the_merged_model_is_the_base_model_with_its_adapters(tiny: TinyArtifacts, merged: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(checkpoint(merged) / "model")
    base = AutoModelForCausalLM.from_pretrained(tiny.policy)
    first = logits_of(base)
    adapted = peft.PeftModel.from_pretrained(base, checkpoint(merged) / "adapter")
    torch.testing.assert_close(logits_of(plain), logits_of(adapted), rtol=1e-5, atol=1e-5)
    assert float((logits_of(plain) - first).abs().max()) > 1e-2
    assert adapted.peft_config["default"].base_model_name_or_path == str(tiny.policy.resolve())


def test_only_the_targets_of_the_base_model_have_changed(tiny: TinyArtifacts, merged: Path) -> None:
    before = load_file(tiny.policy / "model.safetensors")
    after = load_file(checkpoint(merged) / "model" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name].to(after[name].dtype), after[name])}
    assert changed == {name for name in before if name.split(".")[-2] in TARGETS and name.endswith("weight")}


def test_a_stopped_run_with_adapters_alone_is_the_one_with_merged_models(merged: Path, adapters: Path) -> None:
    """Also: a resumed run loses nothing, though no model lies in its checkpoint."""
    assert untimed(adapters) == untimed(merged)
    assert bytes_of(adapters / "rollouts") == bytes_of(merged / "rollouts")
    for step in (2, STEPS):
        mine, theirs = (bytes_of(checkpoint(run, step)) for run in (adapters, merged))
        assert not [name for name in mine if name.startswith("model/")]
        for name in set(mine) - {"manifest.json"}:
            assert mine[name] == theirs[name], name


def test_merge_writes_the_bytes_of_a_merged_checkpoint(merged: Path, adapters: Path, tmp_path: Path) -> None:
    run = shutil.copytree(adapters, tmp_path / "run")
    assert rlfr("merge", checkpoint(run))[0] == 0
    assert bytes_of(checkpoint(run)) == bytes_of(checkpoint(merged))
    assert RunFolder.open(run).latest_step() == STEPS
    assert show(checkpoint(run), verify=True).verified
    before = bytes_of(checkpoint(run))
    assert merge(checkpoint(run))["model"] == str(checkpoint(run) / "model")
    assert bytes_of(checkpoint(run)) == before


def test_the_flow_names_the_merged_model_before_there_is_one(
    tiny: TinyArtifacts, merged: Path, adapters: Path, tmp_path: Path
) -> None:
    header = read_flow_header(checkpoint(adapters) / "flow.safetensors")
    assert header.model == model_fingerprint(checkpoint(merged) / "model")
    assert header.model != model_fingerprint(tiny.policy)
    flow, model = checkpoint(adapters) / "flow.safetensors", str(checkpoint(merged) / "model")
    score.run(score_config(flow, tmp_path, model=model, rollouts=merged / "rollouts" / "step-000004"))


def test_trainer_holds_float32_adapters_by_name(merged: Path) -> None:
    trainer = checkpoint(merged) / "trainer"
    weights, state = load_file(trainer / "weights.safetensors"), load_file(trainer / "optimiser.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert {name.split(".")[-4] for name in weights} == set(TARGETS)
    assert {name.split("/", 1)[1] for name in state} == set(weights)


def test_a_run_without_a_flow_needs_no_merged_model(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlfr_cli.stages.adapter_checkpoints.load_merged", None)
    train_rl.run(alone(lora_config(tiny, tmp_path, steps=1, flow=None), tmp_path))
    assert sorted(path.name for path in checkpoint(tmp_path, 1).iterdir()) == ["adapter", "manifest.json", "trainer"]


def test_what_checkpoints_hold_may_change_on_resuming_and_the_rank_may_not(
    tiny: TinyArtifacts, adapters: Path, merged: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(adapters, tmp_path / "run")
    config = lora_config(tiny, run, resume=True)
    with pytest.raises(OutputInUseError, match=r"lora\.rank"):
        train_rl.run(replace(config, lora=LoraConfig(rank=8, target=TARGETS)))
    shutil.rmtree(checkpoint(run))
    train_rl.run(config)
    assert bytes_of(checkpoint(run)) == bytes_of(checkpoint(merged))


def test_a_checkpoint_of_adapters_is_shown_and_says_how_it_is_merged(adapters: Path, tmp_path: Path) -> None:
    shown = show(checkpoint(adapters), verify=True)
    assert (shown.state, shown.facts["model"]) == ("complete", None)
    assert (shown.facts["adapter"]["rank"], shown.facts["adapter"]["alpha"]) == (4, 8)
    command = f"`rlfr merge {checkpoint(adapters)}`"
    assert command in shown.note
    for wanted in ("model", "adapter", "."):
        with pytest.raises(InputError if wanted != "model" else MissingInputError) as caught:
            score.run(
                score_config(
                    checkpoint(adapters) / "flow.safetensors",
                    tmp_path / "scores",
                    model=str(checkpoint(adapters) / wanted),
                    rollouts=adapters / "rollouts" / "step-000004",
                )
            )
        assert command in str(caught.value.hint)
    with pytest.raises(MissingInputError) as caught:
        write_rollouts_page(adapters, tmp_path / "page.html", model=None, num_responses=4)
    assert command in str(caught.value.hint)


def test_merge_wants_the_base_model_where_it_was_or_where_it_is_said_to_be(
    tiny: TinyArtifacts, adapters: Path, merged: Path, random_model: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(adapters, tmp_path / "run")
    config = checkpoint(run) / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tiny.policy.resolve()), "/nowhere"))
    manifest = checkpoint(run) / "manifest.json"
    text = manifest.read_text()
    size = (checkpoint(adapters) / "adapter" / "adapter_config.json").stat().st_size
    manifest.write_text(text.replace(f'"bytes": {size}', f'"bytes": {config.stat().st_size}'))
    with pytest.raises(MissingInputError, match="adapters of /nowhere") as caught:
        merge(checkpoint(run))
    assert "--model" in str(caught.value.hint)
    with pytest.raises(MismatchError, match="another model than"):
        merge(checkpoint(run), model=str(random_model))
    (checkpoint(run) / "model").mkdir()
    with pytest.raises(OutputInUseError, match="not of this checkpoint"):
        merge(checkpoint(run), model=str(tiny.policy))
    (checkpoint(run) / "model").rmdir()
    merge(checkpoint(run), model=str(tiny.policy))
    assert bytes_of(checkpoint(run) / "model") == bytes_of(checkpoint(merged) / "model")


def test_a_model_is_named_for_checkpoints_alone(tiny: TinyArtifacts) -> None:
    with pytest.raises(ConfigError, match="--model is for a checkpoint of adapters"):
        merge(tiny.rollouts, model=str(tiny.policy))


def test_a_wrong_target_and_a_missing_package_are_found_before_work(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lora_config(tiny, tmp_path / "run", lora=LoraConfig(rank=4, target=("q_proj", "query")))
    with pytest.raises(ConfigError, match=r"--lora-target query: no such linear layer.*q_proj, k_proj"):
        train_rl.run(config)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError) as caught:
        train_rl.run(lora_config(tiny, tmp_path / "run"))
    assert caught.value.hint == "pip install 'rlfr-cli[lora]'"
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_is_trained(tiny: TinyArtifacts, tmp_path: Path) -> None:
    summary = train_rl.run(lora_config(tiny, tmp_path, dry_run=True))
    assert summary is not None
    assert summary["trained"].startswith("adapters of rank 4 on q_proj, down_proj: ")
    whole = train_rl.run(lora_config(tiny, tmp_path, dry_run=True, lora=LoraConfig()))
    assert whole is not None
    assert whole["trained"] == "the whole policy"
    assert whole["checkpoint_bytes"] > summary["checkpoint_bytes"]
