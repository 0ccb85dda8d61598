"""Functions of the user's own: from a file, from an installed package, and every way in which they are refused."""

from __future__ import annotations

import hashlib
import math
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fake_packages import group, install
from rlfr_cli.errors import ConfigError, InputError, MissingInputError
from rlfr_cli.extensions import (
    Kind,
    extension_fingerprint,
    find_extension,
    finite_number,
    installed_names,
    warning_if_hidden,
)
from rlfr_cli.flow.reference import ResponseFacts, TokenFacts
from rlfr_cli.grading.grades import Grade
from rlfr_cli.grading.rewards import RewardInput, load_reward
from rlfr_cli.stages.rules import load_rules


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own=mine" / "my file.py"
    path.parent.mkdir()
    path.write_text("SEEN = []\ndef first(): return SEEN\ndef second(): return SEEN\nlimit = 5\n")
    return path


def test_a_function_of_a_file_at_any_path(file: Path) -> None:
    function = find_extension(f"{file}:first", Kind.RULE)
    assert function is not None
    assert function() == []


def test_a_file_in_the_home_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(file.parent))
    assert find_extension(f"~/{file.name}:first", Kind.RULE) is not None
    assert extension_fingerprint(f"~/{file.name}:first", Kind.RULE) is not None


def test_two_functions_of_a_file_share_its_module_until_the_file_changes(file: Path) -> None:
    first, second = find_extension(f"{file}:first", Kind.RULE), find_extension(f"{file}:second", Kind.REWARD)
    assert first is not None
    assert second is not None
    assert first() is second()
    times = file.stat()
    file.write_text(file.read_text().replace("return SEEN", "return 'no'"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = find_extension(f"{file}:first", Kind.RULE)
    assert changed is not None
    assert changed() == "no"


def test_a_file_may_hold_a_dataclass_with_text_annotations_and_leaves_no_bytecode(file: Path) -> None:
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Limit:\n    most: int\n\ndef rule(): return Limit(3).most\n"
    )
    rule = find_extension(f"{file}:rule", Kind.RULE)
    assert rule is not None
    assert rule() == 3
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_annotations_are_objects_where_the_file_does_not_ask_for_text(file: Path) -> None:
    """The loader's own `from __future__ import annotations` must not reach the file."""
    file.write_text("def rule(facts: int) -> float: return 0.0\n")
    rule = find_extension(f"{file}:rule", Kind.RULE)
    assert rule is not None
    assert rule.__annotations__ == {"facts": int, "return": float}


def test_a_missing_file_or_function_is_named(file: Path) -> None:
    with pytest.raises(MissingInputError, match=r"there is no rule file .*none\.py") as missing:
        find_extension(f"{file.parent}/none.py:first", Kind.RULE)
    assert missing.value.hint
    with pytest.raises(ConfigError, match="has no function 'secnd'; it has first, second") as caught:
        find_extension(f"{file}:secnd", Kind.RULE)
    assert caught.value.hint == f"did you mean {file}:second?"
    with pytest.raises(ConfigError, match="has no function 'limit'"):
        find_extension(f"{file}:limit", Kind.RULE)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import nothing_like_this", "ModuleNotFoundError"),
        ("def broken(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("\0", "SyntaxError"),
    ],
)
def test_a_file_that_does_not_import_says_why_each_time(file: Path, source: str, said: str) -> None:
    file.write_text(source)
    for _ in range(2):
        with pytest.raises(InputError, match=rf"my file\.py cannot be imported: {said}") as caught:
            find_extension(f"{file}:first", Kind.RULE)
        assert "python -P" in str(caught.value.hint)


def test_the_hint_fails_the_same_way_for_a_file_that_lies_beside(file: Path) -> None:
    (file.parent / "beside_it.py").write_text("")
    file.write_text("import beside_it\ndef first(): return 0\n")
    with pytest.raises(InputError, match="beside_it"):
        find_extension(f"{file}:first", Kind.RULE)
    assert subprocess.run([sys.executable, "-P", str(file)], capture_output=True).returncode == 1


