"""One declaration of an option, from which the command line, the recipe file and the Python call all follow.

A stage's config is a frozen, keyword-only dataclass derived from `StageConfig`. Its fields are made with
`option()`, and larger ones are gathered in nested groups with `group()`:

    @dataclass(frozen=True, kw_only=True)
    class SampleConfig(StageConfig):
        model: str = option(help="The policy, a Hugging Face model folder.")
        group_size: int = option(8, help="Responses drawn for each problem.", minimum=1)
        sampling: SamplingConfig = group(SamplingConfig, panel="Sampling")

A field's type is one of str, int, float, bool, Path, a StrEnum, `X | None`, or `tuple[X, ...]` (a repeated
flag). Values are checked when the config is made, so Python callers get the same errors.

Standard library only.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from rlfr_cli.errors import ConfigError


class _Required:
    """The default of an option that has none."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()
DEFAULT_PANEL = "Options"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptionInfo:
    """What `option()` says of a field beside its type and default."""

    help: str
    flag: str | None = None
    panel: str | None = None
    short: str | None = None
    path: bool = False
    display: bool = False
    positional: bool = False
    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: float | None = None
    exclusive_maximum: float | None = None
    choices: tuple[str, ...] | None = None
    metavar: str | None = None


@dataclasses.dataclass(frozen=True)
class ValueType:
    """A field's annotation taken apart: `tuple[float, ...] | None` is float, many and optional."""

    base: type
    many: bool
    optional: bool


@dataclasses.dataclass(frozen=True)
class LeafOption:
    """One option of a command: where it sits in the config, and what it is called on the command line."""

    path: tuple[str, ...]
    flag: str
    type: ValueType
    default: Any
    panel: str
    info: OptionInfo

    @property
    def help(self) -> str:
        return self.info.help

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def name(self) -> str:
        """What errors and the docs call it: its flag, or the name of a positional argument."""
        return self.path[-1].upper() if self.info.positional else self.flag

    @property
    def key(self) -> str:
        """The dotted recipe key, such as `policy_loss.clip_low`."""
        return ".".join(self.path)


def option(default: Any = REQUIRED, *, help: str, choices: Sequence[str] | None = None, **info: Any) -> Any:
    """Declare an option as a dataclass field.

    Args:
        default: its value when nothing names it; left out, the option must be given.
        help: one or two sentences for `--help` and the docs.
        choices: the strings allowed (prefer a StrEnum).
        **info: the other fields of `OptionInfo`: `flag` ("--flow-top-k") where it is not the field's name
            with dashes, `short` ("-o"), `panel`, `metavar`, `positional`; `path` and `display` for what says
            where to work or what to show, and is left out of stage.json; `minimum`, `maximum`,
            `exclusive_minimum` and `exclusive_maximum`, which hold for each item of a list.
    """
    allowed = None if choices is None else tuple(choices)
    metadata = {"option": OptionInfo(help=help, choices=allowed, **info)}
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(cls: type, *, panel: str | None = None) -> Any:
    """Declare a nested config group. A Python call may leave it out unless one of its options is required."""
    metadata = {"group": cls, "panel": panel}
    if any(leaf.required for leaf in leaf_options(cls)):
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default_factory=cls, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigGroup:
    """Base of nested groups: values are converted and checked when the group is made."""

    def __post_init__(self) -> None:
        check_values(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig(ConfigGroup):
    """Base of every command's config. Checks that need several fields go after `super().__post_init__()`."""


def leaf_options(cls: type, *, panel: str = DEFAULT_PANEL) -> tuple[LeafOption, ...]:
    """Return every option of a config class, those of nested groups included, in the order written.

    Raises:
        TypeError: a field that was made without `option()` or `group()`, or of a type that no flag can hold.
    """
    return _leaf_options(cls, panel)  # type: ignore[arg-type]  # a class is hashable


@cache
def _leaf_options(cls: type, panel: str) -> tuple[LeafOption, ...]:
    hints = typing.get_type_hints(cls)
    leaves: list[LeafOption] = []
    for field in dataclasses.fields(cls):
        if "group" in field.metadata:
            nested_panel = field.metadata["panel"] or field.name.replace("_", " ").capitalize()
            for leaf in leaf_options(field.metadata["group"], panel=nested_panel):
                leaves.append(dataclasses.replace(leaf, path=(field.name, *leaf.path)))
        elif "option" in field.metadata:
            info: OptionInfo = field.metadata["option"]
            default = REQUIRED if field.default is dataclasses.MISSING else field.default
            flag = info.flag or "--" + field.name.replace("_", "-")
            value_type = _value_type(hints[field.name], f"{cls.__name__}.{field.name}")
            leaves.append(LeafOption((field.name,), flag, value_type, default, info.panel or panel, info))
        else:
            raise TypeError(f"{cls.__name__}.{field.name} is made with neither option() nor group()")
    return tuple(leaves)


def check_values(config: Any) -> None:
    """Convert (strings to enums and paths, lists to tuples) and check every option of a config or group.

    Raises:
        ConfigError: names the flag, the value seen and what is allowed.
    """
    leaves = {leaf.path[0]: leaf for leaf in leaf_options(type(config)) if len(leaf.path) == 1}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in leaves:
            object.__setattr__(config, field.name, convert(leaves[field.name], value))
        elif not isinstance(value, field.metadata["group"]):
            expected = field.metadata["group"].__name__
            raise ConfigError(f"{field.name} must be a {expected}, got {value!r}")


def convert(leaf: LeafOption, value: Any, *, where: str | None = None) -> Any:
    """Return `value` as the option's type.

    Args:
        where: what to call the option in errors; its flag when left out.

    Raises:
        ConfigError: another type, out of range, or not among the choices.
    """
    where = where or leaf.name
    if value is None and leaf.type.optional:
        return None
    if not leaf.type.many:
        return _convert_item(leaf, value, where)
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} must be a list of values, {_allowed(leaf)} each, got {value!r}")
    return tuple(_convert_item(leaf, item, where) for item in value)


