"""The embedded problems and policy in ``data/``: what they promise, checked on the files themselves."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

FILES = ("train", "heldout", "expert")


@pytest.fixture(scope="module")
def data(repository: Path) -> Path:
    return repository / "data"


@pytest.fixture(scope="module")
def make(data: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("embedded_make", data / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(data: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()] for name in FILES}


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Any:
    return AutoTokenizer.from_pretrained(data / "policy")


@pytest.fixture(scope="module")
def model(data: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(data / "policy", torch_dtype="auto")


def test_files_equal_what_the_script_makes_again(data: Path, make: ModuleType) -> None:
    problems = make.make_problems(seed=0)
    for name in FILES:
        assert (data / f"{name}.jsonl").read_text() == make.as_jsonl(problems[name]), name


def test_another_seed_makes_other_problems(make: ModuleType) -> None:
    first, second = ({row["problem"] for row in make.make_problems(seed)["heldout"]} for seed in (0, 1))
    assert len(first & second) < 40


def test_no_problem_twice_and_no_problem_in_both_splits(rows: dict[str, list[dict[str, Any]]]) -> None:
    texts = [row["problem"] for name in ("train", "heldout") for row in rows[name]]
    assert len(texts) == len(set(texts)) == 4400
    ids = [row["id"] for name in ("train", "heldout") for row in rows[name]]
    assert len(ids) == len(set(ids))


def test_every_level_is_in_every_split(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert Counter(row["level"] for row in rows["train"]) == dict.fromkeys((1, 2, 3, 4), 1000)
    assert Counter(row["level"] for row in rows["heldout"]) == dict.fromkeys((1, 2, 3, 4), 100)
    assert set(Counter(row["level"] for row in rows["expert"])) == {1, 2, 3, 4}


def test_a_level_says_the_number_and_kind_of_operations(rows: dict[str, list[dict[str, Any]]]) -> None:
    for row in rows["train"] + rows["heldout"]:
        operations = re.findall(r"[-+*/]", row["problem"])
        assert len(operations) == (2 if row["level"] <= 2 else 3), row
        assert ("*" in operations or "/" in operations) == (row["level"] % 2 == 0), row


def test_answers_are_the_values_of_the_problems(rows: dict[str, list[dict[str, Any]]]) -> None:
    """By Python's own precedence, so that the parentheses are right too."""
    for row in rows["train"] + rows["heldout"]:
        assert re.fullmatch(r"[-+*/()0-9]+", row["problem"])
        assert eval(row["problem"]) == int(row["answer"]), row


def test_expert_rows_are_the_solved_rows_of_the_train_split(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert rows["expert"] == [row for row in rows["train"] if "solution" in row]
    assert len(rows["expert"]) == 1000
    assert not any("solution" in row for row in rows["heldout"])


def test_expert_solutions_are_right_step_by_step(rows: dict[str, list[dict[str, Any]]]) -> None:
    for row in rows["expert"]:
        *steps, box = row["solution"].split(";")
        written = re.findall(r"\d+|[-+*/]", row["problem"])
        value = int(written[0])
        for step, operation, operand in zip(steps, written[1::2], written[2::2], strict=True):
            left, right = step.split("=")
            assert left == f"{value}{operation}{operand}", row
            value, before = int(right), value
            assert eval(f"{before}{operation}{operand}") == value, row
            assert 1 <= value <= 99, row
        assert box == f"\\boxed{{{row['answer']}}}", row
        assert value == int(row["answer"]), row


def test_the_policy_is_small_and_plain(data: Path, model: Any) -> None:
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) <= 1_500_000
    assert sum(path.stat().st_size for path in (data / "policy").iterdir()) <= 8e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.tie_word_embeddings
    assert not [path for path in (data / "policy").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_tokens_round_trip(rows: dict[str, list[dict[str, Any]]], tokenizer: Any) -> None:
    for row in rows["expert"][:200]:
        for text in (row["problem"], row["solution"]):
            token_ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(token_ids) == text
            assert len(token_ids) == len(text.replace("\\boxed{", "#"))


def test_the_tokenizer_is_the_one_that_the_script_makes(make: ModuleType, tokenizer: Any) -> None:
    """Transformers 5 rebuilds the tokenizer of a Qwen2 model by its own rules: nothing may be lost."""
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.get_vocab() == make.make_tokenizer().get_vocab()
    assert len(tokenizer) == len(make.VOCABULARY) == 25
    whole = "<user>9/3<assistant>9/3=3;\\boxed{3}<end>"
    assert tokenizer.decode(tokenizer(whole)["input_ids"], skip_special_tokens=True) == "9/39/3=3;\\boxed{3}"


def test_every_solution_fits_in_the_response_length(rows: dict[str, list[dict[str, Any]]], tokenizer: Any) -> None:
    assert max(len(tokenizer(row["solution"])["input_ids"]) + 1 for row in rows["expert"]) <= 48


def test_chat_template_ignores_the_system_message_and_ends_where_the_answer_starts(tokenizer: Any) -> None:
    user = {"role": "user", "content": "(28+5)*2-38"}
    system = {"role": "system", "content": "Reason step by step."}
    prompt = tokenizer.apply_chat_template([system, user], add_generation_prompt=True, tokenize=False)
    assert prompt == "<user>(28+5)*2-38<assistant>"
    prompt_ids = tokenizer(prompt, add_special_tokens=True)["input_ids"]
    assert prompt_ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert len(prompt_ids) == len("(28+5)*2-38") + 2

    solution = "28+5=33;33*2=66;66-38=28;\\boxed{28}"
    messages = [system, user, {"role": "assistant", "content": solution}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == prompt + solution + tokenizer.eos_token
    assert tokenizer(whole)["input_ids"][-1] == tokenizer.eos_token_id


def test_the_policy_writes_clean_chains_and_is_right_on_some(
    rows: dict[str, list[dict[str, Any]]], tokenizer: Any, model: Any
) -> None:
    """The loose bounds hold for any draw of 200 responses from a policy in the band of 25 to 45 %."""
    problems = rows["heldout"][:200]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["problem"]}], add_generation_prompt=True, tokenize=False
        )
        for row in problems
    ]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    assert tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    torch.manual_seed(0)
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=48,
        do_sample=True,
        top_k=0,
    )
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    shape = re.compile(r"(\d+[-+*/]\d+=\d+;)+\\boxed\{\d+\}")
    assert sum(bool(shape.fullmatch(text)) for text in texts) > 0.8 * len(texts)
    right = sum(text.endswith(f"\\boxed{{{row['answer']}}}") for text, row in zip(texts, problems, strict=True))
    assert 0.15 < right / len(texts) < 0.55
