"""The command line: options, exit codes, streams, and what importing it costs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from rlfr_cli import __version__, console
from rlfr_cli.cli import RUN_OPTIONS, app
from rlfr_cli.config.commands import COMMANDS
from rlfr_cli.config.fields import default_text, leaf_options
from rlfr_cli.errors import ConfigError, InputError, Stopped, WorkError

SAMPLE = ["sample", "--model", "m", "--data", "d"]
FAKE_STAGE = """
import sys, types
stage = types.ModuleType("rlfr_cli.stages.sample")
sys.modules["rlfr_cli.stages.sample"] = stage
def run(config):
{body}
stage.run = run
from rlfr_cli.cli import main
sys.argv = ["rlfr", "sample", "--model", "m", "--data", "d", *{arguments!r}]
main()
"""


@pytest.fixture(autouse=True)
def _loud():
    yield
    console.set_quiet(False)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the command line with stages that return `summary`, raise it, or are it."""

    def invoke(*arguments: str, summary: Any = None, command: str = "sample") -> Any:
        seen: list[Any] = []

        def run(config: Any) -> Any:
            seen.append(config)
            if isinstance(summary, BaseException):
                raise summary
            return {"rows": 3} if summary is None else summary

        stage = types.ModuleType(COMMANDS[command].stage)
        stage.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, COMMANDS[command].stage, stage)
        result = CliRunner().invoke(app, list(arguments))
        result.config = seen[0] if seen else None  # type: ignore[attr-defined]
        return result

    return invoke


def run_fake(body: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    script = FAKE_STAGE.format(body="    " + body.replace("\n", "\n    "), arguments=list(arguments))
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "-c", script], **pipes)


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "vllm", "deepspeed", "datasets", "pyarrow", "numpy", "rich", "pydantic"]
    script = f"import sys, rlfr_cli.cli; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_of_a_command_are_unique(name: str) -> None:
    flags = [flag for _, flags, _ in RUN_OPTIONS.values() for flag in flags] + ["--help", "-h"]
    for leaf in leaf_options(COMMANDS[name].config):
        if not leaf.info.positional:
            flags.append(leaf.flag)
        if leaf.info.short is not None:
            flags.append(leaf.info.short)
        if leaf.type.base is bool:
            flags.append("--no-" + leaf.flag.removeprefix("--"))
    assert sorted(flags) == sorted(set(flags))
    assert not {leaf.path for leaf in leaf_options(COMMANDS[name].config)} & {(key,) for key in RUN_OPTIONS}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help_that_is_a_sentence(name: str) -> None:
    for leaf in leaf_options(COMMANDS[name].config):
        assert re.match(r"[A-Z0-9].*\.$", leaf.help, re.DOTALL), f"{name} {leaf.flag}: {leaf.help!r}"
    assert COMMANDS[name].help.endswith(".")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_flag_and_default(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"})
    assert result.exit_code == 0
    for leaf in leaf_options(COMMANDS[name].config):
        assert leaf.name in result.output
    has_required = any(leaf.required for leaf in leaf_options(COMMANDS[name].config))
    assert ("[required]" in result.output) == has_required
    shown = [default_text(leaf) for leaf in leaf_options(COMMANDS[name].config)]
    assert all(f"[default: {default}]" in result.output for default in shown if default)


def test_flags_reach_the_config(call: Callable[..., Any]) -> None:
    result = call(
        *SAMPLE, "--group-size", "4", "--keep", "correct", "--keep", "length", "--top-p", "0.5",
        "--dtype", "float32", "--out", "there", "--skip-bad-answers", "--stop", "END",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    config = result.config
    assert (config.group_size, config.keep, config.out) == (4, ("correct", "length"), Path("there"))
    assert (config.sampling.top_p, config.sampling.stop) == (0.5, ("END",))
    assert config.dtype == "float32"
    assert config.problems.skip_bad_answers is True


def test_a_flag_that_is_false_overrides_a_recipe(call: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("[sample]\nmodel = 'm'\noverwrite = true\n[sample.problems]\ndata = 'd'\n")
    assert call("sample", "--config", str(recipe)).config.overwrite is True
    assert call("sample", "-c", str(recipe), "--no-overwrite").config.overwrite is False


def test_positional_lists(call: Callable[..., Any]) -> None:
    result = call("fit-flow", "one", "two", command="fit-flow")
    assert result.config.latents == (Path("one"), Path("two"))
    missing = call("fit-flow", command="fit-flow")
    assert missing.exit_code == 2
    assert "exactly one of LATENTS, --rollouts, --data must be given" in missing.stderr


def test_data_goes_to_stdout_and_words_to_stderr(call: Callable[..., Any]) -> None:
    summary = {"out": Path("a"), "loss": float("nan"), "per_layer": [{"layer": 7, "loss": 0.123456}]}
    result = call(*SAMPLE, "--json", summary=summary)
    assert json.loads(result.stdout) == {
        "out": "a",
        "loss": None,
        "per_layer": [{"layer": 7, "loss": 0.123456}],
    }
    assert result.stderr == ""
    table = call(*SAMPLE, summary=summary)
    assert table.stdout == ""
    assert "rlfr sample" in table.stderr
    assert "0.1235" in table.stderr
    assert "\x1b" not in table.stderr
    assert call(*SAMPLE, "--quiet", summary=summary).output == ""


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (InputError("no such column", hint="name one"), 2),
        (WorkError("the loss stays NaN"), 1),
        (Stopped("saved at step 3"), 130),
        (KeyboardInterrupt(), 130),
        (EOFError("cut"), 1),
        (BrokenPipeError(32, "worker"), 1),
    ],
)
def test_exit_codes_of_a_stage(call: Callable[..., Any], raised: BaseException, code: int) -> None:
    result = call(*SAMPLE, summary=raised)
    assert result.exit_code == code
    assert result.stdout == ""
    if isinstance(raised, InputError):
        assert result.stderr == "error: no such column\n\nhint: name one\n"
    if isinstance(raised, (EOFError, BrokenPipeError)):
        assert "Traceback" in result.stderr
        assert type(raised).__name__ in result.stderr
    else:
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample"], "--model and --data must be given"),
        ([*SAMPLE, "--seed", "-1"], "--seed must be an integer, at least 0, got -1"),
        ([*SAMPLE, "--seed", "one"], "--seed"),
        ([*SAMPLE, "--dtype", "int8"], "--dtype"),
        ([*SAMPLE, "--device", "tpu"], "--device must be auto"),
        ([*SAMPLE, "--gruop-size", "3"], "--group-size"),
        ([*SAMPLE, "--part", "4/3"], "--part must be I/N"),
        ([*SAMPLE, "--config", "no.toml"], "no.toml is not a file"),
        (["sampel"], "sample"),
        ([*SAMPLE, "--preset", "papers"], "did you mean paper?"),
    ],
)
def test_a_bad_command_line_ends_with_2_before_the_stage(
    call: Callable[..., Any], arguments: list[str], words: str
) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.config is None
    assert words in result.stderr


