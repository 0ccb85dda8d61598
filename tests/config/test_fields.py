"""What `option()` and `group()` make, and the checks of values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pytest

from rlfr_cli.config.fields import (
    REQUIRED,
    ConfigGroup,
    StageConfig,
    default_text,
    group,
    leaf_options,
    option,
    to_table,
)
from rlfr_cli.errors import ConfigError


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, kw_only=True)
class LossConfig(ConfigGroup):
    clip: float = option(0.2, help="Clip.", flag="--loss-clip", minimum=0, exclusive_maximum=1)
    rules: tuple[str, ...] = option((), help="Rules.", choices=("long", "short"))


@dataclass(frozen=True, kw_only=True)
class PaintConfig(StageConfig):
    out: Path = option(help="Where.", path=True)
    colour: Colour = option(Colour.RED, help="Colour.")
    coats: int | None = option(None, help="Coats.", minimum=1)
    gloss: bool = option(False, help="Gloss.", display=True)
    mix: tuple[Colour, ...] = option((Colour.RED, Colour.BLUE), help="Mix.")
    loss: LossConfig = group(LossConfig, panel="Loss of paint")


def test_leaf_options_name_flags_keys_types_and_panels() -> None:
    leaves = {leaf.key: leaf for leaf in leaf_options(PaintConfig)}
    assert list(leaves) == ["out", "colour", "coats", "gloss", "mix", "loss.clip", "loss.rules"]
    assert leaves["loss.clip"].flag == "--loss-clip"
    assert leaves["loss.rules"].flag == "--rules"
    assert leaves["loss.clip"].panel == "Loss of paint"
    assert leaves["out"].default is REQUIRED
    assert (leaves["coats"].type.base, leaves["coats"].type.optional, leaves["coats"].type.many) == (
        int,
        True,
        False,
    )
    assert leaves["mix"].type.many
    assert default_text(leaves["mix"]) == "red, blue"
    assert default_text(leaves["gloss"]) == "false"


def test_values_are_converted_when_a_config_is_made() -> None:
    config = PaintConfig(out="x", colour="blue", mix=["red"], loss=LossConfig(clip=0))  # type: ignore[arg-type]
    assert config.out == Path("x")
    assert config.colour is Colour.BLUE
    assert config.mix == (Colour.RED,)
    assert config.loss.clip == 0.0
    assert isinstance(config.loss.clip, float)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"colour": "green"}, ["--colour", "red, blue", "'green'"]),
        ({"coats": 0}, ["--coats", "an integer, at least 1", "0"]),
        ({"coats": True}, ["--coats", "an integer", "True"]),
        ({"coats": 2.0}, ["--coats", "an integer", "2.0"]),
        ({"gloss": 1}, ["--gloss", "true or false", "1"]),
        ({"mix": "red"}, ["--mix", "list", "'red'"]),
        ({"mix": ["red", "green"]}, ["--mix", "'green'"]),
        ({"out": ""}, ["--out", "a path"]),
        ({"out": None}, ["--out", "None"]),
        ({"loss": {"clip": 0.1}}, ["loss", "LossConfig"]),
    ],
)
def test_a_bad_value_names_the_flag_what_is_allowed_and_what_was_seen(given: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        PaintConfig(**{"out": "x", **given})
    assert all(word in caught.value.message for word in words), caught.value.message


@pytest.mark.parametrize("clip", [-0.1, 1.0, float("nan"), float("inf"), "0.1", True])
def test_a_group_checks_itself(clip: object) -> None:
    with pytest.raises(ConfigError, match="--loss-clip must be a finite number, at least 0, below 1"):
        LossConfig(clip=clip)  # type: ignore[arg-type]


def test_choices_hold_for_each_item_of_a_list() -> None:
    assert LossConfig(rules=("long",)).rules == ("long",)
    with pytest.raises(ConfigError, match="one of long, short, got 'wide'"):
        LossConfig(rules=("long", "wide"))


def test_to_table_is_plain_json_and_the_artifact_leaves_out_paths_and_display() -> None:
    config = PaintConfig(out=Path("a/b"), loss=LossConfig(rules=("long",)))
    assert to_table(config) == {
        "out": "a/b",
        "colour": "red",
        "coats": None,
        "gloss": False,
        "mix": ["red", "blue"],
        "loss": {"clip": 0.2, "rules": ["long"]},
    }
    artifact = to_table(config, for_artifact=True)
    assert set(artifact) == {"colour", "coats", "mix", "loss"}


def test_a_group_with_a_required_option_is_required_itself() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Outer(StageConfig):
        paint: PaintConfig = group(PaintConfig)

    with pytest.raises(TypeError, match="paint"):
        Outer()
    assert Outer(paint=PaintConfig(out=Path("x"))).paint.out == Path("x")


def test_a_field_of_another_kind_is_a_programming_error() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Plain(StageConfig):
        number: int = 3

    with pytest.raises(TypeError, match="neither option"):
        leaf_options(Plain)
