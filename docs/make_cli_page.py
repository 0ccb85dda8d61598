"""Write docs/cli.md, the reference of every command and option, from the commands themselves.

python docs/make_cli_page.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from typer.main import get_command

from rlfr_cli.cli import RUN_OPTIONS, RUN_PANEL, app
from rlfr_cli.config.commands import COMMANDS, Command
from rlfr_cli.config.fields import LeafOption, default_text

PAGE = Path(__file__).parent / "cli.md"

INTRODUCTION = """\
# Commands and options

This page is made by `python docs/make_cli_page.py` from the commands; `rlfr COMMAND --help` shows the same.

**Where values come from.** A flag overrides a recipe, a recipe overrides a preset (`--preset`), and a preset
overrides the default. A recipe is one TOML file (`--config`) with a table per command, nested tables for the
keys below that hold a dot, and `[common]` for keys that several commands share:

```toml
[common]
model = "models/policy"
seed = 7

[common.problems]
data = "problems.jsonl"

[train-rl]
flow = "flow.safetensors"

[train-rl.policy_loss]
clip_low = 0.2
```

A key in `[common]` goes to each command that has it. The whole file is checked whichever command reads it,
and a key that no command has is an error. Relative paths in a recipe are relative to the current working
directory, as on the command line. Lists are repeated flags (`--layer-fraction 0.25 --layer-fraction 0.5`), or
TOML lists in a recipe; a list given by flags replaces the recipe's.

**Output and exit codes.** Words for people and progress go to stderr, data to stdout (`--json`). 0: done.
2: anything wrong found before work starts: command line, recipe, inputs, output folder. 1: a failure during
work. 130: stopped by Ctrl-C or SIGTERM.
"""


def make_page() -> str:
    """Return the page's text."""
    sections = [INTRODUCTION, *(_stage_section(name, command) for name, command in COMMANDS.items())]
    others = {name: made for name, made in get_command(app).commands.items() if name not in COMMANDS}  # type: ignore[attr-defined]
    sections += [_plain_section(name, made) for name, made in others.items()]
    return "\n".join(sections)


def _stage_section(name: str, command: Command) -> str:
    arguments = [
        f"{leaf.name}..." if leaf.required else f"[{leaf.name}]..." for leaf in command.options if leaf.info.positional
    ]
    lines = [
        f"## rlfr {name}",
        "",
        command.help,
        "",
        f"`{' '.join(['rlfr', name, '[OPTIONS]', *arguments])}`",
        "",
    ]
    panels: dict[str, list[LeafOption]] = {}
    for leaf in command.options:
        panels.setdefault(leaf.panel, []).append(leaf)
    for panel, leaves in panels.items():
        rows = [(_flags(leaf), f"`{leaf.key}`", _default(leaf), leaf.help) for leaf in leaves]
        lines += [f"### {panel}", "", *_table(("option", "recipe key", "default", "what it does"), rows), ""]
    shared = [(", ".join(f"`{flag}`" for flag in flags), text) for _, flags, text in RUN_OPTIONS.values()]
    lines += [f"### {RUN_PANEL}", "", *_table(("option", "what it does"), shared), ""]
    return "\n".join(lines)


def _plain_section(name: str, made: object) -> str:
    """Describe a command that has no config, from what typer made of it."""
    params = [param for param in made.params if param.name != "help"]  # type: ignore[attr-defined]
    arguments = [
        f"{param.metavar}..." if param.nargs == -1 else param.metavar
        for param in params
        if param.param_type_name == "argument"
    ]
    names = [[param.metavar] if param.param_type_name == "argument" else param.opts for param in params]
    rows = [
        (", ".join(f"`{name}`" for name in own_names), param.help)
        for own_names, param in zip(names, params, strict=True)
    ]
    usage = " ".join(["rlfr", name, "[OPTIONS]", *arguments])
    table = _table(("option", "what it does"), rows)
    return "\n".join([f"## rlfr {name}", "", made.help, "", f"`{usage}`", "", *table, ""])  # type: ignore[attr-defined]


def _flags(leaf: LeafOption) -> str:
    if leaf.info.positional:
        return f"`{leaf.name}...`"
    names = [leaf.flag, *([leaf.info.short] if leaf.info.short else [])]
    if leaf.type.base is bool:
        names.append("--no-" + leaf.flag.removeprefix("--"))
    return ", ".join(f"`{name}`" for name in names)


def _default(leaf: LeafOption) -> str:
    if leaf.required:
        return "required"
    return f"`{default_text(leaf)}`" if default_text(leaf) else ""


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [header, tuple("---" for _ in header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