@pytest.mark.parametrize(("state", "code"), [("complete", 0), ("unfinished", 0), ("damaged", 1)])
def test_show_passes_its_options_on_and_fails_on_damage(monkeypatch, state: str, code: int) -> None:
    asked: list[tuple[Any, dict[str, Any]]] = []

    def show(path: Path, **options: Any) -> Any:
        asked.append((path, options))
        return types.SimpleNamespace(
            state=state, to_dict=lambda: {"state": state}, lines=lambda: ["a: flow", f"  {state}"]
        )

    module = types.ModuleType("rlfr_cli.report.show")
    module.show = show  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rlfr_cli.report.show", module)
    result = CliRunner().invoke(app, ["show", "a", "--verify", "--rows", "2"])
    assert (result.exit_code, result.stdout, result.stderr) == (code, f"a: flow\n  {state}\n", "")
    assert asked == [(Path("a"), {"verify": True, "num_rows": 2})]
    assert json.loads(CliRunner().invoke(app, ["show", "a", "--json"]).stdout) == {"state": state}


def test_show_of_nothing_is_an_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["show", str(tmp_path / "nothing")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "does not exist" in result.stderr


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, __version__ + "\n")


def test_the_deepspeed_launchers_option_is_taken_and_not_shown(tmp_path: Path) -> None:
    """It calls `-m rlfr_cli.cli --local_rank=0 train-rl …`."""
    show = ["show", str(tmp_path / "nothing")]
    given, plain = (CliRunner().invoke(app, [*extra, *show]) for extra in (["--local_rank=1"], []))
    assert (given.exit_code, given.stderr) == (plain.exit_code, plain.stderr)
    assert "local_rank" not in CliRunner().invoke(app, ["--help"]).stdout


