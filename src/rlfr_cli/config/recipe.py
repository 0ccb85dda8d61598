"""From flags, a recipe and a preset to a checked config; each overrides what comes after it, defaults last.

A recipe is one TOML file with a table per command, nested tables for nested config groups, and `[common]` for
keys that several commands share:

    [common]
    model = "models/policy"

    [train-rl.policy_loss]
    clip_low = 0.2

The whole file is checked, whichever command reads it. Relative paths in a recipe are relative to the current
working directory, as they are on the command line. Standard library only.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rlfr_cli.config.commands import COMMANDS
from rlfr_cli.config.fields import LeafOption, StageConfig, convert, leaf_options
from rlfr_cli.config.presets import PRESETS
from rlfr_cli.errors import ConfigError, MissingInputError

Leaves = dict[tuple[str, ...], LeafOption]
Values = dict[tuple[str, ...], Any]
Config = TypeVar("Config", bound=StageConfig)
COMMON = "common"


def resolve(
    cls: type[Config],
    *,
    command: str,
    flags: Mapping[tuple[str, ...], Any],
    recipe: Path | None = None,
    preset: str | None = None,
) -> Config:
    """Return the config of a command.

    Args:
        flags: the values given on the command line, by the option's path in the config.
        recipe: a TOML file.
        preset: a name in `PRESETS`.

    Raises:
        ConfigError: an unknown key, table or preset, a value that cannot be, or a required option that
            nothing gives; names the flag, or the file and the key.
    """
    leaves = _by_path(cls)
    values: Values = {}
    if preset is not None:
        values.update(read_preset(preset, command))
    if recipe is not None:
        values.update(read_recipe(recipe)[command])
    values.update({path: convert(leaves[path], value) for path, value in flags.items()})
    missing = [leaf for leaf in leaves.values() if leaf.required and leaf.path not in values]
    if missing:
        names = " and ".join(leaf.name for leaf in missing)
        keys = " and ".join(leaf.key for leaf in missing)
        raise ConfigError(
            f"{names} must be given",
            hint=f"give {names} to rlfr {command}, or {keys} under [{command}] in a recipe for --config",
        )
    return _build(cls, values)


def read_recipe(recipe: Path) -> dict[str, Values]:
    """Check a whole recipe, and return what it gives each command, by option path."""
    leaves = {name: _by_path(command.config) for name, command in COMMANDS.items()}
    document = _read_toml(recipe)
    for name, table in document.items():
        if name not in (COMMON, *leaves):
            raise ConfigError(
                f"{recipe}: [{name}] is not a command", hint=_closest(name, (COMMON, *leaves), "tables: ")
            )
        if not isinstance(table, dict):
            raise ConfigError(f"{recipe}: {name} must be a table, got {table!r}", hint=f"write [{name}]")
    shared = _read_table(document.get(COMMON, {}), leaves, f"{recipe}: ", COMMON)
    result = {}
    for name in leaves:
        own = _read_table(document.get(name, {}), {name: leaves[name]}, f"{recipe}: ", name)
        result[name] = {path: value for path, value in shared.items() if path in leaves[name]} | own
    return result


def read_preset(preset: str, command: str) -> Values:
    """Check what a preset gives a command, and return it by option path."""
    if preset not in PRESETS:
        raise ConfigError(f"--preset {preset!r} is unknown", hint=_closest(preset, PRESETS, "presets: "))
    if command not in PRESETS[preset]:
        commands = ", ".join(PRESETS[preset]) or "none"
        raise ConfigError(
            f"--preset {preset} says nothing about rlfr {command}",
            hint=f"commands that it is for: {commands}",
        )
    leaves = {command: _by_path(COMMANDS[command].config)}
    return _read_table(PRESETS[preset][command], leaves, f"preset {preset}: ", command)


def _by_path(cls: type[StageConfig]) -> Leaves:
    return {leaf.path: leaf for leaf in leaf_options(cls)}


def _read_toml(recipe: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(recipe.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise MissingInputError(f"--config {recipe} is not a file", hint="name a recipe, a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{recipe} is not a TOML file: {error}") from None


def _read_table(table: Mapping[str, Any], commands: Mapping[str, Leaves], origin: str, name: str) -> Values:
    """Return a table's values by option path, each converted as every one of `commands` that has it says."""
    values: Values = {}
    for path, value in _walk(table, {path for leaves in commands.values() for path in leaves}, origin, (name,)):
        where = f"{origin}[{'.'.join((name, *path[:-1]))}] {path[-1]}"
        for leaves in commands.values():
            if path in leaves:
                values[path] = convert(leaves[path], value, where=where)
    return values


def _walk(
    table: Mapping[str, Any], paths: set[tuple[str, ...]], origin: str, place: tuple[str, ...]
) -> Iterable[tuple[tuple[str, ...], Any]]:
    """Yield option paths and values of a nested table; `place` is the table's name and the groups so far."""
    for key, value in table.items():
        path = (*place[1:], key)
        if path in paths:
            yield path, value
        elif not any(known[: len(path)] == path for known in paths):
            heading = f"{origin}[{'.'.join(place)}] {key}"
            dotted = {".".join(known) for known in paths}
            raise ConfigError(f"{heading} is not an option", hint=_closest_key(key, dotted))
        elif not isinstance(value, dict):
            raise ConfigError(f"{origin}[{'.'.join((*place, key))}] must be a table, got {value!r}")
        else:
            yield from _walk(value, paths, origin, (*place, key))


def _closest_key(key: str, dotted: Iterable[str]) -> str | None:
    """Suggest options by the last part of their keys, so that a key in the wrong table is found too."""
    by_name: dict[str, list[str]] = {}
    for known in sorted(dotted):
        by_name.setdefault(known.rpartition(".")[2], []).append(known)
        by_name.setdefault(known.partition(".")[0], [])
    close = difflib.get_close_matches(key.replace("-", "_"), by_name, n=1)
    if not close:
        return None
    return "did you mean " + " or ".join(by_name[close[0]] or [f"[{close[0]}]"]) + "?"


def _closest(name: str, known: Iterable[str], label: str) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else label + ", ".join(known)


def _build(cls: type[Any], values: Values) -> Any:
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if "group" in field.metadata:
            nested = {path[1:]: value for path, value in values.items() if path[0] == field.name}
            arguments[field.name] = _build(field.metadata["group"], nested)
        elif (field.name,) in values:
            arguments[field.name] = values[(field.name,)]
    return cls(**arguments)
