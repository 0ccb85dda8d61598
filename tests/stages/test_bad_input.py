"""Inputs that cannot be used: one clear error before any work, with a way out, and nothing touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from rlfr_cli import console
from rlfr_cli.artifacts.rollouts import iter_rollouts
from rlfr_cli.cli import app
from rlfr_cli.config.common import GradingConfig, PromptConfig
from rlfr_cli.config.train_rl import RolloutConfig, RunConfig
from rlfr_cli.engines import opening
from rlfr_cli.errors import (
    ArtifactError,
    ConfigError,
    InputError,
    MissingInputError,
    OutputInUseError,
    OutputSpaceError,
    RlfrError,
)
from rlfr_cli.stages import evaluate, extract_latents, fit_flow, sample, score, train_rl
from stages.tiny_stages import (
    TinyArtifacts,
    bytes_of,
    eval_config,
    extract_config,
    fit_config,
    problems_of,
    rlfr,
    sample_config,
    sampling_of,
    score_config,
    train_config,
)
from tiny_models import make_model_folder, make_tokenizer

PROBLEM_STAGES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "sample": (sample.run, sample_config),
    "eval": (evaluate.run, eval_config),
    "train-rl": (train_rl.run, train_config),
}


def command(*arguments: object) -> tuple[int, str]:
    """Exit code and stderr of the command line, in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    console.set_quiet(False)
    return result.exit_code, result.stderr


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# Problem files

BAD_FILES: dict[str, tuple[list[Any], str, str]] = {
    "empty": ([], "has no rows", "check that the right file"),
    "not JSON": ([{"id": "a", "problem": "1+1", "answer": "2"}, '{"id": "b", '], "line 2 is not JSON", "one object"),
    "not an object": ([[1, 2]], "line 1 is a list, not an object", ""),
    "no column": (
        [{"id": "a", "problm": "1+1", "answer": "2"}],
        "has no column 'problem'; it has id, problm, answer",
        "did you mean 'problm'?",
    ),
    "no text": ([{"id": "a", "problem": " ", "answer": "2"}], "line 1: 'problem' is empty", "remove the row"),
    "number": ([{"id": "a", "problem": 7, "answer": "2"}], "'problem' is int, not text", "name another column"),
    "no answer": ([{"id": "a", "problem": "1", "answer": None}], "'answer' is null", "name another column"),
    "twice": (
        [{"id": "a", "problem": "1", "answer": "1"}, {"id": "a", "problem": "2", "answer": "2"}],
        "line 2 has the id 'a' of",
        "ids must differ",
    ),
    "unreadable answers": (
        [{"id": name, "problem": "1", "answer": text} for name, text in (("p", "1"), ("q", "who knows?"))],
        "1 of 2 problems have an answer that does not parse:\n  problem q: 'who knows?'",
        "--skip-bad-answers",
    ),
    "too long": (
        [{"id": "long", "problem": "1+" * 90, "answer": "1"}],
        "prompts longer than the model's context of 128 tokens: problem long (182 tokens)",
        "remove these problems",
    ),
}


