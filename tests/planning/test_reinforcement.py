"""A step of train-rl, phase by phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from planning.small_settings import QWEN_7B, make_setting
from rlfr_cli.config.lora import LoraConfig
from rlfr_cli.errors import ConfigError
from rlfr_cli.planning.memory import MicroBatch, Phase
from rlfr_cli.planning.reinforcement import micro_batch, num_steps, zero_stage
from rlfr_cli.planning.remedies import plan_stage, with_option
from rlfr_cli.planning.setting import Setting

PARAMETERS = 7_615_616_512
LATENTS = 1024 * 1025 * 3 * 3584 * 4  # of a batch: 1,024 responses, their tokens and one of the prompt, in float32


def phases(setting: Setting) -> dict[str, Phase]:
    return {phase.name: phase for phase in plan_stage(setting, "train-rl").phases}


def paper(**plan: Any) -> Setting:
    return make_setting(QWEN_7B, preset="paper", **plan)


def test_one_gpu_keeps_float32_state_through_the_step() -> None:
    step = phases(paper())
    assert list(step) == ["generate", "measure", "update", "optimiser step", "flow update"]
    for phase in step.values():
        assert phase.parts["weights"] == 4 * PARAMETERS
    assert step["generate"].parts["gradients"] == 0
    assert step["update"].parts["gradients"] == 4 * PARAMETERS
    assert step["optimiser step"].parts["optimiser"] == 12 * PARAMETERS  # moments, and a number a weight in the step


def test_latents_are_kept_until_the_flow_has_learned_and_packed_for_it() -> None:
    step = phases(paper())
    assert step["generate"].parts["latents"] == 0
    assert step["update"].parts["latents"] == step["optimiser step"].parts["latents"] == LATENTS
    assert step["flow update"].parts["latents"] == 2 * LATENTS
    still = phases(with_option(paper(), "train-rl", "online.online_steps", 0))
    assert "flow update" not in still
    assert still["update"].parts["latents"] == 0


def test_experts_are_mixed_in_by_their_share_and_packed_too() -> None:
    mixed = with_option(paper(), "train-rl", "online.expert_latents", "l")
    third = with_option(mixed, "train-rl", "online.expert_share", 0.25)  # one expert for three of the policy's own
    assert phases(third)["flow update"].parts["latents"] == pytest.approx(2 * LATENTS * 4 / 3)


def test_several_gpus_share_the_batch_out() -> None:
    one, eight = phases(paper()), phases(paper(gpus=8))
    # An eighth of the responses, and hidden states in bfloat16 under DeepSpeed.
    assert eight["update"].parts["latents"] == LATENTS / 16
    assert eight["flow update"].parts["flow"] < one["flow update"].parts["flow"]
    assert eight["update"].parts["optimiser"] == 12 * PARAMETERS / 8


def test_zero_stages_are_the_recipes_the_command_lines_or_the_default() -> None:
    assert zero_stage(paper()) == 0
    assert zero_stage(paper(gpus=2)) == 2
    assert zero_stage(paper(gpus=2, zero=3)) == 3
    assert zero_stage(paper(offload_optimiser=True)) == 2
    with pytest.raises(ConfigError, match="--offload-optimiser"):
        paper(zero=0, offload_optimiser=True)


def test_without_a_flow_there_is_none_of_it() -> None:
    plain = plan_stage(paper(plain_rlvr=True), "train-rl")
    assert all(phase.parts["flow"] == phase.parts["latents"] == 0 for phase in plain.phases)
    assert "flow" not in plain.work.other


def test_a_micro_batch_is_no_larger_than_its_budget_its_responses_or_one_response() -> None:
    setting = paper()
    assert micro_batch(setting, 1000) == MicroBatch(16384, 16384 * 1024 / 1280)
    assert micro_batch(setting, 2) == MicroBatch(2560, 2048)
    assert micro_batch(with_option(setting, "train-rl", "optimiser.tokens_per_micro_batch", 5), 9).tokens == 1280


def test_steps_and_operations_of_a_run() -> None:
    setting = paper(num_problems=1280)
    assert num_steps(setting) == 50
    work = plan_stage(setting, "train-rl").work
    assert work.tokens == 50 * 1024 * 1024
    twice = with_option(setting, "train-rl", "rollout.steps", 100)
    assert plan_stage(twice, "train-rl").work.flops == pytest.approx(2 * work.flops)
    assert work.other["training"] == pytest.approx(3 * work.other["reading"])


def test_evaluation_during_the_run_is_drawn_too() -> None:
    setting = with_option(paper(num_problems=100), "train-rl", "rollout.steps", 20)
    evaluated = with_option(setting, "train-rl", "evaluation.eval_data", "held-out")
    twice = with_option(evaluated, "train-rl", "evaluation.eval_every", 20)
    none, every_ten, every_twenty = (plan_stage(s, "train-rl").work.generation for s in (setting, evaluated, twice))
    assert every_ten - none == pytest.approx(1.5 * (every_twenty - none))  # at the start, and twice or once


def test_checkpoints_hold_stored_and_float32_weights_moments_and_the_flow(tmp_path: Path) -> None:
    setting = paper()
    flow = setting.flow_sizes().parameters
    disk = plan_stage(setting, "train-rl").disk
    assert disk["checkpoints"] == 3 * ((2 + 4 + 8) * PARAMETERS + 12 * flow)
    one = with_option(setting, "train-rl", "run.keep_checkpoints", 1)
    assert plan_stage(one, "train-rl").disk["checkpoints"] == pytest.approx(disk["checkpoints"] * 2 / 3)


def test_adapters_take_little_beside_the_policy() -> None:
    whole, adapted = paper(), with_option(paper(), "train-rl", "lora", LoraConfig(rank=16))
    adapters = adapted.adapter_weights()
    before, after = phases(whole), phases(adapted)
    assert after["update"].parts["weights"] == 2 * PARAMETERS + 4 * adapters
    assert after["update"].parts["gradients"] == 4 * adapters  # none of the output head
    assert after["optimiser step"].parts["optimiser"] == 12 * adapters
    assert after["update"].parts["casts"] == 0
    assert after["update"].parts["logits"] < before["update"].parts["logits"]
    flow = adapted.flow_sizes().parameters
    disk = plan_stage(adapted, "train-rl").disk["checkpoints"]
    assert disk == 3 * (2 * PARAMETERS + 16 * adapters + 12 * flow)
    alone = with_option(paper(), "train-rl", "lora", LoraConfig(rank=16, checkpoint="adapter"))
    assert plan_stage(alone, "train-rl").disk["checkpoints"] == 3 * (16 * adapters + 12 * flow)
    work = [plan_stage(setting, "train-rl").work.other["training"] for setting in (whole, adapted)]
    assert work[1] == pytest.approx(work[0] * 2 / 3)


def test_a_reference_policy_is_held_and_reads_too() -> None:
    setting = paper()
    reference = with_option(setting, "train-rl", "policy_loss.reference_model", "r")
    assert phases(reference)["update"].parts["weights"] == (4 + 2) * PARAMETERS
    reading = [plan_stage(s, "train-rl").work.other["reading"] for s in (setting, reference)]
    assert reading[1] == 2 * reading[0]


def test_vllm_has_weights_of_its_own_while_it_draws() -> None:
    step = phases(paper(gpus=8, tensor_parallel=2))
    assert step["generate"].parts["weights"] == 2 * PARAMETERS + 2 * PARAMETERS / 2
    assert step["update"].parts["weights"] == 2 * PARAMETERS
