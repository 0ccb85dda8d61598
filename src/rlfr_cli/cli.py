"""The `rlfr` command: parses, resolves the config, imports the stage, and turns errors into exit codes.

Exit codes: 0 done, 2 anything wrong found before work starts, 1 a failure during work, 130 stopped. Nothing
heavy is imported until a stage runs.
"""

from __future__ import annotations

import importlib
import inspect
import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from rlfr_cli import __version__, console
from rlfr_cli.config.commands import COMMANDS, Command
from rlfr_cli.config.fields import LeafOption, StageConfig, default_text
from rlfr_cli.config.presets import PRESETS
from rlfr_cli.config.recipe import resolve
from rlfr_cli.errors import ConfigError, RlfrError
from rlfr_cli.ranks import rank_of, take_part
from rlfr_cli.report.tables import Drawing

TRAINS_TOGETHER = ("train-rl", "fit-flow")  # in several processes that tell each other what they do
RUN_PANEL = "Recipe and output"
RUN_OPTIONS: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "config": (Path, ("--config", "-c"), "Recipe: a TOML file with a table per command. Flags override it."),
    "preset": (str, ("--preset",), f"Named set of options that a recipe overrides: {', '.join(PRESETS)}."),
    "json": (bool, ("--json",), "Print the summary as one JSON object on stdout."),
    "quiet": (bool, ("--quiet", "-q"), "Say only warnings and errors."),
}

PLOT_HELP = (
    "Draw runs side by side from their metrics: accuracy, reward, entropy, length, what the flow says, and more."
)
MERGE_HELP = (
    "Complete a folder that parts (--part, torchrun, srun) wrote together, if all is there; says what is missing, and "
    "exits with 1, if not. Of a checkpoint of adapters (--lora-checkpoint adapter), write model/, with them merged."
)
SHOW_HELP = "Say what an artifact is, what it was made from, and whether it is whole; exits with 1 if damaged."

app = typer.Typer(
    name="rlfr",
    help="Train language models to reason by verifiable rewards and flow rewards (RLFR).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line of this process."""
    signal.signal(signal.SIGTERM, _stop)
    app(prog_name="rlfr")


@contextmanager
def exit_codes() -> Iterator[None]:
    """Say errors on stderr and end with their exit code."""
    try:
        yield
    except RlfrError as error:
        console.error(error.message, hint=error.hint)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        console.error("stopped")
        raise typer.Exit(130) from None
    except typer.Exit:
        raise
    except Exception:
        # Not left to typer, which would take a stage's EOFError or broken pipe for its own.
        traceback.print_exc()
        raise typer.Exit(1) from None


def _stop(number: int, frame: FrameType | None) -> None:
    """End like Ctrl-C on SIGTERM; a worker process, which inherits this, just ends."""
    if os.getpid() != _MAIN_PROCESS:
        os._exit(128 + number)
    raise KeyboardInterrupt


_MAIN_PROCESS = os.getpid()


def _add_stage(name: str, command: Command) -> None:
    """Make a typer command whose options are those of the config class."""
    leaves = {"__".join(leaf.path): leaf for leaf in command.options}

    def run(**given: Any) -> None:
        with exit_codes():
            console.set_quiet(bool(given["quiet"]))
            flags = {leaf.path: given[key] for key, leaf in leaves.items() if given[key] is not None}
            config = resolve(command.config, command=name, flags=flags, recipe=given["config"], preset=given["preset"])
            config = _share_out(name, config)
            whole = {"recipe": given["config"], "preset": given["preset"]} if command.reads_recipe else {}
            summary = importlib.import_module(command.stage).run(config, **whole)
            if summary is None:
                return  # one of several processes, whose first one speaks for all
            if given["json"]:
                console.emit_json({key: value for key, value in summary.items() if not isinstance(value, Drawing)})
            else:
                console.print_summary(f"rlfr {name}", summary)

    parameters = [_parameter(key, leaf) for key, leaf in leaves.items()]
    parameters += [_run_parameter(key) for key in RUN_OPTIONS]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app.command(name, help=command.help)(run)


def _share_out(name: str, config: StageConfig) -> StageConfig:
    """Under torchrun or srun, the config of this rank's part of the work.

    Raises:
        ConfigError: the command runs in one process, and several would write the same files.
    """
    rank = rank_of(os.environ)
    if rank is not None and not hasattr(config, "part") and name not in TRAINS_TOGETHER:
        raise ConfigError(
            f"rlfr {name} runs in one process, and {rank.launcher} has started {rank.count}",
            hint=f"start it without {rank.launcher}",
        )
    shared: Any = config if rank is None else take_part(config, rank)
    if rank is not None and shared is not config:
        console.log(
            f"rank {rank.index} of {rank.count} under {rank.launcher}: --part {shared.part} --device {shared.device}"
        )
    return shared


def _parameter(key: str, leaf: LeafOption) -> inspect.Parameter:
    base = leaf.type.base
    annotation: Any = list[base] if leaf.type.many else base  # type: ignore[valid-type]
    # None stands for "not given", so that a recipe's value is seen; the help text shows the default.
    info = leaf.info
    metavar = info.metavar or ("|".join(info.choices) if info.choices else None)
    declared: Any
    if info.positional:
        declared = typer.Argument(None, help=_help_text(leaf), metavar=metavar or leaf.name, show_default=False)
    else:
        flag = f"{leaf.flag}/--no-{leaf.flag.removeprefix('--')}" if base is bool else leaf.flag
        flags = (flag, info.short) if info.short else (flag,)
        declared = typer.Option(
            None,
            *flags,
            help=_help_text(leaf),
            metavar=metavar,
            show_default=False,
            rich_help_panel=leaf.panel,
        )
    return _keyword(key, declared, annotation)


def _run_parameter(key: str) -> inspect.Parameter:
    kind, flags, text = RUN_OPTIONS[key]
    return _keyword(key, typer.Option(None, *flags, help=text, show_default=False, rich_help_panel=RUN_PANEL), kind)


def _keyword(key: str, declared: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=declared, annotation=annotation | None)


def _help_text(leaf: LeafOption) -> str:
    """Return help and `[default: 8]` or `[required]`, brackets escaped for rich."""
    default = default_text(leaf)
    state = "[required]" if leaf.required else f"[default: {default}]" if default else ""
    return f"{leaf.help} {state}".rstrip().replace("[", "\\[")


def _print_version(given: bool) -> None:
    if given:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version),
    ] = False,
    local_rank: Annotated[
        int | None,
        typer.Option("--local_rank", help="Given by the deepspeed launcher, which sets LOCAL_RANK too.", hidden=True),
    ] = None,
) -> None:
    """Take the options that stand before a command."""


