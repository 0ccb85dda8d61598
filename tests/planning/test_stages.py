"""What sampling, extracting, fitting and scoring take, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from planning.small_settings import LLAMA, QWEN_7B, make_setting
from rlfr_cli.planning.flow_sizes import FlowSizes
from rlfr_cli.planning.memory import Numbers
from rlfr_cli.planning.remedies import plan_stage, with_option

SEVEN_BILLION = 7_615_616_512


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_latents_of_a_hundred_million_tokens_of_a_7b_model_are_two_terabytes() -> None:
    setting = make_setting(QWEN_7B, num_problems=100_000, response_tokens=1000)
    latents = plan_stage(setting, "extract-latents").disk["latents"]
    # 3 layers of 3,584 numbers of 2 bytes and a token id, for each token and the prompt token before a response
    assert latents == 100_000 * 1001 * (3 * 3584 * 2 + 4)
    assert latents == pytest.approx(2.2e12, rel=0.03)
    eight_bits = plan_stage(with_option(setting, "extract-latents", "store", "int8"), "extract-latents")
    assert eight_bits.disk["latents"] == pytest.approx(latents / 2, rel=0.01)


def test_extract_latents_reads_expert_solutions_or_the_rollouts_of_sample(tmp_path: Path) -> None:
    expert = make_setting(LLAMA, num_problems=100, response_tokens=10)
    assert expert.responses_read() == (100, 10)
    path = recipe(tmp_path, "[sample]\ngroup_size = 4\n[extract-latents]\nrollouts = 'r'\nlimit = 20\nmax_tokens = 7\n")
    rollouts = make_setting(LLAMA, path, num_problems=100, response_tokens=10)
    assert rollouts.responses_read() == (80, 7)
    assert plan_stage(rollouts, "extract-latents").work.tokens == 80 * 7


def test_only_the_blocks_that_are_tapped_are_held_and_run(tmp_path: Path) -> None:
    path = recipe(tmp_path, "[extract-latents]\nlayer_index = [0]\n")
    one = plan_stage(make_setting(LLAMA, path), "extract-latents")
    four = plan_stage(make_setting(LLAMA), "extract-latents")  # the deepest is block 3
    model = make_setting(LLAMA).model
    assert four.most.parts["weights"] - one.most.parts["weights"] == 3 * 2 * model.block_parameters
    assert four.work.flops == 4 * one.work.flops


def test_generation_on_one_gpu_and_spread_by_vllm() -> None:
    alone = plan_stage(make_setting(QWEN_7B), "sample").most
    assert alone.parts["weights"] == 2 * SEVEN_BILLION
    # 12 rows of 256 + 1,024 tokens fit into a batch of 16,384, and 28 blocks keep 2 x 512 numbers of each.
    assert alone.parts["kv_cache"] == 12 * 1280 * 28 * 2 * 512 * 2
    spread = plan_stage(make_setting(QWEN_7B, gpus=4, tensor_parallel=4), "sample").most
    assert spread.parts["weights"] == 2 * SEVEN_BILLION / 4
    assert spread.parts["kv_cache"] == 256 * 1280 * 28 * 2 * 512 * 2 / 4


def test_a_batch_is_of_full_length_whatever_is_expected_of_responses() -> None:
    long, short = (plan_stage(make_setting(QWEN_7B, response_tokens=tokens), "sample") for tokens in (None, 10))
    assert short.most == long.most
    assert short.disk["rollouts"] < long.disk["rollouts"]
    assert short.work.flops < long.work.flops


def test_a_device_and_dtype_of_the_recipe_are_kept(tmp_path: Path) -> None:
    cpu = make_setting(LLAMA, recipe(tmp_path, "[common]\ndevice = 'cpu'\n"))
    assert cpu.numbers(cpu.recipe.sample) == Numbers(4, 4, on_gpu=False)
    assert cpu.numbers(cpu.recipe.train, trains=True) == Numbers(4, 4, on_gpu=False)
    gpu = make_setting(LLAMA)
    assert gpu.numbers(gpu.recipe.sample) == Numbers(2, 2)
    assert gpu.numbers(gpu.recipe.train, trains=True) == Numbers(4, 2)


def test_fitting_holds_sixteen_bytes_a_weight_and_the_latents_of_a_step_twice(tmp_path: Path) -> None:
    text = "[fit-flow.network]\ndepth = 6\n[fit-flow.optimiser]\nsteps = 10\n[sample.sampling]\nmax_new_tokens = 100\n"
    setting = make_setting(QWEN_7B, recipe(tmp_path, text))
    flow = FlowSizes(latent_size=3584, width=3584, depth=6, states=3, layers=3, pairings=1)
    assert setting.flow_sizes() == flow
    plan = plan_stage(setting, "fit-flow")
    fit = next(phase for phase in plan.phases if phase.name == "fit")
    resting = fit.parts["weights"] + fit.parts["optimiser"] + fit.parts["gradients"]
    assert resting == 16 * flow.parameters
    assert fit.parts["latents"] == 2 * 32 * 101 * 3 * 3584 * 2
    assert plan.work.gpus == 1
    assert plan.work.tokens == 10 * 32 * 101


def test_a_fit_on_eight_gpus_shares_out_the_sequences_and_not_the_flow() -> None:
    one, eight = (plan_stage(make_setting(QWEN_7B, gpus=count), "fit-flow") for count in (1, 8))
    alone, shared = one.phases[0].parts, eight.phases[0].parts
    assert [shared[name] for name in ("weights", "optimiser")] == [alone[name] for name in ("weights", "optimiser")]
    assert shared["latents"] == alone["latents"] / 8  # 32 sequences a step
    assert (one.work.gpus, eight.work.gpus) == (1, 8)
    assert eight.work.other == one.work.other


def test_fitting_on_the_fly_holds_the_policy_and_reads_with_it(tmp_path: Path) -> None:
    path = recipe(tmp_path, "[fit-flow]\nmodel = 'm'\ndata = 'd'\n")
    stored, live = (plan_stage(make_setting(QWEN_7B, path), "fit-flow") for path in (None, path))
    weights = 2 * make_setting(QWEN_7B).model.decoder_parameters(22)
    assert [phase.name for phase in live.phases] == ["read", *(phase.name for phase in stored.phases)]
    assert live.phases[1].parts["weights"] - stored.phases[0].parts["weights"] == weights
    assert live.work.other["reading"] > 0
    assert "reading" not in stored.work.other


def test_scoring_of_latents_needs_no_policy(tmp_path: Path) -> None:
    path = recipe(tmp_path, "[score]\nlatents = 'l'\n")
    with_policy, without = (plan_stage(make_setting(QWEN_7B, path), "score") for path in (None, path))
    assert without.most.parts["weights"] == 0
    assert [phase.name for phase in with_policy.phases] == ["read", "score"]
    assert without.work.other == {"flow": with_policy.work.other["flow"]}
