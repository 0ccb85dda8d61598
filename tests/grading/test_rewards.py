import pytest

from fake_packages import group, install
from rlfr_cli.errors import ConfigError, InputError, MissingInputError
from rlfr_cli.grading.grades import Grade
from rlfr_cli.grading.rewards import RewardInput, is_accepted, load_reward


def reward_inputs(finish_reason: str) -> list[RewardInput]:
    return [RewardInput("p", ("1",), "r", finish_reason, grade) for grade in Grade]


def test_published():
    assert list(Grade) == ["correct", "wrong", "no_answer", "unparseable", "timeout", "ungraded"]
    assert load_reward("published")(reward_inputs("stop")) == [1, 0.5, 0, 0.5, 0, 0]
    assert load_reward("published")(reward_inputs("length")) == [0] * 6


def test_accuracy():
    assert load_reward("accuracy")(reward_inputs("stop")) == [1, 0, 0, 0, 0, 0]
    assert load_reward("accuracy")(reward_inputs("length")) == [0] * 6


def test_accepted_needs_a_correct_answer_and_its_own_end():
    assert is_accepted(Grade.CORRECT, "stop")
    assert is_accepted("correct", "stop")
    assert not is_accepted(Grade.CORRECT, "length")
    assert not is_accepted(Grade.WRONG, "stop")


@pytest.fixture
def reward_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import math\n"
        "def score(inputs): return [len(i.response) if i.grade == 'correct' else -1 for i in inputs]\n"
        "def short(inputs): return [1.0]\n"
        "def nan(inputs): return [math.nan for _ in inputs]\n"
        "def text(inputs): return ['much' for _ in inputs]\n"
        "def digits(inputs): return ['1' for _ in inputs]\n"
        "def one(inputs): return 1.0\n"
    )
    return path


def test_a_function_from_a_file(reward_file):
    assert load_reward(f"{reward_file}:score")(reward_inputs("stop")) == [1.0, -1.0, -1.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "gave 1 rewards for 6 responses"),
        ("nan", "gave nan for response 0"),
        ("text", "gave 'much'"),
        ("digits", "gave '1' for response 0"),
        ("one", "gave 1.0 for 6 responses"),
    ],
)
def test_bad_values_are_errors(reward_file, name, message):
    with pytest.raises(InputError, match=message) as error:
        load_reward(f"{reward_file}:{name}")(reward_inputs("stop"))
    assert "finite number" in error.value.hint


def test_bad_specs_are_errors(reward_file, tmp_path):
    with pytest.raises(ConfigError, match="no reward is called 'publishd'") as error:
        load_reward("publishd")
    assert error.value.hint == "did you mean published?"
    with pytest.raises(ConfigError, match="has no function 'scor'") as error:
        load_reward(f"{reward_file}:scor")
    assert error.value.hint.endswith("mine.py:score?")
    with pytest.raises(MissingInputError, match="there is no reward file"):
        load_reward(f"{tmp_path}/none.py:score")
    reward_file.write_text("import nothing_like_this")
    with pytest.raises(InputError, match="nothing_like_this"):
        load_reward(f"{reward_file}:score")


def test_a_reward_of_a_package_is_found_by_name_and_checked(tmp_path, monkeypatch):
    lines = ["lengths = paying:lengths", "nothing = paying:nothing", "accuracy = paying:nothing"]
    code = "def lengths(inputs): return [len(i.problem) for i in inputs]\ndef nothing(inputs): return []\n"
    install(monkeypatch, tmp_path, "paying", group("rlfr.rewards", lines), code)
    assert load_reward("lengths")(reward_inputs("stop")) == [1.0] * 6
    with pytest.raises(InputError, match="nothing gave 0 rewards for 6 responses"):
        load_reward("nothing")(reward_inputs("stop"))
    assert load_reward("accuracy")(reward_inputs("stop")) == [1, 0, 0, 0, 0, 0], "the built-in one wins"
    with pytest.raises(ConfigError, match="there are published, accuracy, lengths, nothing and") as error:
        load_reward("length")
    assert error.value.hint == "did you mean lengths?"
