"""Which option is named where something does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from planning.small_settings import QWEN_7B, make_setting
from rlfr_cli.config.commands import COMMANDS
from rlfr_cli.config.fields import leaf_options
from rlfr_cli.planning.remedies import NAMES, disk_remedy, memory_remedy, plan_stage
from rlfr_cli.planning.stages import StagePlan


def at_most(gigabytes: float) -> Callable[[StagePlan], bool]:
    return lambda plan: plan.most.total <= gigabytes * 1e9


def test_the_first_that_is_enough_alone_is_named() -> None:
    setting = make_setting(QWEN_7B, preset="paper", gpus=8)
    remedy = memory_remedy(setting, "train-rl", at_most(78))
    assert remedy is not None
    assert remedy.text == "--gradient-checkpointing"
    assert plan_stage(remedy.setting, "train-rl").most.total <= 78e9


def test_a_smaller_micro_batch_is_as_large_as_the_rest_allows() -> None:
    setting = make_setting(QWEN_7B, preset="paper", gpus=8)
    spared = memory_remedy(setting, "train-rl", lambda plan: False)
    assert spared is None
    for gigabytes, tokens in ((48.0, 8192), (44.0, 4096)):
        checkpointed = memory_remedy(setting, "train-rl", at_most(gigabytes))
        assert checkpointed is not None
        assert checkpointed.text == f"--gradient-checkpointing --tokens-per-micro-batch {tokens}", gigabytes


def test_options_that_are_not_needed_are_taken_back_the_most_drastic_first() -> None:
    setting = make_setting(QWEN_7B, preset="paper", plain_rlvr=True)
    remedy = memory_remedy(setting, "train-rl", at_most(78))
    assert remedy is not None
    assert remedy.text == "--gradient-checkpointing --offload-optimiser"


def test_more_gpus_come_last_and_are_as_few_as_will_do() -> None:
    setting = make_setting(QWEN_7B, preset="paper")
    remedy = memory_remedy(setting, "train-rl", at_most(78))
    assert remedy is not None
    assert remedy.text.startswith("--gpus 2 --")
    assert remedy.setting.plan.gpus == 2
    assert plan_stage(remedy.setting, "train-rl").most.total <= 78e9


@pytest.mark.parametrize(
    ("stage", "gigabytes", "expected"),
    [
        ("sample", 16.2, "--tokens-per-batch 8192"),
        ("sample", 12, "--engine vllm --tensor-parallel-size 4"),
        ("extract-latents", 13, "--tokens-per-batch 8192"),
        ("score", 15.0, "--tokens-per-batch 8192"),
        ("fit-flow", 16, "--tokens-per-chunk 8192"),
    ],
)
def test_other_stages_have_ways_out_of_their_own(stage: str, gigabytes: float, expected: str) -> None:
    remedy = memory_remedy(make_setting(QWEN_7B, gpus=4), stage, at_most(gigabytes))
    assert remedy is not None
    assert remedy.text == expected


def test_one_gpu_cannot_spread_a_model() -> None:
    assert memory_remedy(make_setting(QWEN_7B, gpus=1), "sample", at_most(12)) is None


@pytest.mark.parametrize(("share", "expected"), [(0.6, "--store int8"), (0.4, "on the fly")])
def test_latents_that_do_not_fit_the_disk_are_stored_in_8_bits_or_not_at_all(share: float, expected: str) -> None:
    setting = make_setting(QWEN_7B)
    size = plan_stage(setting, "extract-latents").disk["latents"]
    remedy = disk_remedy(setting, "extract-latents", lambda plan: plan.disk["latents"] <= share * size)
    assert remedy is not None
    assert expected in remedy.text


def test_every_option_that_is_named_is_one_of_the_stage_or_of_plan() -> None:
    everything = [
        memory_remedy(make_setting(QWEN_7B, preset="paper", **plan), name, at_most(gigabytes))
        for name in NAMES
        for plan in ({"gpus": 1}, {"gpus": 8})
        for gigabytes in (5, 14, 20, 30, 45, 78)
    ]
    named = {flag for remedy in everything if remedy for flag in re.findall(r"--[a-z-]+", remedy.text)}
    assert len(named) >= 8
    known = {leaf.flag for name in (*NAMES, "plan") for leaf in leaf_options(COMMANDS[name].config)}
    assert named <= known
