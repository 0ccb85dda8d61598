"""`sample`: what rows hold, that parts and stops change no bit, and what it does with a folder in use."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fake_packages import group, install
from rlfr_cli.artifacts.folder import StageFolder
from rlfr_cli.artifacts.rollouts import RolloutRow, iter_rollouts
from rlfr_cli.config.common import GradingConfig
from rlfr_cli.engines import opening
from rlfr_cli.errors import ConfigError, InputError, OutputInUseError, Stopped
from rlfr_cli.stages import sample
from stages.tiny_stages import (
    TinyArtifacts,
    bytes_of,
    interrupt_after,
    sample_config,
    sampling_of,
    start_rlfr,
)


def rows_of(path: Path) -> list[RolloutRow]:
    return list(iter_rollouts(path))


def plain_logprobs(model: torch.nn.Module, row: RolloutRow, temperature: float) -> torch.Tensor:
    """Log-probabilities of a response by one plain forward pass."""
    ids = torch.tensor([[*row.prompt_token_ids, *row.response_token_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(row.prompt_token_ids) - 1 : -1]
    response = torch.tensor(row.response_token_ids)
    return (logits / temperature).log_softmax(-1).gather(-1, response[:, None])[:, 0]


def test_rows_stand_in_input_order_with_the_prompt_that_was_read(tiny: TinyArtifacts) -> None:
    rows = rows_of(tiny.rollouts)
    assert [row.sample_index for row in rows] == [0, 1, 2, 3] * 6
    assert [row.problem_id for row in rows[::4]] == list(dict.fromkeys(row.problem_id for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    for row in rows:
        text = f"<user>{row.problem}<assistant>"
        assert row.prompt_token_ids == tokenizer(text)["input_ids"]
        assert row.source == "policy"


def test_every_row_is_graded_and_paid_by_its_own_box(tiny: TinyArtifacts) -> None:
    rows = rows_of(tiny.rollouts)
    assert {row.grade for row in rows} >= {"correct", "wrong"}, "the tests need both kinds"
    for row in rows:
        boxes = re.findall(r"\\boxed\{(\d+)\}", row.response)
        right = bool(boxes) and boxes[-1] == row.answer[0]
        assert row.correct == right == (row.grade == "correct")
        finished = row.finish_reason == "stop"
        assert row.reward == (0.0 if not finished or not boxes else 1.0 if right else 0.5)


def test_a_response_ends_with_the_end_token_exactly_when_it_finished(tiny: TinyArtifacts, tmp_path: Path) -> None:
    config = sample_config(tiny.policy, tiny.problems, tmp_path / "cut", sampling=sampling_of(max_new_tokens=22))
    summary = sample.run(config)
    end = AutoTokenizer.from_pretrained(tiny.policy).eos_token_id
    rows = rows_of(tmp_path / "cut")
    assert {row.finish_reason for row in rows} == {"stop", "length"}, "the tests need both kinds"
    assert summary["cut_off"] == sum(row.finish_reason == "length" for row in rows)
    for row in rows:
        assert (row.finish_reason == "stop") == (row.response_token_ids[-1] == end)
        assert end not in row.response_token_ids[:-1]
        assert row.finish_reason == "stop" or (len(row.response_token_ids) == 22 and row.reward == 0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_of_the_logits_divided_by_the_temperature(
    tiny: TinyArtifacts, tmp_path: Path, temperature: float
) -> None:
    out = tiny.rollouts
    if temperature != 1.0:
        out = tmp_path / "rollouts"
        sample.run(sample_config(tiny.policy, tiny.problems, out, sampling=sampling_of(temperature=temperature)))
    model = AutoModelForCausalLM.from_pretrained(tiny.policy)
    for row in rows_of(out)[::5]:
        logprobs = torch.tensor(row.response_logprobs)
        torch.testing.assert_close(logprobs, plain_logprobs(model, row, temperature), atol=2e-4, rtol=1e-4)


def test_top_k_changes_what_is_drawn_and_not_the_logprobs(tiny: TinyArtifacts, tmp_path: Path) -> None:
    config = sample_config(tiny.policy, tiny.problems, tmp_path / "k", sampling=sampling_of(top_k=1), group_size=2)
    sample.run(config)
    model = AutoModelForCausalLM.from_pretrained(tiny.policy)
    rows = rows_of(tmp_path / "k")
    assert [r.response for r in rows[::2]] == [r.response for r in rows[1::2]], "one likeliest token is left"
    logprobs = torch.tensor(rows[0].response_logprobs)
    torch.testing.assert_close(logprobs, plain_logprobs(model, rows[0], 1.0), atol=2e-4, rtol=1e-4)


def test_temperature_zero_takes_the_likeliest_token(tiny: TinyArtifacts, tmp_path: Path) -> None:
    config = sample_config(
        tiny.policy, tiny.problems, tmp_path / "greedy", sampling=sampling_of(temperature=0.0), group_size=1
    )
    sample.run(config)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny.policy)
    for row in rows_of(tmp_path / "greedy"):
        prompt = torch.tensor([row.prompt_token_ids])
        theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=32)
        assert row.response_token_ids == theirs[0, prompt.shape[1] :].tolist()


def test_temperature_zero_with_a_group_is_refused(tiny: TinyArtifacts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="same response") as caught:
        sample_config(tiny.policy, tiny.problems, tmp_path, sampling=sampling_of(temperature=0.0), group_size=2)
    assert "--group-size 1" in str(caught.value)


def test_parts_in_one_folder_give_the_bytes_of_one_run(tiny: TinyArtifacts, tmp_path: Path) -> None:
    for part in ("1/3", "3/3", "2/3"):
        assert not (tmp_path / "manifest.json").exists()
        summary = sample.run(sample_config(tiny.policy, tiny.problems, tmp_path, part=part))
    assert summary["complete"]
    assert bytes_of(tmp_path) == bytes_of(tiny.rollouts)


def test_a_part_does_its_share_only(tiny: TinyArtifacts, tmp_path: Path) -> None:
    summary = sample.run(sample_config(tiny.policy, tiny.problems, tmp_path, part="2/3"))
    assert (summary["complete"], summary["units_missing"], summary["responses"]) == (False, 2, 8)
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["00001.arrow", "00001.arrow.json"]


def test_a_stopped_run_continues_to_the_bytes_of_an_unbroken_one(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sample_config(tiny.policy, tiny.problems, tmp_path)
    with monkeypatch.context() as patch:
        interrupt_after(patch, StageFolder, "write_table", 2)
        with pytest.raises(Stopped) as caught:
            sample.run(config)
    assert caught.value.exit_code == 130
    assert "the same command continues" in str(caught.value)
    assert not (tmp_path / "manifest.json").exists()
    summary = sample.run(config)
    assert "continuing after 2 of 3 units" in capsys.readouterr().err
    assert summary["complete"]
    assert bytes_of(tmp_path) == bytes_of(tiny.rollouts)


def test_sigterm_ends_the_command_with_130_and_the_same_command_continues(tiny: TinyArtifacts, tmp_path: Path) -> None:
    out = tmp_path / "rollouts"
    arguments = ["sample", "--model", tiny.policy, "--data", tiny.problems, "--id-column", "id", "--out", out]
    arguments += ["--max-new-tokens", 32, "--group-size", 64, "--problems-per-shard", 1, "--device", "cpu"]
    process = start_rlfr(*arguments)
    deadline = time.monotonic() + 60
    while not (out / "shards" / "00000.arrow.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "the same command continues" in said
    assert not (out / "manifest.json").exists()
    config = sample_config(tiny.policy, tiny.problems, out, group_size=64, problems_per_shard=1)
    assert sample.run(config)["responses"] == 6 * 64


def test_keep_correct_keeps_the_correct_rows_and_no_others(tiny: TinyArtifacts, tmp_path: Path) -> None:
    summary = sample.run(sample_config(tiny.policy, tiny.problems, tmp_path, keep=("correct",)))
    wanted = [row for row in rows_of(tiny.rollouts) if row.correct and row.finish_reason == "stop"]
    assert rows_of(tmp_path) == wanted
    assert summary["responses"] == len(wanted) > 0
    assert summary["accuracy"] == 1


def test_keep_rules_multiply(tiny: TinyArtifacts, tmp_path: Path) -> None:
    rules = ("correct", "max-group-share=0.5")
    sample.run(sample_config(tiny.policy, tiny.problems, tmp_path, keep=rules))
    rows = rows_of(tiny.rollouts)
    right: dict[str, int] = {}
    for row in rows:
        right[row.problem_id] = right.get(row.problem_id, 0) + row.correct
    assert max(right.values()) > 2, "one problem must be too easy for the rule"
    assert rows_of(tmp_path) == [row for row in rows if row.correct and right[row.problem_id] <= 2]


def test_a_rule_for_tokens_is_no_rule_for_keeping_responses(tiny: TinyArtifacts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="min-entropy") as caught:
        sample.run(sample_config(tiny.policy, tiny.problems, tmp_path / "out", keep=("min-entropy=0.5",)))
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_keep_takes_a_rule_from_a_file_and_multiplies_it_with_the_others(tiny: TinyArtifacts, tmp_path: Path) -> None:
    rules = tmp_path / "my_rules.py"
    rules.write_text("def digit(facts): return facts.response.count('3') and facts.problem_id[-1] != '0'\n")
    rows = rows_of(tiny.rollouts)
    wanted = [row for row in rows if "3" in row.response and row.problem_id[-1] != "0"]
    assert 0 < len(wanted) < len(rows), "the tests need both kinds"
    sample.run(sample_config(tiny.policy, tiny.problems, tmp_path / "one", keep=(f"{rules}:digit",)))
    assert rows_of(tmp_path / "one") == wanted
    sample.run(sample_config(tiny.policy, tiny.problems, tmp_path / "two", keep=(f"{rules}:digit", "correct")))
    assert rows_of(tmp_path / "two") == [row for row in wanted if row.correct and row.finish_reason == "stop"]


def test_keep_takes_a_rule_of_a_package(tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from rlfr_cli.flow.reference import BoundRule\n"
        "@BoundRule\ndef most(bound): return lambda facts: facts.length <= bound\n"
    )
    install(monkeypatch, tmp_path, "keeping", group("rlfr.rules", ["most = keeping:most"]), code)
    lengths = [len(row.response_token_ids) for row in rows_of(tiny.rollouts)]
    limit = sorted(lengths)[len(lengths) // 2]
    sample.run(sample_config(tiny.policy, tiny.problems, tmp_path / "out", keep=(f"most={limit}",)))
    kept = [len(row.response_token_ids) for row in rows_of(tmp_path / "out")]
    assert kept == [length for length in lengths if length <= limit]
    assert json.loads((tmp_path / "out" / "stage.json").read_text())["inputs"]["rules"] == {"most": "keeping 1.2"}


def test_a_bad_weight_is_a_failure_during_work(tiny: TinyArtifacts, tmp_path: Path) -> None:
    rules = tmp_path / "my_rules.py"
    rules.write_text("def minus(facts): return -1\n")
    with pytest.raises(InputError, match=r"minus gave -1 for a response to problem") as caught:
        sample.run(sample_config(tiny.policy, tiny.problems, tmp_path / "out", keep=(f"{rules}:minus",)))
    assert caught.value.exit_code == 1


def test_another_content_of_a_rules_file_is_another_config(tiny: TinyArtifacts, tmp_path: Path) -> None:
    rules = tmp_path / "my_rules.py"
    rules.write_text("def every(facts): return 1\n")
    config = sample_config(tiny.policy, tiny.problems, tmp_path / "out", keep=(f"{rules}:every",))
    sample.run(config)
    assert sample.run(config)["complete"]
    rules.write_text("def every(facts): return 0\n")
    with pytest.raises(OutputInUseError, match=r"inputs\.rules"):
        sample.run(config)


@pytest.mark.parametrize("rule", ["TokenRule(lambda tokens: tokens.logprobs_T)", "None"])
def test_a_rule_that_cannot_choose_responses_is_refused_before_work(
    tiny: TinyArtifacts, tmp_path: Path, rule: str
) -> None:
    rules = tmp_path / "my_rules.py"
    rules.write_text(f"from rlfr_cli.flow.reference import TokenRule\nrule = {rule}\n")
    with pytest.raises(ConfigError, match=r"my_rules\.py") as caught:
        sample.run(sample_config(tiny.policy, tiny.problems, tmp_path / "out", keep=(f"{rules}:rule",)))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_the_same_config_again_says_so_and_changes_nothing(
    tiny: TinyArtifacts, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bytes_of(tiny.rollouts)
    times = {path: path.stat().st_mtime_ns for path in tiny.rollouts.rglob("*") if path.is_file()}
    monkeypatch.setattr(opening, "load_policy", None)  # nothing is loaded for it
    summary = sample.run(sample_config(tiny.policy, tiny.problems, tiny.rollouts))
    assert "complete already; nothing to do" in capsys.readouterr().err
    assert summary["complete"]
    assert summary["accuracy"] == sum(row.correct for row in rows_of(tiny.rollouts)) / 24
    assert bytes_of(tiny.rollouts) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_another_config_is_refused_with_the_key_and_both_ways_out(tiny: TinyArtifacts) -> None:
    before = bytes_of(tiny.rollouts)
    with pytest.raises(OutputInUseError) as caught:
        sample.run(sample_config(tiny.policy, tiny.problems, tiny.rollouts, sampling=sampling_of(temperature=0.5)))
    assert caught.value.exit_code == 2
    assert "config.sampling.temperature: 1.0 there, 0.5 here" in caught.value.message
    assert "--overwrite" in str(caught.value.hint)
    assert "--out" in str(caught.value.hint)
    assert bytes_of(tiny.rollouts) == before


def test_other_problems_are_another_config(tiny: TinyArtifacts, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(tiny.problems.read_text().splitlines()[0] + "\n")
    with pytest.raises(OutputInUseError, match=r"inputs\.problems"):
        sample.run(sample_config(tiny.policy, other, tiny.rollouts, problems_per_shard=2))


def test_the_same_content_at_other_paths_is_the_same_config(tiny: TinyArtifacts, tmp_path: Path) -> None:
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(tiny.problems.read_bytes())
    assert sample.run(sample_config(tiny.policy, moved, tiny.rollouts))["complete"]


def test_overwrite_replaces_our_work_and_leaves_other_files(tiny: TinyArtifacts, tmp_path: Path) -> None:
    sample.run(sample_config(tiny.policy, tiny.problems, tmp_path, group_size=2, part="1/3"))
    (tmp_path / "notes.txt").write_text("mine")
    sample.run(sample_config(tiny.policy, tiny.problems, tmp_path, overwrite=True))
    assert bytes_of(tmp_path) == {**bytes_of(tiny.rollouts), "notes.txt": b"mine"}


def test_overwrite_and_part_exclude_each_other(tiny: TinyArtifacts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--overwrite and --part"):
        sample.run(sample_config(tiny.policy, tiny.problems, tmp_path / "out", overwrite=True, part="1/2"))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_the_work_and_writes_nothing(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "load_policy", None)
    summary = sample.run(sample_config(tiny.policy, tiny.problems, tmp_path / "out", dry_run=True))
    assert (summary["problems"], summary["responses"], summary["shards"]) == (6, 24, 3)
    assert summary["most_new_tokens"] == 24 * 32
    assert list(tmp_path.iterdir()) == []


def test_the_seed_decides_what_is_drawn(tiny: TinyArtifacts, tmp_path: Path) -> None:
    sample.run(sample_config(tiny.policy, tiny.problems, tmp_path, seed=1))
    drawn, before = rows_of(tmp_path), rows_of(tiny.rollouts)
    assert [row.problem_id for row in drawn] == [row.problem_id for row in before]
    assert sum(new.response != old.response for new, old in zip(drawn, before, strict=True)) > 12


def test_a_stop_text_ends_a_response_with_it(tiny: TinyArtifacts, tmp_path: Path) -> None:
    sample.run(sample_config(tiny.policy, tiny.problems, tmp_path, sampling=sampling_of(stop=(";",))))
    rows = rows_of(tmp_path)
    assert all(row.response.endswith(";") and row.response.count(";") == 1 for row in rows)
    assert {row.finish_reason for row in rows} == {"stop"}


def test_a_reward_of_the_users_sees_the_response_and_pays_it(tiny: TinyArtifacts, tmp_path: Path) -> None:
    reward = tmp_path / "my_reward.py"
    reward.write_text(
        "def length(inputs):\n    return [len(i.response) + 100 * (i.grade == 'correct') for i in inputs]\n"
    )
    grading = GradingConfig(reward=f"{reward}:length")
    sample.run(sample_config(tiny.policy, tiny.problems, tmp_path / "out", grading=grading))
    for row in rows_of(tmp_path / "out"):
        assert row.reward == len(row.response) + 100 * row.correct


def test_another_content_of_a_rewards_file_is_another_config(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    reward = tmp_path / "my_reward.py"
    reward.write_text("def pay(inputs): return [1] * len(inputs)\n")
    grading = GradingConfig(reward="~/my_reward.py:pay")
    config = sample_config(tiny.policy, tiny.problems, tmp_path / "out", grading=grading)
    sample.run(config)
    reward.write_text("def pay(inputs): return [2] * len(inputs)\n")
    with pytest.raises(OutputInUseError, match=r"inputs\.reward"):
        sample.run(config)


def test_a_reward_of_a_package_pays_and_is_remembered(
    tiny: TinyArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["lengths = paying:lengths", "accuracy = paying:lengths"]
    code = "def lengths(inputs): return [len(i.response) for i in inputs]\n"
    install(monkeypatch, tmp_path, "paying", group("rlfr.rewards", lines), code)
    for name, remembered in (("lengths", "paying 1.2"), ("accuracy", None)):
        grading, out = GradingConfig(reward=name), tmp_path / name
        sample.run(sample_config(tiny.policy, tiny.problems, out, grading=grading))
        assert json.loads((out / "stage.json").read_text())["inputs"].get("reward") == remembered
        for row in rows_of(out):
            accepted = float(row.correct and row.finish_reason == "stop")
            assert row.reward == (len(row.response) if remembered else accepted)
    assert "--reward accuracy is the reward of rlfr itself" in capsys.readouterr().err
