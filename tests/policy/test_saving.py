"""A saved policy is a plain Hugging Face folder in the dtype asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlfr_cli.policy.loading import load_policy
from rlfr_cli.policy.saving import save_model_folder
from tiny_models import FAMILIES
from tiny_policies import CPU, ModelFolders


def test_bfloat16_on_disk_loads_as_bfloat16_and_leaves_memory_alone(
    model_folders: ModelFolders, tmp_path: Path
) -> None:
    policy = model_folders.policy()
    save_model_folder(policy, tmp_path, torch.bfloat16)
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype="auto")
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], weight.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_holds_the_same_tensors_as_the_one_it_came_from(
    family: str, tied: bool, dtype: torch.dtype, model_folders: ModelFolders, tmp_path: Path
) -> None:
    """Tied weights once: a second copy would be an output head of its own to other programs."""
    save_model_folder(model_folders.policy(family, tied=tied), tmp_path, dtype)
    before = load_file(model_folders.folder(family, tied=tied) / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], weight.to(dtype)) for name, weight in before.items())


def test_a_saved_folder_keeps_tokenizer_chat_template_and_end_tokens(
    model_folders: ModelFolders, tmp_path: Path
) -> None:
    policy = model_folders.policy()
    save_model_folder(policy, tmp_path, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "1 + 1?"}]
    assert tokenizer.apply_chat_template(messages) == policy.tokenizer.apply_chat_template(messages)
    again = load_policy(tmp_path, CPU)
    assert again.end_token_ids == policy.end_token_ids
    output = AutoModelForCausalLM.from_pretrained(tmp_path).generate(
        torch.tensor([[10, 20]]), max_new_tokens=3, min_new_tokens=3, do_sample=False
    )
    assert output.shape == (1, 5)