for _name, _command in COMMANDS.items():
    _add_stage(_name, _command)


@app.command("merge", help=MERGE_HELP)
def _merge(
    path: Annotated[Path, typer.Argument(help="The --out of the parts, or a checkpoint.", metavar="PATH")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model of a checkpoint of adapters, where it is not where they say.",
            metavar="MODEL",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the base model's folder ships.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    with exit_codes():
        module = importlib.import_module("rlfr_cli.stages.merge")
        merged = module.merge(path, model=model, trust_remote_code=trust_remote_code)
        if as_json:
            console.emit_json(merged)
        if merged["kind"] == "checkpoint":
            console.log(f"{merged['model']} is a plain model folder")
            return
        if merged["complete"]:
            console.log(f"{path} is complete: {merged['units']} units of {merged['kind']}")
            return
        message, hint = module.what_is_missing(merged)
        console.error(message, hint=hint)
        raise typer.Exit(1)


@app.command("show", help=SHOW_HELP)
def _show(
    path: Annotated[Path, typer.Argument(help="What to look at.", metavar="PATH")],
    verify: Annotated[bool, typer.Option("--verify", help="Read everything and check every digest.")] = False,
    rows: Annotated[
        int,
        typer.Option(help="Show N rows: the first of an artifact, the last steps of a run.", metavar="N", min=0),
    ] = 0,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a page of a run's or rollouts' tokens, shaded by their numbers.", metavar="FILE"),
    ] = None,
    html_responses: Annotated[
        int,
        typer.Option(help="Responses on that page at most, whole groups evenly spread.", metavar="N", min=1),
    ] = 500,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model whose tokenizer that page uses; a run's newest checkpoint by default.", metavar="MODEL"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    with exit_codes():
        shown = importlib.import_module("rlfr_cli.report.show").show(path, verify=verify, num_rows=rows)
        if as_json:
            console.emit_json(shown.to_dict())
        else:
            console.emit("\n".join(shown.lines()))
        if shown.state == "damaged":
            raise typer.Exit(1)
        if html is not None:
            page = importlib.import_module("rlfr_cli.report.page_inputs")
            count = page.write_rollouts_page(path, html, model=model, num_responses=html_responses)
            console.log(f"{html}: {count} responses")


@app.command("plot", help=PLOT_HELP)
def _plot(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Run folders, each RUN or NAME=RUN; those of one name, such as seeds, are drawn as mean and band.",
            metavar="RUN",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .png or .svg file to write.", metavar="FILE")] = Path(
        "plot.png"
    ),
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Draw this key of metrics.jsonl in place of the usual ones; may be repeated.", metavar="KEY"),
    ] = None,
    smooth: Annotated[int, typer.Option(help="Draw the mean of the last N steps; 1 is off.", metavar="N", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    with exit_codes():
        drawn = importlib.import_module("rlfr_cli.report.plot").plot(runs, out, metrics=metric or (), smooth=smooth)
        if as_json:
            console.emit_json(drawn)
        else:
            console.print_summary("rlfr plot", drawn)


if __name__ == "__main__":
    main()
