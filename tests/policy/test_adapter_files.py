"""Adapters in PEFT's format, and the model that they make with their base: files, bits and fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlfr_cli.artifacts.fingerprint import model_fingerprint
from rlfr_cli.config.lora import LoraConfig
from rlfr_cli.errors import ArtifactError
from rlfr_cli.policy.adapter_files import base_of, fingerprint_of, load_merged, write_adapter_folder
from rlfr_cli.policy.adapters import Adapters, add_adapters, plain_weights, plan_adapters
from rlfr_cli.policy.loading import Policy, load_policy
from rlfr_cli.policy.saving import save_model_folder
from tiny_models import FAMILIES
from tiny_policies import CPU, ModelFolders

DEVICE = torch.device("cpu")


def random_adapters(folder: Path, out: Path, **options: object) -> tuple[Policy, Adapters]:
    """A policy with adapters that are not zero, and their files."""
    policy = load_policy(folder, CPU)
    config = LoraConfig(**{"rank": 3, "alpha": 5.0, **options})  # type: ignore[arg-type]
    adapters = plan_adapters(config, policy.model.config)
    add_adapters(policy, adapters, 0)
    generator = torch.Generator().manual_seed(0)
    trained = {name: weight for name, weight in policy.model.named_parameters() if weight.requires_grad}
    for weight in trained.values():
        weight.data.normal_(0, 0.1, generator=generator)
    write_adapter_folder(out, adapters, {name: weight.detach() for name, weight in trained.items()}, str(folder))
    return policy, adapters


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> Tensor:
    logits: Tensor = model.eval()(torch.arange(5, 30)[None]).logits
    return logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_and_the_merged_folder_give_the_adapted_models_logits(
    family: str, tied: bool, model_folders: ModelFolders, tmp_path: Path
) -> None:
    folder = model_folders.folder(family, tied=tied)
    policy, _ = random_adapters(folder, tmp_path / "adapter")
    adapted = logits_of(policy.model)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(logits_of(theirs), adapted)
    merged = load_merged(folder, tmp_path / "adapter", DEVICE)
    save_model_folder(merged, tmp_path / "model", torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits_of(plain), adapted, rtol=1e-5, atol=1e-5)
    assert float((adapted - logits_of(AutoModelForCausalLM.from_pretrained(folder))).abs().max()) > 0.1
    named = dict(plain_weights(policy, lambda parameter: parameter.detach()))
    assert all(torch.equal(weight, named[name]) for name, weight in plain.named_parameters())
    # Known without a folder, and the base's is another.
    base = model_fingerprint(folder)
    assert fingerprint_of(merged, base) == model_fingerprint(tmp_path / "model")
    assert fingerprint_of(load_policy(folder, CPU), base) == base != fingerprint_of(merged, base)


def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once(model_folders: ModelFolders, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    save_model_folder(model_folders.policy("llama", tied=False), folder, torch.bfloat16)
    policy, _ = random_adapters(folder, tmp_path / "adapter", target=("q_proj",))
    merged = load_merged(folder, tmp_path / "adapter", DEVICE)
    save_model_folder(merged, tmp_path / "model", merged.placement.dtype)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    for name, weight in plain_weights(policy, lambda parameter: parameter.detach()):
        assert torch.equal(stored[name], weight.bfloat16()), name
    base = load_file(folder / "model.safetensors")
    assert torch.equal(stored["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(
        stored["model.layers.0.self_attn.q_proj.weight"], base["model.layers.0.self_attn.q_proj.weight"]
    )
    assert fingerprint_of(merged, model_fingerprint(folder)) == model_fingerprint(tmp_path / "model")


def test_adapter_files_are_float32_name_their_base_and_are_the_same_every_time(
    model_folders: ModelFolders, tmp_path: Path
) -> None:
    folder = model_folders.folder("qwen2")
    _, adapters = random_adapters(folder, tmp_path / "one")
    weights = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in weights
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 5.0, 0.0)
    assert config["target_modules"] == sorted(adapters.targets)
    assert base_of(tmp_path / "one") == str(folder)
    random_adapters(folder, tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_adapters_of_another_model_are_refused(model_folders: ModelFolders, tmp_path: Path) -> None:
    random_adapters(model_folders.folder("llama"), tmp_path / "adapter")
    with pytest.raises(ArtifactError, match=r"gate_proj is no layer of"):
        load_merged(model_folders.folder("phi3"), tmp_path / "adapter", DEVICE)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    weights = load_file(path)
    save_file(weights | {name: weights[name][:, :-1].contiguous()}, path)
    with pytest.raises(ArtifactError, match="or one of another size"):
        load_merged(model_folders.folder("llama"), tmp_path / "adapter", DEVICE)


def test_scaling_counts(model_folders: ModelFolders, tmp_path: Path) -> None:
    folder = model_folders.folder("llama")
    for alpha in (3.0, 6.0):
        random_adapters(folder, tmp_path / str(alpha), alpha=alpha)
    base = load_policy(folder, CPU).model.state_dict()
    one, two = (load_merged(folder, tmp_path / str(alpha), DEVICE).model.state_dict() for alpha in (3.0, 6.0))
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(two[name] - base[name], 2 * (one[name] - base[name]), rtol=1e-4, atol=1e-5)
