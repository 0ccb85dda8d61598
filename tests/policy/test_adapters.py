"""Adapters in a policy: where they sit, that they begin as nothing, and what a merged weight is, to the bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlfr_cli.config.lora import LoraConfig
from rlfr_cli.errors import ConfigError, MissingPackageError
from rlfr_cli.policy import adapters as module
from rlfr_cli.policy.adapters import add_adapters, merge_weight, plain_weights, plan_adapters
from rlfr_cli.policy.forward import forward_batches
from rlfr_cli.policy.loading import Placement, Policy, load_policy, read_model_config
from tiny_models import FAMILIES
from tiny_policies import CPU, CPU_BF16, ModelFolders, random_sequences

SEQUENCES = random_sequences([(4, 6), (3, 9)])


def adapted(folder: Path, placement: Placement = CPU, *, seed: int = 0, **options: object) -> Policy:
    policy = load_policy(folder, placement)
    config = LoraConfig(**{"rank": 3, **options})  # type: ignore[arg-type]
    add_adapters(policy, plan_adapters(config, read_model_config(folder)), seed)
    return policy


def trained(policy: Policy) -> dict[str, Tensor]:
    return {name: weight for name, weight in policy.model.named_parameters() if weight.requires_grad}


def layers(policy: Policy) -> set[str]:
    return {name.split(".lora_")[0] for name in trained(policy)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_the_blocks_is_adapted_and_no_head(family: str, model_folders: ModelFolders) -> None:
    folder = model_folders.folder(family, tied=False)
    plain = load_policy(folder, CPU).model
    linear = {name for name, layer in plain.named_modules() if isinstance(layer, torch.nn.Linear)}
    policy = adapted(folder)
    assert layers(policy) == linear - {"lm_head"}
    assert policy.adapters is not None
    assert policy.adapters.num_parameters == sum(weight.numel() for weight in trained(policy).values())


def test_targets_name_layers_and_may_name_their_parents(model_folders: ModelFolders) -> None:
    folder = model_folders.folder("llama")
    assert {name.split(".", 3)[3] for name in layers(adapted(folder, target=("self_attn.q_proj", "up_proj")))} == {
        "self_attn.q_proj",
        "mlp.up_proj",
    }


def test_a_target_is_never_taken_outside_the_blocks(
    model_folders: ModelFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that something else has too is given to PEFT in full."""
    folder = model_folders.folder("llama", num_blocks=2)
    real = module._is_named

    def also_the_head(name: str, targets: list[str]) -> bool:
        return real(name, targets) or (name == "lm_head" and "q_proj" in targets)

    monkeypatch.setattr(module, "_is_named", also_the_head)
    targets = plan_adapters(LoraConfig(rank=3, target=("q_proj",)), read_model_config(folder)).targets
    assert targets == ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


@pytest.mark.parametrize("target", ["lm_head", "proj", "embed_tokens", "norm"])
def test_a_target_that_is_no_layer_of_the_blocks_is_refused_with_those_that_are(
    target: str, model_folders: ModelFolders
) -> None:
    config = read_model_config(model_folders.folder("phi3"))
    with pytest.raises(ConfigError, match=rf"--lora-target {target}: .*phi3 model.*qkv_proj") as caught:
        plan_adapters(LoraConfig(rank=3, target=("qkv_proj", target)), config)
    assert "leave --lora-target out" in str(caught.value.hint)


def test_a_missing_peft_is_named_with_its_extra(model_folders: ModelFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match="--lora-rank needs the package peft") as caught:
        plan_adapters(LoraConfig(rank=3), read_model_config(model_folders.folder("llama")))
    assert caught.value.hint == "pip install 'rlfr-cli[lora]'"


@pytest.mark.parametrize("placement", [CPU, CPU_BF16])
def test_new_adapters_change_no_bit_of_log_probabilities_or_latents(
    placement: Placement, model_folders: ModelFolders
) -> None:
    folder = model_folders.folder("qwen2")
    found = [
        next(iter(forward_batches(policy, SEQUENCES, temperature=1.0, tapped=(1, 2))))
        for policy in (load_policy(folder, placement), adapted(folder, placement))
    ]
    for name in ("logprobs", "latents"):
        for before, after in zip(getattr(found[0], name), getattr(found[1], name), strict=True):
            assert before.dtype == after.dtype
            assert torch.equal(before, after)


def test_adapters_depend_on_the_seed_alone_and_are_float32(model_folders: ModelFolders) -> None:
    folder = model_folders.folder("llama")
    torch.manual_seed(1)
    first = trained(adapted(folder))
    torch.manual_seed(2)
    again, other = trained(adapted(folder, CPU_BF16)), trained(adapted(folder, seed=1))
    assert {weight.dtype for weight in again.values()} == {torch.float32}
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert (".lora_B." in name) == (not weight.any())
        assert torch.equal(weight, other[name]) == (".lora_B." in name)


def test_adapters_reach_the_tapped_latents(model_folders: ModelFolders) -> None:
    policy = adapted(model_folders.folder("llama"), target=("down_proj",))
    before = next(iter(forward_batches(policy, SEQUENCES, temperature=1.0, tapped=(1, 2)))).latents
    with torch.no_grad():
        trained(policy)["model.layers.2.mlp.down_proj.lora_B.default.weight"].fill_(0.1)
    after = next(iter(forward_batches(policy, SEQUENCES, temperature=1.0, tapped=(1, 2)))).latents
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:, 0], new[:, 0])  # block 1 comes first
        assert not torch.equal(old[:, 1], new[:, 1])


def test_plain_weights_bear_no_name_of_an_adapter(model_folders: ModelFolders) -> None:
    folder = model_folders.folder("qwen2", tied=True)
    plain = dict(load_policy(folder, CPU).model.named_parameters())
    policy = adapted(folder)
    for weight in trained(policy).values():
        weight.data.fill_(0.5)
    merged = dict(plain_weights(policy, lambda parameter: parameter.detach()))
    assert list(merged) == list(plain)
    layer = "model.layers.3.self_attn.k_proj"
    # alpha / rank is 2, and each entry of B A is 3 x 0.5 x 0.5.
    torch.testing.assert_close(merged[f"{layer}.weight"], plain[f"{layer}.weight"] + 1.5)
    assert torch.equal(merged[f"{layer}.bias"], plain[f"{layer}.bias"])


# Merging


def test_a_merged_weight_is_the_rounded_sum_and_not_that_of_a_matrix_product() -> None:
    torch.manual_seed(0)
    weight, a, b = torch.randn(64, 48), torch.randn(5, 48), torch.randn(64, 5)
    merged = merge_weight(weight, a, b, 0.3)
    torch.testing.assert_close(merged, weight + 0.3 * (b @ a))
    exact = torch.zeros(64, 48, dtype=torch.float64)
    for rank in range(5):
        exact += b[:, rank, None].double() * a[None, rank].double()
    assert torch.equal(merged, (exact * 0.3 + weight.double()).float())


def test_neither_blocks_nor_threads_change_a_bit_of_a_merged_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, a, b = torch.randn(70, 48), torch.randn(5, 48), torch.randn(70, 5)
    whole = merge_weight(weight, a, b, 0.7)
    monkeypatch.setattr(module, "ELEMENTS_AT_ONCE", 3 * 48 + 7)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(merge_weight(weight, a, b, 0.7), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(merge_weight(weight.bfloat16(), a, torch.zeros_like(b), 0.7), weight.bfloat16().float())
