"""Recipes and presets: who overrides whom, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlfr_cli.config import recipe as recipe_module
from rlfr_cli.config.recipe import read_recipe, resolve
from rlfr_cli.config.sample import SampleConfig
from rlfr_cli.errors import ConfigError, RlfrError

MODEL = {("model",): "m", ("problems", "data"): "d"}


@pytest.fixture
def write(tmp_path: Path):
    def write_recipe(text: str) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        return path

    return write_recipe


def test_order_is_default_preset_recipe_flag(write, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = {"seed": 1, "group_size": 2, "sampling": {"top_k": 3}}
    monkeypatch.setattr(recipe_module, "PRESETS", {"small": {"sample": preset}})
    path = write("[common]\nseed = 4\n[common.sampling]\ntop_p = 0.5\n[sample]\nseed = 5\ngroup_size = 6\n")
    flags = {**MODEL, ("group_size",): 7}

    def made(**sources) -> tuple:
        config = resolve(SampleConfig, command="sample", flags=MODEL, **sources)
        return config.seed, config.group_size, config.sampling.top_k, config.sampling.top_p

    assert made() == (0, 8, 0, 1.0)
    assert made(preset="small") == (1, 2, 3, 1.0)
    assert made(preset="small", recipe=path) == (5, 6, 3, 0.5)
    config = resolve(SampleConfig, command="sample", flags=flags, recipe=path, preset="small")
    assert (config.seed, config.group_size) == (5, 7)


def test_common_goes_to_the_commands_that_have_the_key(write) -> None:
    path = write('[common]\ngroup_size = 4\n[common.problems]\ndata = "p.jsonl"\n[eval]\nnum_samples = 2\n')
    values = read_recipe(path)
    assert values["sample"] == {("group_size",): 4, ("problems", "data"): "p.jsonl"}
    assert values["eval"] == {("problems", "data"): "p.jsonl", ("num_samples",): 2}
    assert values["fit-flow"] == {}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[sample]\ngruop_size = 3", "[sample] gruop_size is not an option", "did you mean group_size?"),
        ("[sample]\ntop_k = 3", "[sample] top_k is not an option", "did you mean sampling.top_k?"),
        ("[sample.samplng]\ntop_k = 3", "[sample] samplng is not an option", "did you mean [sampling]?"),
        ("[sample.sampling]\ntopk = 3", "[sample.sampling] topk is not an option", "sampling.top_k"),
        ('[common]\nmodle = "m"', "[common] modle is not an option", "did you mean model?"),
        ("[sampel]\nseed = 3", "[sampel] is not a command", "did you mean sample?"),
        ("seed = 3", "seed is not a command", "tables: common, sample"),
        ("sample = 3", "sample must be a table, got 3", "write [sample]"),
        ("[sample]\nsampling = 3", "[sample.sampling] must be a table, got 3", None),
        (
            "[sample]\ngroup_size = 'many'",
            "[sample] group_size must be an integer, at least 1, got 'many'",
            None,
        ),
        ("[sample.sampling]\ntop_p = 2", "[sample.sampling] top_p must be a finite number", None),
        ("[common]\nseed = 1.5", "[common] seed must be an integer", None),
        ("[sample]\nkeep = 'correct'", "[sample] keep must be a list", None),
        ("[train-rl.policy_loss]\nclip_lo = 0.1", "[train-rl.policy_loss] clip_lo", "policy_loss.clip_low"),
        ("[sample", "is not a TOML file", None),
    ],
)
def test_a_bad_recipe_names_the_file_and_the_key(write, text: str, message: str, hint: str | None) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        resolve(SampleConfig, command="sample", flags=MODEL, recipe=path)
    assert str(path) in caught.value.message
    assert message.replace("seed is not", "[seed] is not") in caught.value.message
    if hint is not None:
        assert hint in (caught.value.hint or "")


def test_missing_recipe_and_unknown_preset(tmp_path: Path) -> None:
    with pytest.raises(RlfrError, match=r"nowhere\.toml is not a file") as caught:
        resolve(SampleConfig, command="sample", flags=MODEL, recipe=tmp_path / "nowhere.toml")
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match="did you mean paper"):
        resolve(SampleConfig, command="sample", flags=MODEL, preset="papers")


def test_a_preset_that_says_nothing_of_a_command_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_module, "PRESETS", {"small": {"train-rl": {}}})
    with pytest.raises(ConfigError, match="says nothing about rlfr sample\n\nhint: commands that it is for: train-rl"):
        resolve(SampleConfig, command="sample", flags=MODEL, preset="small")


def test_every_preset_parses() -> None:
    for preset, commands in recipe_module.PRESETS.items():
        for command in commands:
            assert recipe_module.read_preset(preset, command)


def test_missing_options_are_named_by_flag_and_key() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(SampleConfig, command="sample", flags={})
    assert caught.value.message == "--model and --data must be given"
    assert "problems.data under [sample]" in (caught.value.hint or "")


def test_a_list_given_by_flags_replaces_the_recipes(write) -> None:
    path = write("[sample]\nkeep = ['correct', 'length']\n")
    flags = {**MODEL, ("keep",): ["correct"]}
    assert resolve(SampleConfig, command="sample", flags=MODEL, recipe=path).keep == ("correct", "length")
    assert resolve(SampleConfig, command="sample", flags=flags, recipe=path).keep == ("correct",)


def test_relative_paths_are_of_the_working_directory(write) -> None:
    path = write("[sample]\nout = 'here/rollouts'\n")
    assert resolve(SampleConfig, command="sample", flags=MODEL, recipe=path).out == Path("here/rollouts")