def to_table(config: Any, *, for_artifact: bool = False) -> dict[str, Any]:
    """Return a config as a nested dict of JSON values, keyed as in a recipe.

    Args:
        for_artifact: leave out paths and display options, which do not change what a stage writes.
    """
    table: dict[str, Any] = {}
    for leaf in leaf_options(type(config)):
        if for_artifact and (leaf.info.path or leaf.info.display):
            continue
        value, place = config, table
        for name in leaf.path[:-1]:
            value, place = getattr(value, name), place.setdefault(name, {})
        place[leaf.path[-1]] = _plain(getattr(value, leaf.path[-1]))
    return table


def default_text(leaf: LeafOption) -> str:
    """Return an option's default as a user would write it; empty where there is none."""
    if leaf.required or leaf.default in (None, (), ""):
        return ""
    default = _plain(leaf.default)
    if isinstance(default, bool):
        return str(default).lower()
    return ", ".join(map(str, default)) if isinstance(default, list) else str(default)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _value_type(hint: Any, name: str) -> ValueType:
    optional = many = False
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        optional = len(members) < len(typing.get_args(hint))
        hint = members[0] if len(members) == 1 else hint
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[1:] == (...,):
        many, hint = True, typing.get_args(hint)[0]
    if not (isinstance(hint, type) and issubclass(hint, (str, int, float, Path))):
        raise TypeError(f"{name}: no flag can hold a value of type {hint}")
    return ValueType(hint, many, optional)


def _convert_item(leaf: LeafOption, value: Any, where: str) -> Any:
    base = leaf.type.base
    converted = value
    if issubclass(base, Enum):
        valid = value in [member.value for member in base]
        converted = base(value) if valid else value
    elif base is bool:
        valid = isinstance(value, bool)
    elif base is int:
        valid = isinstance(value, int) and not isinstance(value, bool)
    elif base is float:
        valid = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        converted = float(value) if valid else value
    elif base is Path:
        valid = isinstance(value, (str, Path)) and str(value) != ""
        converted = Path(value) if valid else value
    else:
        valid = isinstance(value, str) and (leaf.info.choices is None or value in leaf.info.choices)
    if not valid or not _in_range(leaf.info, converted):
        seen = value.value if isinstance(value, Enum) else value
        raise ConfigError(f"{where} must be {_allowed(leaf)}, got {seen!r}")
    return converted


def _in_range(info: OptionInfo, value: Any) -> bool:
    return not (
        (info.minimum is not None and value < info.minimum)
        or (info.maximum is not None and value > info.maximum)
        or (info.exclusive_minimum is not None and value <= info.exclusive_minimum)
        or (info.exclusive_maximum is not None and value >= info.exclusive_maximum)
    )


def _allowed(leaf: LeafOption) -> str:
    """Say in words what an option takes: `an integer, at least 1`."""
    base, info = leaf.type.base, leaf.info
    if info.choices is not None or issubclass(base, Enum):
        names = info.choices or [member.value for member in base]  # type: ignore[attr-defined]
        return "one of " + ", ".join(names)
    kinds = {bool: "true or false", int: "an integer", float: "a finite number", Path: "a path"}
    bounds = {
        "at least": info.minimum,
        "at most": info.maximum,
        "above": info.exclusive_minimum,
        "below": info.exclusive_maximum,
    }
    limits = [f"{words} {bound}" for words, bound in bounds.items() if bound is not None]
    return ", ".join([kinds.get(base, "text"), *limits])