def test_a_files_fingerprint_is_of_its_content(file: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.py"
    moved.write_bytes(file.read_bytes())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert extension_fingerprint(f"{file}:first", Kind.RULE) == digest
    assert extension_fingerprint(f"{moved}:second", Kind.REWARD) == digest
    moved.write_text("# other\n")
    assert extension_fingerprint(f"{moved}:first", Kind.RULE) != digest


def test_a_packages_function_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points = group("rlfr.rules", ["brief = shortrules:short"]) + group("rlfr.rewards", ["paid = shortrules:pay"])
    install(monkeypatch, tmp_path, "shortrules", entry_points, "def short(f): return 7\ndef pay(i): return [1]\n")
    assert installed_names(Kind.RULE) == ["brief"]
    assert installed_names(Kind.REWARD) == ["paid"]
    brief = find_extension("brief", Kind.RULE)
    assert brief is not None
    assert brief(None) == 7
    assert find_extension("brief", Kind.REWARD) is None
    assert find_extension("shortrules", Kind.RULE) is None
    assert extension_fingerprint("brief", Kind.RULE) == "shortrules 1.2"
    assert extension_fingerprint("other", Kind.RULE) is None


def test_a_name_of_two_packages_is_refused_and_both_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("rules_b", "rules_a"):
        install(monkeypatch, tmp_path, package, group("rlfr.rules", [f"brief = {package}:short"]), "short = len\n")
    with pytest.raises(ConfigError, match=r"a rule 'brief': rules_a 1\.2, rules_b 1\.2") as caught:
        find_extension("brief", Kind.RULE)
    assert "uninstall" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("broken_rules:gone", "AttributeError"),
        ("no_such_module:short", "ModuleNotFoundError"),
        ("broken_rules:limit", "is no function: broken_rules:limit is 5"),
    ],
)
def test_a_broken_entry_point_names_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, said: str
) -> None:
    install(monkeypatch, tmp_path, "broken_rules", group("rlfr.rules", [f"brief = {target}"]), "limit = 5\n", "0.3")
    with pytest.raises(InputError, match=r"the rule 'brief' of the package broken_rules 0\.3") as caught:
        find_extension("brief", Kind.RULE)
    assert said in caught.value.message
    assert caught.value.hint


def test_a_hidden_name_is_said_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert warning_if_hidden("correct", Kind.RULE) is None
    install(monkeypatch, tmp_path, "hiders", group("rlfr.rules", ["correct = hiders:none"]))
    said = warning_if_hidden("correct", Kind.RULE)
    assert said == "correct is the rule of rlfr itself; the one of that name in hiders 1.2 is not used"
    assert warning_if_hidden("correct", Kind.REWARD) is None


@pytest.mark.parametrize("value", [True, 1, 1.0, np.float32(1), np.bool_(True), np.ones(()), torch.tensor(1.0)])
def test_numbers_of_every_kind(value: object) -> None:
    assert finite_number(value) == 1.0
    assert type(finite_number(value)) is float


@pytest.mark.parametrize(
    "value", [None, "1", b"1", math.nan, -math.inf, 1j, [1.0], 10**400, np.ones(2), torch.ones(2), abs]
)
def test_what_is_no_finite_number(value: object) -> None:
    assert finite_number(value) is None


def test_the_files_of_the_page_on_extending_do_what_it_says(repository: Path, tmp_path: Path) -> None:
    page = (repository / "docs" / "extending.md").read_text(encoding="utf-8")
    sources = re.findall(r"`(my_\w+\.py)`:\n\n```python\n(.*?)```", page, re.DOTALL)
    assert [name for name, _ in sources] == ["my_reward.py", "my_rules.py"]
    for name, source in sources:
        (tmp_path / name).write_text(source)
    pay = load_reward(f"{tmp_path}/my_reward.py:short_answers")
    grades = [(Grade.CORRECT, "stop"), (Grade.CORRECT, "length"), (Grade.WRONG, "stop")]
    assert pay([RewardInput("p", ("1",), "r" * 800, reason, grade) for grade, reason in grades]) == [0.9, 0, 0]
    names = [f"{tmp_path}/my_rules.py:{rule}" for rule in ("checks_itself", "surprising", "max_words=2")]
    rules = load_rules(names, "--accept")
    facts = ResponseFacts(True, True, 1.0, 3, 0.5, response="I check")
    texts = ["I check", "I guess", "I check it"]
    assert [rules.response_weight(replace(facts, response=text)) for text in texts] == [2, 1, 0]
    assert rules.response_weight(replace(facts, accepted=False)) == 0
    logprobs = torch.tensor([0.6, 0.4]).log()
    assert rules.token_weights(TokenFacts(torch.ones(2), logprobs)).tolist() == [0, 1]


def test_the_entry_points_of_the_page_on_extending_are_found(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (repository / "docs" / "extending.md").read_text(encoding="utf-8")
    toml = re.search(r"```toml\n(.*?)```", page, re.DOTALL)
    assert toml is not None
    groups = tomllib.loads(toml[1])["project"]["entry-points"]
    entry_points = "".join(group(name, [f"{k} = {v}" for k, v in lines.items()]) for name, lines in groups.items())
    install(monkeypatch, tmp_path, "my_package", entry_points)
    assert installed_names(Kind.REWARD) == ["short-answers"]
    assert installed_names(Kind.RULE) == ["max-words", "surprising"]


@pytest.mark.parametrize(("facts", "named"), [(ResponseFacts, 9), (TokenFacts, 2), (RewardInput, 5)])
def test_the_page_on_extending_names_every_fact(repository: Path, facts: type, named: int) -> None:
    page = (repository / "docs" / "extending.md").read_text(encoding="utf-8")
    names = [field.name for field in fields(facts)]
    assert len(names) == named
    assert [name for name in names if f"`{name}`" not in page] == []
