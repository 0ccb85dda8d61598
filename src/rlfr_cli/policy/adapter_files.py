"""Adapters on disk in PEFT's format, and the plain model that a base model and they make.

Writes and reads ``adapter_config.json`` and ``adapter_model.safetensors``, which ``peft.PeftModel.from_pretrained``
reads too. Reading needs no peft. A merged model is the base model's own weights, in the dtype of its folder, with the
adapters added in float32 and then rounded to that dtype.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rlfr_cli.artifacts.files import read_json
from rlfr_cli.artifacts.fingerprint import ModelFingerprint, tensors_sha256
from rlfr_cli.errors import ArtifactError
from rlfr_cli.policy.adapters import ADAPTER, MATRICES, Adapters, import_peft, merge_weight
from rlfr_cli.policy.loading import Placement, Policy, load_policy, read_model_config, stored_dtype_of
from rlfr_cli.policy.saving import DTYPE_NAMES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, before the name of a module in the transformers model


def write_adapter_folder(folder: Path, adapters: Adapters, weights: Mapping[str, torch.Tensor], base: str) -> None:
    """Write adapters.

    Args:
        weights: by parameter name in the policy's model.
        base: the folder or hub name of the base model.
    """
    peft = import_peft()
    config = peft.LoraConfig(
        r=adapters.rank,
        lora_alpha=int(adapters.alpha) if adapters.alpha.is_integer() else adapters.alpha,  # PEFT's is an integer
        target_modules=list(adapters.targets),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    named = {PREFIX + name.replace(f".{ADAPTER}.", "."): weight.contiguous() for name, weight in weights.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})


def base_of(folder: Path) -> str:
    """The folder or hub name of the base model that an adapter folder names."""
    return str(read_json(folder / CONFIG)["base_model_name_or_path"])


def load_merged(base: Path, adapter: Path, device: torch.device, *, trust_remote_code: bool = False) -> Policy:
    """The base model in main memory, in the dtype of its folder, with adapters merged into it.

    Args:
        device: where layers are merged, one after the other.

    Raises:
        ArtifactError: the adapters are of another model.
    """
    dtype = stored_dtype_of(read_model_config(base, trust_remote_code))
    placement = Placement(torch.device("cpu"), dtype, trust_remote_code=trust_remote_code)
    policy = load_policy(base, placement, weights_dtype=dtype)
    parameters = dict(policy.model.named_parameters())
    config, matrices = read_json(adapter / CONFIG), load_file(adapter / WEIGHTS)
    scaling = config["lora_alpha"] / config["r"]
    for layer in sorted({name.split(f".{MATRICES[0]}.")[0] for name in matrices if f".{MATRICES[0]}." in name}):
        a, b = (matrices.pop(f"{layer}.{matrix}.weight") for matrix in MATRICES)
        weight = parameters.get(f"{layer.removeprefix(PREFIX)}.weight")
        if weight is None or weight.shape != (len(b), a.shape[1]):
            raise ArtifactError(f"{adapter}: {layer} is no layer of {base}, or one of another size")
        weight.data = merge_weight(weight.detach().to(device), a, b, scaling).to("cpu", dtype)
    assert not matrices, "only linear layers are adapted"
    return policy


def fingerprint_of(policy: Policy, base: ModelFingerprint) -> ModelFingerprint:
    """The fingerprint of the folder that a merged policy would be saved as.

    Args:
        base: of the model that it was made from, which has the same architecture.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    # As save_pretrained does before it writes.
    state = remove_tied_weights_from_state_dict(policy.model.state_dict(), policy.model)
    state = revert_weight_conversion(policy.model, state)
    return replace(base, weights_sha256=tensors_sha256(_entries(state, policy.placement.dtype)))


def _entries(
    state: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, str, list[int], list[memoryview]]]:
    for name in sorted(state):
        tensor = state[name].detach().to(dtype).contiguous()
        yield name, DTYPE_NAMES[dtype], list(tensor.shape), [tensor.reshape(-1).view(torch.uint8).numpy().data]
