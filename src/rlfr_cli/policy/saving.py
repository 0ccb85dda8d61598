"""Write a policy as a plain Hugging Face model folder that works with nothing of rlfr installed."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rlfr_cli.artifacts.files import read_json
from rlfr_cli.policy.loading import Policy, quiet_transformers

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in safetensors


def save_model_folder(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """Write weights in ``dtype``, config, generation config, tokenizer and chat template.

    The model in memory keeps its own dtype.
    """
    model = policy.model
    converted: dict[int, torch.Tensor] = {}  # by address: tied weights stay one tensor, and are written once
    weights = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in converted:
            converted[tensor.data_ptr()] = tensor.to(dtype)
        weights[name] = converted[tensor.data_ptr()]
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=weights)
        policy.tokenizer.save_pretrained(folder)
    _name_dtype(folder / "config.json", str(dtype).removeprefix("torch."))


def _name_dtype(config_path: Path, dtype: str) -> None:
    """``torch_dtype="auto"`` reads this; transformers writes the dtype of the model in memory."""
    config = read_json(config_path)
    config["dtype"] = dtype
    config.pop("torch_dtype", None)
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
