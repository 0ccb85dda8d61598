"""Names of states: parsed, put in order, and what they need of a model."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rlfr_cli.errors import ConfigError
from rlfr_cli.states import FINAL_NORM, blocks_needed, parse_state, state_of_model, state_text, states_in_order


def test_a_name_is_a_block_or_the_final_normed_state() -> None:
    assert (parse_state("20"), parse_state("020"), parse_state("final-norm")) == (20, 20, FINAL_NORM)
    assert (state_text(20), state_text("20"), state_text(FINAL_NORM)) == ("block 20", "block 20", "final-norm")


@pytest.mark.parametrize("name", ["", "-1", "1.5", "final_norm", "last", "²", " 3"])
def test_other_names_are_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(ConfigError, match="--context-layer must be the index of a decoder block, or final-norm"):
        parse_state(name)


def test_a_model_has_blocks_below_its_number() -> None:
    assert state_of_model("7", 8) == 7
    assert state_of_model("final-norm", 8) == FINAL_NORM
    with pytest.raises(ConfigError, match="--context-layer 8: this model has blocks 0 to 7, and final-norm"):
        state_of_model("8", 8)


def test_context_states_follow_the_targets_once() -> None:
    assert states_in_order((5, 2), [2, FINAL_NORM, 7, 7]) == (5, 2, FINAL_NORM, 7)
    assert states_in_order((5, 2), []) == (5, 2)


def test_the_deepest_state_says_how_many_blocks_run() -> None:
    assert blocks_needed((3, 1), 8) == 4
    assert blocks_needed((3, 6), 8) == 7
    assert blocks_needed((0, FINAL_NORM), 8) == 8


def test_configs_use_states_without_torch() -> None:
    code = "import sys, rlfr_cli.states; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
