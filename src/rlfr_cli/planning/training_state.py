"""What a GPU holds of the policy while it is trained: weights, moments and gradients, by ZeRO stage.

Stage 0 is plain PyTorch on one GPU or a copy on each: float32 weights, moments and gradients, casts by autocast.
Stages 1 to 3 are DeepSpeed's, with the settings of ``engines/deepspeed_settings.py``: weights in the compute dtype;
float32 weights and moments, 12 bytes a parameter, shared out over the GPUs; gradients summed in float32, shared out
from stage 2 on; the weights too in stage 3, where DeepSpeed gathers up to 10^9 of them at a time, and the output head
stays whole. Gradients pass through buckets of 5 x 10^8 elements. These are DeepSpeed's defaults; none was measured.
With adapters the policy's own weights are in the compute dtype in every stage, and have no float32 copy, moments or
gradients: adapters alone have them.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlfr_cli.planning.memory import Numbers, Parts, stepping_bytes
from rlfr_cli.planning.model_sizes import ModelSizes

BUCKET, LIVE = 5e8, 1e9


@dataclass(frozen=True)
class TrainingState:
    """Bytes of one GPU.

    Attributes:
        numbers: in which the policy computes.
        resting: weights and moments, which are always there.
        gradients: from the first micro-batch of an optimiser step to its end.
        stepping: further bytes of the optimiser's step.
        whole: further weights while each process runs the policy by itself, to draw with it.
        in_main_memory: bytes of one GPU's share that lie in main memory.
    """

    numbers: Numbers
    resting: Parts
    gradients: float
    stepping: float
    whole: float = 0.0
    in_main_memory: float = 0.0


def training_state(
    model: ModelSizes,
    numbers: Numbers,
    stage: int,
    gpus: int,
    *,
    adapters: int = 0,
    offload_optimiser: bool = False,
    offload_parameters: bool = False,
) -> TrainingState:
    """The state for a ZeRO stage.

    Args:
        numbers: of a policy that is trained in plain PyTorch.
        adapters: their weights; 0 where the whole policy is trained.
        offload_optimiser: moments and float32 weights lie in main memory; from stage 2 on gradients too.
        offload_parameters: so does a GPU's share of the weights, in stage 3.
    """
    parameters, compute, in_main_memory = model.parameters, numbers.compute, 0.0
    trained = adapters or parameters
    narrow = Numbers(compute, compute, numbers.on_gpu)
    if stage == 0 and adapters:
        resting = {"weights": compute * parameters + 4 * adapters, "optimiser": 8 * adapters}
        return TrainingState(narrow, resting, 4 * adapters, 4 * adapters)
    if stage == 0:
        resting = {"weights": 4 * parameters, "optimiser": 8 * parameters}
        return TrainingState(numbers, resting, 4 * parameters, stepping_bytes(model, numbers))
    state: float = 12 * trained / gpus
    # A bucket in the compute dtype, and in float32 what is sent of it.
    buckets = min(BUCKET, trained) * (compute + (4 if compute < 4 else 0))
    gradients: float = 4 * trained / (gpus if stage > 1 else 1)
    if offload_optimiser:
        state, in_main_memory = 0, state
        gradients = 0 if stage > 1 else gradients
    weights: float = compute * (parameters + adapters)
    whole = 0.0
    if stage == 3:
        gathered = min(compute * (LIVE + model.embedding), weights)
        share, whole = weights / gpus, weights - gathered
        weights = gathered + (0 if offload_parameters else share)
        in_main_memory += share if offload_parameters else 0
    held: dict[str, float] = {"weights": weights, "optimiser": state}
    return TrainingState(narrow, held, gradients + buckets, 0.0, whole, in_main_memory)