def test_an_unknown_exception_is_a_plain_traceback() -> None:
    process = run_fake("raise ZeroDivisionError('inside')")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert out == ""
    assert err.startswith("Traceback (most recent call last):")
    assert err.rstrip().endswith("ZeroDivisionError: inside")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_130(number: signal.Signals) -> None:
    process = run_fake("print('ready', file=sys.stderr, flush=True)\nimport time\ntime.sleep(30)")
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(timeout=60) == 130
    assert process.stderr.read() == "error: stopped\n"


def test_a_worker_process_that_is_terminated_just_ends() -> None:
    body = (
        "import os, signal, time\n"
        "child = os.fork()\n"
        "if child == 0: time.sleep(30)\n"
        "time.sleep(0.1)\n"
        "os.kill(child, signal.SIGTERM)\n"
        "return {'status': os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}"
    )
    out, err = run_fake(body, "--json").communicate(timeout=30)
    assert (json.loads(out), err) == ({"status": 143}, "")


def test_a_closed_pipe_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    process = run_fake("return {}", "--json", stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (1, "")


def test_progress_in_a_pipe_is_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with console.progress("sampling", total=100, unit="responses", done=20) as bar:
        for _ in range(40):
            clock[0] += 1.0
            bar.advance(2, note="reward 0.5")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "sampling: 40/100 responses, 2/s, 30 s left (reward 0.5)",
        "sampling: 60/100 responses, 2/s, 20 s left (reward 0.5)",
        "sampling: 80/100 responses, 2/s, 10 s left (reward 0.5)",
        "sampling: 100/100 responses, 2/s, 0 s left (reward 0.5)",
        "sampling: 100/100 responses in 40 s (reward 0.5)",
    ]


@pytest.mark.parametrize("no_colour", [False, True])
def test_a_terminal_gets_bars_and_colour_unless_no_color(no_colour: bool) -> None:
    pty = pytest.importorskip("pty")
    body = (
        "from rlfr_cli import console\n"
        "with console.progress('outer', total=2, unit='steps') as outer:\n"
        "    with console.progress('inner', total=3, unit='tokens') as inner:\n"
        "        inner.advance(3)\n"
        "        console.warn('careful')\n"
        "    outer.advance(2)\n"
        "return {'rows': 3}"
    )
    terminal, end = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {
        "TERM": "xterm",
        "COLUMNS": "100",
    }
    process = run_fake(body, stderr=end, env=environment | ({"NO_COLOR": "1"} if no_colour else {}))
    os.close(end)
    seen = b""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    out, _ = process.communicate(timeout=30)
    os.close(terminal)
    text = seen.decode()
    assert (process.returncode, out) == (0, "")
    assert "3/3 tokens in 0 s" in text
    assert "\r\x1b[2K" in text
    assert "0/2 steps" in text
    assert "careful" in text
    assert ("\x1b[33m" in text) is not no_colour
    assert ("\x1b[1mrlfr sample" in text) is not no_colour


def test_docs_page_is_what_the_commands_say(repository: Path) -> None:
    path = repository / "docs" / "make_cli_page.py"
    spec = importlib.util.spec_from_file_location("make_cli_page", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (repository / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == module.make_page(), "run: python docs/make_cli_page.py"
    for name in get_command(app).commands:  # type: ignore[attr-defined]
        assert f"## rlfr {name}\n" in page


def test_a_bad_config_from_python_is_the_same_error() -> None:
    from rlfr_cli.config.sample import ProblemsConfig, SampleConfig

    with pytest.raises(ConfigError, match="--seed must be an integer, at least 0, got -1"):
        SampleConfig(model="m", problems=ProblemsConfig(data="d"), seed=-1)


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("second_of_two")
def test_a_command_of_one_process_is_refused_in_several() -> None:
    result = CliRunner().invoke(app, ["diagnose", "--flow", "f", "--model", "m", "--rollouts", "r"])
    assert result.exit_code == 2
    assert "rlfr diagnose runs in one process, and torchrun has started 2" in result.stderr


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize("arguments", [["fit-flow", "latents"], ["train-rl", "--model", "m", "--data", "d"]])
def test_commands_that_train_together_say_nothing_but_at_their_first_rank(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = types.SimpleNamespace(run=lambda config: None)
    monkeypatch.setitem(sys.modules, COMMANDS[arguments[0]].stage, stage)
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
