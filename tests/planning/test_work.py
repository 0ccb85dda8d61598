"""Operations and hours, worked out by hand."""

from __future__ import annotations

import pytest

from planning.small_settings import LLAMA
from rlfr_cli.planning.model_sizes import model_sizes
from rlfr_cli.planning.work import Work, drawing_flops, reading_flops, training_flops

MODEL = model_sizes(LLAMA)
MATRICES = 64 * (2 * 64 + 2 * 32 + 3 * 96)


def test_a_forward_pass_is_two_operations_a_weight_and_token() -> None:
    assert MODEL.block_matrices == MATRICES
    blocks = 5 * 30 * 4 * (2 * MATRICES + 4 * 64 * 15)  # 5 responses of 10 + 20 tokens, each seeing 15 on average
    assert reading_flops(MODEL, 5, 10, 20, 4, head=False) == blocks
    assert reading_flops(MODEL, 5, 10, 20, 4, head=True) == blocks + 5 * 20 * 2 * 300 * 64


def test_fewer_blocks_take_less() -> None:
    assert reading_flops(MODEL, 1, 1, 1, 2, head=False) * 3 == reading_flops(MODEL, 1, 1, 1, 3, head=False) * 2


def test_training_is_three_passes_and_one_more_of_the_blocks_with_checkpointing() -> None:
    once = reading_flops(MODEL, 5, 10, 20, 4, head=True)
    assert training_flops(MODEL, 5, 10, 20, checkpointing=False) == 3 * once
    again = reading_flops(MODEL, 5, 10, 20, 4, head=False)
    assert training_flops(MODEL, 5, 10, 20, checkpointing=True) == 3 * once + again


def test_a_prompt_is_read_once_for_a_group() -> None:
    one, four = (drawing_flops(MODEL, 1, group, 10, 20) for group in (1, 4))
    prompt = 10 * 4 * (2 * MATRICES + 4 * 64 * 5)
    assert four - prompt == 4 * (one - prompt)


def test_hours_are_shared_by_gpus_and_stretched_by_what_is_not_reached() -> None:
    work = Work(1.0, 4, generation=7.2e15, other={"training": 3.6e15, "flow": 3.6e15})
    # 7.2e15 / 0.1 and 7.2e15 / 0.5 operations on 4 GPUs of 1e12 a second
    assert work.hours(1e12, 0.5, 0.1) == pytest.approx((7.2e16 + 1.44e16) / (4 * 1e12 * 3600))
    assert work.flops == 1.44e16
