"""README, recipes and scripts speak of what is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from rlfr_cli.cli import app
from rlfr_cli.config.commands import COMMANDS
from rlfr_cli.config.fields import leaf_options
from rlfr_cli.config.recipe import read_recipe, resolve

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "pipelines").glob("*.toml"))
SCRIPTS = sorted([*(ROOT / "pipelines").glob("*.sh"), ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"])
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a command needs and a recipe leaves to the command line.
GIVEN = {"model": "m", "data": "d", "latents": ["l"], "flow": "f", "rollouts": "r"}


def needed_flags(config: type) -> dict[tuple[str, ...], object]:
    """What the command line must give: required options, and the responses where there is a choice."""
    wanted = [leaf for leaf in leaf_options(config) if leaf.required or leaf.path == ("rollouts",)]
    return {leaf.path: GIVEN[leaf.path[-1]] for leaf in wanted} | (
        {("model",): "m"} if any(leaf.path == ("model",) for leaf in leaf_options(config)) else {}
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_parses(recipe: Path) -> None:
    assert read_recipe(recipe)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_recipe_makes_a_config_of_every_command(recipe: Path, command: str) -> None:
    config = COMMANDS[command].config
    flags = needed_flags(config)
    assert isinstance(resolve(config, command=command, flags=flags, recipe=recipe), config)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_paper_preset_makes_a_config_of_every_command(command: str) -> None:
    config = COMMANDS[command].config
    flags = needed_flags(config)
    assert isinstance(resolve(config, command=command, flags=flags, preset="paper"), config)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_valid_bash(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0


def test_the_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in (*COMMANDS, "show", "plot", "merge"):
        assert f"rlfr {command}" in text, command


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_of_the_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_flags_named_by_the_pages_exist(page: Path) -> None:
    known = {leaf.flag for command in COMMANDS.values() for leaf in leaf_options(command.config)}
    known |= {"--config", "--preset", "--json", "--quiet", "--help", "--version"}
    known |= {flag for made in get_command(app).commands.values() for param in made.params for flag in param.opts}  # type: ignore[attr-defined]
    known |= {"--no-" + flag.removeprefix("--") for flag in known}
    named = set(re.findall(r"`(--[a-z][a-z0-9-]*)", page.read_text(encoding="utf-8")))
    assert sorted(named - known) == []


def test_no_file_of_the_project_holds_a_path_of_the_machine_it_was_written_on() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    needle = "/" + "work/"
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".sh", ".toml", ".json", ".txt") and path.exists():
            assert needle not in path.read_text(encoding="utf-8"), name
