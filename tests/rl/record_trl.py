"""Records what TRL's GRPOTrainer makes of given log-probabilities, into ``trl_recorded.safetensors`` beside this file.

TRL is no dependency of this project, so this runs in an environment of its own, from the repository's folder:

    python3.11 -m venv /tmp/trl-venv
    /tmp/trl-venv/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets safetensors
    PYTHONPATH=tests OMP_NUM_THREADS=1 /tmp/trl-venv/bin/python tests/rl/record_trl.py

Each case builds a GRPOTrainer and calls its ``training_step`` once a micro-batch. Two of its methods are replaced:
the one that generates returns given completions, and the one that runs the model returns given log-probabilities,
the policy's with a gradient. Masks, advantages, counts, the shuffle, the split into micro-batches, the loss and
its scaling are TRL's. It computes in float64 (one case in float32), from inputs that float32 holds exactly.

Written, with the settings and versions as JSON in the metadata:
    logprobs, old_logprobs, reference_logprobs, token_advantages [B, T]: the inputs; padding holds values too
    CASE/mask [B, T], CASE/advantages [B] or [B, T], CASE/micro_batch [B]: as TRL made them, rows in input order
    CASE/loss, CASE/clip_ratio, CASE/kl [micro-batches]: what each step returned and logged
    CASE/gradient [B, T]: of the sum of the losses with respect to logprobs

Shapes: B responses, T the longest's tokens.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from tiny_models import make_model_folder, make_tokenizer

OUT = Path(__file__).with_name("trl_recorded.safetensors")
LOSS_TYPES = ["grpo", "dr_grpo", "dapo", "bnpo"]
END_TOKEN, FIRST_ROW_TOKEN = 2, 10  # a completion begins with its row's token, which finds it after the shuffle
LENGTHS = [6, 2, 4, 1, 3, 5, 6, 2]
CUT_OFF = [3, 5]  # rows without the end token
REWARDS = [1.0, 0.0, 0.5, 0.2, 0.1, 1.0, 0.3, 0.9]  # two groups of four
MEAN_LOG_RATIOS = [0.5, -0.4, 0.6, 0.1, 0.55, -0.5, 0.1, -0.35]  # so that sequence ratios are clipped too

BASE: dict[str, Any] = {
    "beta": 0.0,
    "delta": None,
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "gradient_accumulation_steps": 2,
    "importance_sampling_level": "token",
    "mask_truncated_completions": False,
    "max_completion_length": 10,
    "num_iterations": 2,  # above 1, TRL keeps the log-probabilities of generation apart
    "per_device_train_batch_size": 4,
    "steps_per_generation": 2,
    "use_bias_correction_kl": False,
}
ONE_STEP = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8, "steps_per_generation": 1}
# "given" chooses among the inputs; every other key is an option of GRPOConfig.
VARIANTS: dict[str, dict[str, Any]] = {
    "one_micro_batch": ONE_STEP,
    "two_micro_batches": {},
    "token_advantages": {"given": {"token_advantages": True}},
    "sequence_ratio": {"importance_sampling_level": "sequence"},
    "delta": {"delta": 1.5},
    "kl": {"beta": 0.1},
    "kl_times_ratio": {"beta": 0.1, "use_bias_correction_kl": True},
    "truncated_masked": {"mask_truncated_completions": True},
    "together": {
        "beta": 0.1,
        "delta": 1.5,
        "given": {"token_advantages": True},
        "importance_sampling_level": "sequence",
        "mask_truncated_completions": True,
    },
}
OTHER_CASES: dict[str, dict[str, Any]] = {
    "grpo/delta_within_the_clip": {"delta": 1.1, "loss_type": "grpo"},
    "grpo/sequence_ratio_one_micro_batch": {"importance_sampling_level": "sequence", "loss_type": "grpo", **ONE_STEP},
    "dapo/two_optimiser_steps": {"loss_type": "dapo", "per_device_train_batch_size": 2, "steps_per_generation": 4},
    "grpo/huge_ratio_float32": {"given": {"first_old_logprob": -100.0, "float32": True}, "loss_type": "grpo"},
    "grpo/huge_ratio_float64": {"given": {"first_old_logprob": -100.0}, "loss_type": "grpo"},
}


def make_inputs() -> dict[str, Tensor]:
    """The given log-probabilities and per-token advantages [B, T], float32, none of them zero where padded."""
    generator = torch.Generator().manual_seed(5)
    shape = (len(LENGTHS), max(LENGTHS))
    old = -0.5 - 2 * torch.rand(shape, generator=generator)
    log_ratio = torch.tensor(MEAN_LOG_RATIOS)[:, None] + 0.3 * torch.randn(shape, generator=generator)
    return {
        "logprobs": old + log_ratio,
        "old_logprobs": old,
        "reference_logprobs": old + 0.4 * torch.randn(shape, generator=generator),
        "token_advantages": torch.randn(shape, generator=generator),
    }


def rows_of(first_tokens: Tensor) -> Tensor:
    return first_tokens - FIRST_ROW_TOKEN


class GivenTrainer(GRPOTrainer):
    """GRPOTrainer whose completions and log-probabilities are given."""

    given: dict[str, Tensor]
    use_token_advantages: bool

    def _generate_single_turn(self, *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        completions = []
        for row, length in enumerate(LENGTHS):
            tokens = [FIRST_ROW_TOKEN + row] + [5] * (length - 1)
            completions.append(tokens if row in CUT_OFF else [*tokens[:-1], END_TOKEN])
        return completions, None

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **_: Any
    ) -> tuple[Tensor, Tensor, None]:
        if model is not self.model:
            name = "reference_logprobs"
        else:
            name = "logprobs" if torch.is_grad_enabled() else "old_logprobs"
        logprobs = self.given[name][rows_of(input_ids[:, -logits_to_keep])]
        return logprobs, torch.ones_like(logprobs).detach(), None

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if self.use_token_advantages:
            batch["advantages"] = self.given["token_advantages"].clone()
        return batch


def given_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [REWARDS[ids[0] - FIRST_ROW_TOKEN] for ids in completion_ids]


def record(settings: dict[str, Any], inputs: dict[str, Tensor], model: Path, scratch: Path) -> dict[str, Tensor]:
    given = settings["given"]
    trainer = GivenTrainer(
        model=str(model),
        reward_funcs=given_reward,
        args=GRPOConfig(
            output_dir=str(scratch),
            bf16=False,
            num_generations=4,
            report_to="none",
            use_cpu=True,
            **{name: value for name, value in settings.items() if name != "given"},
        ),
        train_dataset=Dataset.from_dict({"prompt": ["1+1", "2+2"]}),
        processing_class=make_tokenizer(),
    )
    dtype = torch.float32 if given.get("float32") else torch.float64
    trainer.given = {name: tensor.to(dtype, copy=True) for name, tensor in inputs.items()}
    if "first_old_logprob" in given:
        trainer.given["old_logprobs"][0, 0] = given["first_old_logprob"]
    trainer.given["logprobs"].requires_grad_()
    trainer.use_token_advantages = bool(given.get("token_advantages"))
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # train() sets it

    prompts = [{"prompt": prompt} for prompt in ("1+1", "2+2") for _ in range(4)]
    num_steps = trainer.args.steps_per_generation
    losses = torch.stack([trainer.training_step(trainer.model, prompts, None) for _ in range(num_steps)])

    batches = trainer._buffered_inputs
    order = rows_of(torch.cat([batch["completion_ids"][:, 0] for batch in batches])).argsort()
    metrics = trainer._metrics["train"]
    recorded = {
        "loss": losses,
        "gradient": trainer.given["logprobs"].grad,
        "mask": torch.cat([batch["completion_mask"] for batch in batches])[order].bool(),
        "advantages": torch.cat([batch["advantages"] for batch in batches])[order].float(),
        "micro_batch": torch.arange(num_steps).repeat_interleave(len(order) // num_steps)[order],
        "clip_ratio": torch.tensor(metrics["clip_ratio/region_mean"]),
    }
    if settings["beta"]:
        recorded["kl"] = torch.tensor(metrics["kl"])
    return recorded


def main() -> None:
    cases = {
        f"{loss_type}/{name}": {"loss_type": loss_type, **variant}
        for loss_type in LOSS_TYPES
        for name, variant in VARIANTS.items()
    }
    cases.update(OTHER_CASES)
    inputs = make_inputs()
    tensors = dict(inputs)
    settings = {name: {**BASE, "given": {}, **case} for name, case in cases.items()}
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model_folder(Path(scratch, "model"), "llama", num_blocks=1)
        for name, setting in settings.items():
            for key, tensor in record(setting, inputs, model, Path(scratch, "out")).items():
                tensors[f"{name}/{key}"] = tensor.detach().contiguous()
    versions = {module.__name__: module.__version__ for module in (accelerate, torch, transformers, trl)}
    header = {"cases": settings, "versions": versions}
    save_file(tensors, OUT, metadata={"rlfr": json.dumps(header, sort_keys=True)})
    print(f"{OUT}: {len(settings)} cases, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
