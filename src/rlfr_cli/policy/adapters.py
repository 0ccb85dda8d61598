"""Low-rank adapters (LoRA) in a policy: its own weights stay as they are, and two small matrices a layer are trained.

An adapted linear layer computes W x + (alpha / rank) B (A x), with A [rank, in] random and B [out, rank] zero at the
start, so that the policy begins as it was (Hu et al., arXiv 2106.09685). PEFT puts the layers into the transformers
model in place; adapters are float32, and there is no dropout: old log-probabilities are those of the policy that
sampled. Everything outside training sees plain weights: W + (alpha / rank) B A, under the names of a plain checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import nn

from rlfr_cli.config.lora import LoraConfig
from rlfr_cli.errors import ConfigError, MissingPackageError
from rlfr_cli.policy.loading import Policy
from rlfr_cli.policy.tapping import decoder_blocks

ADAPTER = "default"  # PEFT's name for one set of adapters among several
MATRICES = ("lora_A", "lora_B")
ELEMENTS_AT_ONCE = 2**22  # of a weight that is merged: 32 MiB in float64


@dataclass(frozen=True)
class Adapters:
    """Adapters of a policy.

    Attributes:
        targets: names by which PEFT finds the layers.
        num_parameters: of all of them.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    num_parameters: int

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


def import_peft() -> Any:
    """The package peft.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import peft
    except ImportError:  # an optional package
        raise MissingPackageError("--lora-rank needs the package peft", hint="pip install 'rlfr-cli[lora]'") from None
    return peft


def plan_adapters(config: LoraConfig, model_config: Any, trust_remote_code: bool = False) -> Adapters:
    """The adapters that the options ask for, of a model of which no weights are loaded.

    Raises:
        ConfigError: a target names no linear layer of the model's blocks.
        MissingPackageError: peft is not installed.
    """
    from transformers import AutoModelForCausalLM

    import_peft()
    with torch.device("meta"):
        # A copy, since transformers writes its choices into the config.
        model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config), trust_remote_code=trust_remote_code)
    layers = _target_layers(model, config.target)
    targets = config.target or tuple(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    if set(layers) != {name for name, _ in model.named_modules() if _is_named(name, targets)}:
        targets = tuple(layers)  # the short names stand for something outside the blocks too
    sizes = [layer.in_features + layer.out_features for layer in layers.values()]
    return Adapters(config.rank, config.resolved_alpha, targets, config.rank * sum(sizes))


def _target_layers(model: Any, targets: Sequence[str]) -> dict[str, nn.Linear]:
    blocks = {id(module) for module in decoder_blocks(model.base_model).modules()}
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in blocks
    }
    unknown = [target for target in targets if not any(_is_named(name, [target]) for name in linear)]
    if unknown or not linear:
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear)) or "none"
        raise ConfigError(
            f"--lora-target {' '.join(unknown) or '(all)'}: no such linear layer in the blocks of this "
            f"{model.config.model_type} model, which have: {known}",
            hint="leave --lora-target out to adapt them all" if linear else "train the whole policy: --lora-rank 0",
        )
    return {name: layer for name, layer in linear.items() if not targets or _is_named(name, targets)}


def _is_named(name: str, targets: Sequence[str]) -> bool:
    """Whether PEFT takes a module of this name for one of the targets."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def add_adapters(policy: Policy, adapters: Adapters, seed: int) -> None:
    """Put adapters into a policy, whose own weights are frozen; equal seeds give equal adapters.

    They are called inside ``Placement.autocast``: a policy's weights are in the compute dtype, adapters are float32.
    """
    peft = import_peft()
    config = peft.LoraConfig(r=adapters.rank, lora_alpha=adapters.alpha, target_modules=list(adapters.targets))
    policy.model.requires_grad_(False)
    peft.inject_adapter_in_model(config, policy.model, ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    for module in policy.model.modules():
        if not isinstance(module, peft.tuners.lora.LoraLayer):
            continue
        module.cast_input_dtype_enabled = False  # autocast does it, without a float32 copy of the input
        a, b = (getattr(module, matrix)[ADAPTER].weight for matrix in MATRICES)
        drawn = nn.init.kaiming_uniform_(torch.empty(a.shape), a=sqrt(5), generator=generator)
        a.data, b.data = drawn.to(a.device), torch.zeros_like(b, dtype=torch.float32)
    policy.adapters = adapters
    trained = sum(parameter.numel() for parameter in policy.model.parameters() if parameter.requires_grad)
    assert trained == adapters.num_parameters, "other layers were adapted than planned"


def plain_weights(policy: Policy, whole: Callable[[nn.Parameter], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and float32 weights of a policy as a plain checkpoint has them, adapters merged; a tied one comes once.

    Args:
        whole: a parameter's whole weights. It is called for all of them, always in the same order.
    """
    parameters = dict(policy.model.named_parameters())
    for name, parameter in parameters.items():
        layer, base, kind = name.rpartition(".base_layer.")
        if any(f".{matrix}." in name for matrix in MATRICES):
            continue
        weight = whole(parameter).float()
        if base and kind == "weight":
            assert policy.adapters is not None
            a, b = (whole(parameters[f"{layer}.{matrix}.{ADAPTER}.weight"]) for matrix in MATRICES)
            weight = merge_weight(weight, a, b, policy.adapters.scaling)
        yield f"{layer}.{kind}" if base else name, weight


@torch.no_grad()
def merge_weight(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """weight + scaling * b @ a in float32, the same bits on every machine and device.

    A product of two float32 numbers is exact in float64, and products are summed in the order of ranks, which no matrix
    product promises. So a checkpoint's fingerprint does not depend on where it was merged.
    """
    merged = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    rows = max(1, ELEMENTS_AT_ONCE // weight.shape[1])
    a = a.to(weight.device, torch.float64)
    b = b.to(weight.device, torch.float64)
    for start in range(0, len(weight), rows):
        part = b[start : start + rows]
        total = torch.zeros(len(part), weight.shape[1], dtype=torch.float64, device=weight.device)
        for rank in range(len(a)):
            total.addcmul_(part[:, rank, None], a[None, rank])
        merged[start : start + rows] = total.mul_(scaling).add_(weight[start : start + rows])
    return merged
