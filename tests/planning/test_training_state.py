"""Weights, moments and gradients of one GPU by ZeRO stage."""

from __future__ import annotations

import pytest

from planning.small_settings import QWEN_7B
from rlfr_cli.planning.memory import Numbers
from rlfr_cli.planning.model_sizes import model_sizes
from rlfr_cli.planning.training_state import BUCKET, LIVE, training_state

MODEL = model_sizes(QWEN_7B)
PARAMETERS = MODEL.parameters
NUMBERS = Numbers(4, 2)
BUCKETS = 6 * BUCKET


def test_one_process_holds_sixteen_bytes_a_parameter_and_steps_with_four_more() -> None:
    state = training_state(MODEL, NUMBERS, 0, 1)
    assert state.resting == {"weights": 4 * PARAMETERS, "optimiser": 8 * PARAMETERS}
    assert (state.gradients, state.stepping) == (4 * PARAMETERS, 4 * PARAMETERS)
    assert state.numbers == NUMBERS


def test_copies_on_several_gpus_share_nothing_out() -> None:
    assert training_state(MODEL, NUMBERS, 0, 8) == training_state(MODEL, NUMBERS, 0, 1)


def test_each_stage_shares_out_more() -> None:
    one, two, three = (training_state(MODEL, NUMBERS, stage, 8) for stage in (1, 2, 3))
    assert one.resting == two.resting == {"weights": 2 * PARAMETERS, "optimiser": 12 * PARAMETERS / 8}
    assert one.gradients == 4 * PARAMETERS + BUCKETS
    assert two.gradients == three.gradients == 4 * PARAMETERS / 8 + BUCKETS
    gathered = 2 * (LIVE + MODEL.embedding)
    assert three.resting["weights"] == 2 * PARAMETERS / 8 + gathered
    # To draw and to measure, every process gathers what is missing.
    assert three.whole == 2 * PARAMETERS - gathered
    assert two.whole == 0
    assert two.numbers == Numbers(2, 2)


def test_stage_three_never_gathers_more_than_there_is() -> None:
    small = model_sizes(QWEN_7B | {"num_hidden_layers": 1, "vocab_size": 1000})
    state = training_state(small, NUMBERS, 3, 8)
    assert state.resting["weights"] == pytest.approx(2 * small.parameters * (1 + 1 / 8))
    assert state.whole == 0


def test_adapters_alone_have_float32_weights_moments_and_gradients() -> None:
    adapters = 40_370_176
    alone = training_state(MODEL, NUMBERS, 0, 1, adapters=adapters)
    assert alone.resting == {"weights": 2 * PARAMETERS + 4 * adapters, "optimiser": 8 * adapters}
    assert (alone.gradients, alone.stepping) == (4 * adapters, 4 * adapters)
    assert alone.numbers == Numbers(2, 2)
    two, three = (training_state(MODEL, NUMBERS, stage, 8, adapters=adapters) for stage in (2, 3))
    assert two.resting == {"weights": 2 * (PARAMETERS + adapters), "optimiser": 12 * adapters / 8}
    assert two.gradients == 4 * adapters / 8 + 6 * adapters
    gathered = 2 * (LIVE + MODEL.embedding)
    assert three.resting["weights"] == 2 * (PARAMETERS + adapters) / 8 + gathered


def test_offloading_moves_bytes_to_main_memory() -> None:
    here = training_state(MODEL, NUMBERS, 3, 8)
    optimiser = training_state(MODEL, NUMBERS, 3, 8, offload_optimiser=True)
    both = training_state(MODEL, NUMBERS, 3, 8, offload_optimiser=True, offload_parameters=True)
    assert optimiser.resting["optimiser"] == 0
    assert optimiser.gradients == BUCKETS
    assert optimiser.in_main_memory == here.resting["optimiser"] == 12 * PARAMETERS / 8
    assert both.in_main_memory - optimiser.in_main_memory == 2 * PARAMETERS / 8
    assert optimiser.resting["weights"] - both.resting["weights"] == 2 * PARAMETERS / 8