@pytest.mark.parametrize("stage", PROBLEM_STAGES)
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_problem_file_that_cannot_be_used(
    case: str, stage: str, tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, message, hint = BAD_FILES[case]
    data = write_lines(tmp_path / "problems.jsonl", *rows)
    monkeypatch.setattr(opening, "load_policy", None)
    run, make = PROBLEM_STAGES[stage]
    with pytest.raises(InputError) as caught:
        run(make(tiny.policy, data, tmp_path / "out"))
    assert message in caught.value.message
    assert hint in str(caught.value.hint)
    assert caught.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["problems.jsonl"]


def test_a_missing_file_or_a_wrong_kind_of_file(tiny: TinyArtifacts, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"none\.jsonl") as caught:
        sample.run(sample_config(tiny.policy, tmp_path / "none.jsonl", tmp_path / "out"))
    assert "check the path" in str(caught.value.hint)
    (tmp_path / "problems.txt").write_text("1+1")
    with pytest.raises(InputError, match=r"does not end in one of \.jsonl"):
        sample.run(sample_config(tiny.policy, tmp_path / "problems.txt", tmp_path / "out"))
    (tmp_path / "image.jsonl").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        sample.run(sample_config(tiny.policy, tmp_path / "image.jsonl", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_many_bad_answers_are_listed_briefly_and_can_be_left_out(
    tiny: TinyArtifacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"bad{n}", "problem": "1+1", "answer": f"who knows {n}?"} for n in range(7)]
    data = write_lines(tmp_path / "p.jsonl", {"id": "good", "problem": "1+1+1", "answer": "3"}, *rows)
    with pytest.raises(InputError) as caught:
        sample.run(sample_config(tiny.policy, data, tmp_path / "out"))
    assert "7 of 8 problems" in caught.value.message
    assert "bad4" in caught.value.message
    assert "bad5" not in caught.value.message
    assert "and 2 more" in caught.value.message
    config = sample_config(tiny.policy, data, tmp_path / "out", problems=problems_of(data, skip_bad_answers=True))
    summary = sample.run(config)
    assert (summary["problems"], summary["skipped_problems"], summary["responses"]) == (1, 7, 4)
    assert "7 of 8 problems left out" in capsys.readouterr().err
    assert {row.problem_id for row in iter_rollouts(tmp_path / "out")} == {"good"}


def test_a_file_of_bad_answers_only_leaves_no_problem(tiny: TinyArtifacts, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "p.jsonl", {"id": "a", "problem": "1", "answer": "who knows?"})
    with pytest.raises(InputError, match="no problem is left"):
        sample.run(
            sample_config(tiny.policy, data, tmp_path / "out", problems=problems_of(data, skip_bad_answers=True))
        )


def test_responses_that_the_context_cuts_are_said_beforehand(
    tiny: TinyArtifacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sample_config(
        tiny.policy, tiny.problems, tmp_path, sampling=sampling_of(max_new_tokens=1000), dry_run=True
    )
    sample.run(config)
    assert "6 of 6 prompts leave less than --max-new-tokens 1000" in capsys.readouterr().err


def test_expert_data_without_its_column(tiny: TinyArtifacts, tmp_path: Path) -> None:
    config = extract_config(tiny.policy, tmp_path / "out", data=str(tiny.expert), response_column="soluton")
    with pytest.raises(InputError, match="has no column 'soluton'") as caught:
        extract_latents.run(config)
    assert "did you mean 'solution'?" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


# Models and tokenizers


def test_a_folder_that_is_no_model(tiny: TinyArtifacts, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cut = tmp_path / "cut"
    shutil.copytree(tiny.policy, cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    pickle = tmp_path / "pickle"
    shutil.copytree(tiny.policy, pickle)
    (pickle / "model.safetensors").rename(pickle / "pytorch_model.bin")
    half = tmp_path / "half"
    shutil.copytree(tiny.policy, half)
    (half / "tokenizer.json").unlink()
    (half / "tokenizer_config.json").unlink()
    cases = {
        tmp_path / "none": "no such folder",
        tmp_path / "empty": "it has no config.json (it holds nothing)",
        tiny.problems: "is a file, not a model folder",
        tiny.rollouts: "it has no config.json (it holds manifest.json, shards, stage.json)",
        cut: "is cut or altered",
        pickle: "pytorch_model.bin can run code",
        half: "tokenizer",
    }
    for folder, message in cases.items():
        with pytest.raises(InputError) as caught:
            sample.run(sample_config(folder, tiny.problems, tmp_path / "out"))
        assert message in str(caught.value), folder
        assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_a_chat_template_names_the_way_out_which_works(tiny: TinyArtifacts, tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model", tokenizer=make_tokenizer(chat_template=False))

    def config(template: str | None) -> Any:
        prompt = PromptConfig(prompt_template=template)
        return sample_config(model, tiny.problems, tmp_path / "out", prompt=prompt, overwrite=True)

    with pytest.raises(InputError, match="no chat template") as caught:
        sample.run(config(None))
    assert "--prompt-template" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="no place for the problem"):
        sample.run(config("Solve it:"))
    with pytest.raises(MissingInputError, match="no such file"):
        sample.run(config(f"@{tmp_path / 'none.txt'}"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "template.txt").write_text("Q: {problem} A:")
    prompts = []
    for template in ("Q: {problem} A:", f"@{tmp_path / 'template.txt'}"):
        sample.run(config(template))
        prompts.append(next(iter_rollouts(tmp_path / "out")))
    tokenizer = AutoTokenizer.from_pretrained(model)
    problem = prompts[0].problem
    assert prompts[0].prompt_token_ids == tokenizer(f"Q: {problem} A:")["input_ids"] == prompts[1].prompt_token_ids


def test_a_device_that_is_not_there(tiny: TinyArtifacts, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match="no CUDA device") as caught:
        sample.run(sample_config(tiny.policy, tiny.problems, tmp_path / "out", device="cuda"))
    assert "--device cpu" in str(caught.value.hint)


# Artifacts


@pytest.fixture
def latents(tiny: TinyArtifacts, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny.latents, tmp_path / "latents"))


def test_latents_of_another_format_version(tiny: TinyArtifacts, latents: Path, tmp_path: Path) -> None:
    stage = json.loads((latents / "stage.json").read_text())
    (latents / "stage.json").write_text(json.dumps({**stage, "format_version": 99}))
    with pytest.raises(ArtifactError, match="format version 99; this version of rlfr reads version 2") as caught:
        fit_flow.run(fit_config(latents, tmp_path / "flow.safetensors"))
    assert "stage.json" in str(caught.value)
    assert caught.value.hint
    with pytest.raises(ArtifactError, match="format version 99"):
        score.run(score_config(tiny.flow, tmp_path / "scores", latents=latents))
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_a_cut_shard_is_refused_by_name(tiny: TinyArtifacts, latents: Path, tmp_path: Path) -> None:
    shard = latents / "shards" / "00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"00001\.safetensors is cut or altered") as caught:
        fit_flow.run(fit_config(latents, tmp_path / "flow.safetensors"))
    assert caught.value.exit_code == 2
    assert caught.value.hint
    shard.unlink()
    with pytest.raises(ArtifactError, match=r"00001\.safetensors is missing"):
        score.run(score_config(tiny.flow, tmp_path / "scores", latents=latents))
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_an_altered_shard_of_latents_is_found_when_it_is_read(
    tiny: TinyArtifacts, latents: Path, tmp_path: Path
) -> None:
    shard = latents / "shards" / "00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for call in (
        lambda: fit_flow.run(fit_config(latents, tmp_path / "flow.safetensors")),
        lambda: score.run(score_config(tiny.flow, tmp_path / "scores", latents=latents)),
    ):
        with pytest.raises(ArtifactError, match=r"00001\.safetensors is altered: SHA-256"):
            call()
    assert not (tmp_path / "flow.safetensors").exists()


def test_altered_rollouts_are_refused_before_any_work(tiny: TinyArtifacts, tmp_path: Path) -> None:
    rollouts = Path(shutil.copytree(tiny.rollouts, tmp_path / "rollouts"))
    shard = rollouts / "shards" / "00002.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"boxed", b"b0xed"))
    for call in (
        lambda: extract_latents.run(extract_config(tiny.policy, tmp_path / "out", rollouts=rollouts)),
        lambda: score.run(score_config(tiny.flow, tmp_path / "out", model=str(tiny.policy), rollouts=rollouts)),
    ):
        with pytest.raises(ArtifactError, match=r"00002\.arrow is altered") as caught:
            call()
        assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_an_artifact_of_another_kind_or_unfinished(tiny: TinyArtifacts, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds rollouts, and latents are needed") as caught:
        fit_flow.run(fit_config(tiny.rollouts, tmp_path / "flow.safetensors"))
    assert "rlfr show" in str(caught.value.hint)
    with pytest.raises(ArtifactError, match="is not an artifact of rlfr"):
        fit_flow.run(fit_config(tiny.policy, tmp_path / "flow.safetensors"))
    with pytest.raises(MissingInputError, match="does not exist"):
        fit_flow.run(fit_config(tmp_path / "none", tmp_path / "flow.safetensors"))
    sample.run(sample_config(tiny.policy, tiny.problems, tmp_path / "rollouts", part="1/3"))
    with pytest.raises(ArtifactError, match="unfinished: 1 of 3 units are done") as unfinished:
        extract_latents.run(extract_config(tiny.policy, tmp_path / "out", rollouts=tmp_path / "rollouts"))
    assert "it continues" in str(unfinished.value.hint)
    assert not (tmp_path / "out").exists()


def test_rollouts_without_any_response(tiny: TinyArtifacts, tmp_path: Path) -> None:
    sample.run(sample_config(tiny.policy, tiny.problems, tmp_path / "none", keep=("min-length=500",)))
    with pytest.raises(InputError, match="holds no responses") as caught:
        extract_latents.run(extract_config(tiny.policy, tmp_path / "out", rollouts=tmp_path / "none"))
    assert "--keep" in str(caught.value.hint)


def test_rollouts_of_another_tokenizer(tiny: TinyArtifacts, random_model: Path, tmp_path: Path) -> None:
    config = sample_config(random_model, tiny.problems, tmp_path / "rollouts", sampling=sampling_of(max_new_tokens=4))
    sample.run(config)
    for call in (
        lambda: extract_latents.run(extract_config(tiny.policy, tmp_path / "out", rollouts=tmp_path / "rollouts")),
        lambda: score.run(
            score_config(tiny.flow, tmp_path / "out", model=str(tiny.policy), rollouts=tmp_path / "rollouts")
        ),
    ):
        with pytest.raises(InputError, match="the model's vocabulary ends at 24") as caught:
            call()
        assert "the model that drew these responses" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


# Output folders and disks


@pytest.mark.parametrize("stage", PROBLEM_STAGES)
def test_files_of_others_in_the_output_folder_stay(stage: str, tiny: TinyArtifacts, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    run, make = PROBLEM_STAGES[stage]
    for overwrite in (False, True):
        with pytest.raises(OutputInUseError, match=r"thesis\.tex") as caught:
            run(make(tiny.policy, tiny.problems, tmp_path, overwrite=overwrite))
        assert "--out" in str(caught.value.hint)
    with pytest.raises(OutputInUseError, match="is a file"):
        run(make(tiny.policy, tiny.problems, tmp_path / "thesis.tex"))
    assert bytes_of(tmp_path) == {"thesis.tex": b"years of work"}


def fail_for_space(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The disk is full from the ``after``-th flush on."""
    real, seen = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal seen
        seen += 1
        if seen > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)


def test_a_disk_that_fills_up_keeps_what_is_finished(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sample_config(tiny.policy, tiny.problems, tmp_path)
    with monkeypatch.context() as patch:
        fail_for_space(patch, after=4)  # stage.json, a shard and its record, a second shard
        with pytest.raises(OutputSpaceError, match="no space left") as caught:
            sample.run(config)
    assert caught.value.exit_code == 1
    assert "the same command continues" in str(caught.value.hint)
    assert (tmp_path / "shards" / "00000.arrow.json").exists()
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]
    sample.run(config)
    assert bytes_of(tmp_path) == bytes_of(tiny.rollouts)


def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(
        tiny.policy,
        tiny.problems,
        tmp_path,
        rollout=RolloutConfig(prompts_per_step=1, group_size=2, steps=2),
        run=RunConfig(tensorboard=False, save_every=1),
    )

    def fill(self: Any, step: int) -> None:
        if step == 2:
            fail_for_space(monkeypatch, after=2)
        save(self, step)

    save = train_rl.Trainer.save
    monkeypatch.setattr(train_rl.Trainer, "save", fill)
    with pytest.raises(OutputSpaceError) as caught:
        train_rl.run(config)
    assert caught.value.exit_code == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001"]
    assert (tmp_path / "latest").read_text() == "step-000001\n"


# The command line


def test_errors_before_work_exit_with_two(tiny: TinyArtifacts, tmp_path: Path) -> None:
    model, data, out = ["--model", tiny.policy], ["--data", tiny.problems], ["--out", tmp_path / "out"]
    empty = write_lines(tmp_path / "empty.jsonl")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[sample]\ngroup_sise = 4\n")
    cases = {
        ("sample", *model, *out): "--data must be given",
        ("sample", *model, "--data", empty, *out): "has no rows",
        ("sample", *model, *data, *out, "--config", recipe): "group_sise is not an option",
        ("sample", *model, *data, *out, "--part", "4/3"): "--part must be I/N",
        ("sample", *model, *data, *out, "--keep", "corect"): "no such rule",
        ("sample", *model, *data, *out, "--group-size", 0): "at least 1",
        ("sample", *model, *data, "--out", tiny.policy): "holds no work of this kind",
        ("fit-flow", tiny.rollouts, *out): "latents are needed",
        ("score", "--flow", tiny.problems, "--latents", tiny.latents, *out): "is not a safetensors file",
        ("train-rl", *model, *data, *out, "--top-p", 0.9): "--top-p 0.9",
        ("train-rl", *model, *data, *out, "--reward", f"{tmp_path}/none.py:f"): "no reward file",
        ("eval", "--model", tmp_path, *data, *out): "is not a model folder",
    }
    for arguments, message in cases.items():
        code, said = command(*arguments)
        assert code == 2, said
        assert said.count("error: ") == 1, said
        assert message in said
        assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "recipe.toml"]


def test_the_real_command_ends_with_two_and_one_message(tiny: TinyArtifacts, tmp_path: Path) -> None:
    code, out, said = rlfr("sample", "--model", tmp_path, "--data", tiny.problems, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert said.startswith(f"error: {tmp_path} is not a model folder: it has no config.json (it holds nothing)")
    assert "\n\nhint: --model wants a Hugging Face model folder" in said
    assert list(tmp_path.iterdir()) == []


def test_a_reward_function_that_fails_ends_with_one(tiny: TinyArtifacts, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def short(inputs):\n    return [1.0]\n")
    grading = GradingConfig(reward=f"{tmp_path / 'reward.py'}:short")
    with pytest.raises(RlfrError, match="gave 1 rewards for 8 responses") as caught:
        sample.run(sample_config(tiny.policy, tiny.problems, tmp_path / "out", grading=grading))
    assert caught.value.exit_code == 1
    grading = GradingConfig(reward=f"{tmp_path / 'reward.py'}:shirt")
    with pytest.raises(ConfigError, match="it has short") as missing:
        sample.run(sample_config(tiny.policy, tiny.problems, tmp_path / "other", grading=grading))
    assert "did you mean" in str(missing.value.hint)
    assert not (tmp_path / "other").exists()
