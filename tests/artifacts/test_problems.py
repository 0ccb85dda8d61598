import csv
import hashlib
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlfr_cli.artifacts.problems import read_problems
from rlfr_cli.errors import ConfigError, InputError, MissingInputError

ROWS = [{"problem": "1+1?", "answer": "2"}, {"problem": "2+2, é?", "answer": " 4 "}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_arrow(path, new_writer):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, new_writer(file, table.schema) as writer:
        writer.write_table(table)


def write(folder, kind):
    path = folder / f"p.{kind.split('-')[0]}"
    if kind == "jsonl":
        write_jsonl(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "json-columns":
        path.write_text(json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}))
    elif kind == "json-lines":
        write_jsonl(path, ROWS)
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["problem", "answer"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "arrow":
        write_arrow(path, pa.ipc.new_file)
    else:
        write_arrow(path, pa.ipc.new_stream)
    return path


@pytest.mark.parametrize(
    "kind", ["jsonl", "json", "json-columns", "json-lines", "csv", "parquet", "arrow", "arrow-stream"]
)
def test_formats(tmp_path, kind):
    path = write(tmp_path, kind)
    found = read_problems(path)
    assert [(p.problem_id, p.problem, p.answers, p.row) for p in found.problems] == [
        ("0", "1+1?", ("2",), 0),
        ("1", "2+2, é?", ("4",), 1),
    ]
    assert found.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.name == str(path)


def test_a_folder_of_files_is_read_in_order(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ROWS[1:])
    write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    assert [p.problem for p in read_problems(tmp_path).problems] == ["1+1?", "2+2, é?"]


def test_saved_datasets(tmp_path):
    dataset = datasets.Dataset.from_list([{**row, "image": b"x"} for row in ROWS])
    dataset.save_to_disk(tmp_path / "one")
    one = read_problems(tmp_path / "one")
    assert [p.answers for p in one.problems] == [("2",), ("4",)]
    datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "two")
    test = read_problems(tmp_path / "two", split="test")
    assert [p.problem for p in test.problems] == ["2+2, é?"]
    assert read_problems(tmp_path / "two", split="train").fingerprint == one.fingerprint != test.fingerprint
    with pytest.raises(ConfigError, match=r"needs a split; it has train, test"):
        read_problems(tmp_path / "two")
    with pytest.raises(ConfigError, match=r"has no split 'dev'"):
        read_problems(tmp_path / "two", split="dev")


def test_a_dataset_by_name(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_problems("openai/gsm8k:main", split="train").problems) == 2
    assert asked == [("openai/gsm8k", "main", "train")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match="division by zero") as error:
        read_problems("openai/gsm8k")
    assert "needs the network" in error.value.hint


def test_limit_keeps_the_fingerprint(tmp_path):
    path = write(tmp_path, "jsonl")
    limited = read_problems(path, limit=1)
    assert len(limited.problems) == 1
    assert limited.fingerprint == read_problems(path).fingerprint


@pytest.mark.parametrize(
    ("answer", "answers"),
    [
        (142.0, ("142",)),
        (0.5, ("0.5",)),
        (-3, ("-3",)),
        (10**30, (str(10**30),)),
        ("142.0\n", ("142.0",)),
        (["9.6\n", 9], ("9.6", "9")),
    ],
)
def test_answers(tmp_path, answer, answers):
    path = write_jsonl(tmp_path / "p.jsonl", [{"problem": "x", "answer": answer}])
    assert read_problems(path).problems[0].answers == answers


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "x", "answer": None}, "'answer' is null"),
        ({"problem": "x", "answer": True}, "'answer' is bool"),
        ({"problem": "x", "answer": {"a": 1}}, "'answer' is dict"),
        ({"problem": "x", "answer": []}, "empty list"),
        ({"problem": "x", "answer": ["1", None]}, "'answer' is null"),
        ({"problem": "x", "answer": " "}, "'answer' is empty"),
        ({"problem": "x", "answer": float("nan")}, "not a finite number"),
        ({"problem": " ", "answer": "1"}, "'problem' is empty"),
        ({"problem": 5, "answer": "1"}, "'problem' is int, not text"),
        ({"problem": None, "answer": "1"}, "'problem' is null"),
        ({"problems": "x", "answer": "1"}, "no column 'problem'; it has problems, answer"),
        ([1], "is a list, not an object"),
    ],
)
def test_a_bad_row_is_one_error_with_its_line(tmp_path, row, message):
    path = write_jsonl(tmp_path / "p.jsonl", [ROWS[0], row])
    with pytest.raises(InputError, match=message) as error:
        read_problems(path)
    assert f"{path} line 2" in error.value.message


def test_a_close_column_name_is_the_hint(tmp_path):
    with pytest.raises(InputError) as error:
        read_problems(write(tmp_path, "jsonl"), answer_column="answers")
    assert error.value.hint == "did you mean 'answer'?"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b"", "has no rows"),
        ("p.json", b"", "has no rows"),
        ("p.csv", b"", "has no rows"),
        ("p.csv", b"problem,answer\n", "has no rows"),
        ("p.jsonl", b'{"problem": "x", "answer": "1"}\n{"problem": "x", ', "line 2 is not JSON"),
        ("p.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("p.json", b'{"a": [1, 2], "b": [1]}', "different lengths"),
        ("p.json", b"[{", "is not JSON"),
        ("p.json", b"5", "holds one int"),
        ("p.jsonl", b'{"problem": "caf\xe9", "answer": "1"}', "line 1 is not UTF-8"),
        ("p.csv", b"problem,answer\ncaf\xe9,1\n", "not UTF-8: it holds the byte 0xe9"),
        ("p.csv", b"problem,answer\na,b,c\n", "line 2 has 3 fields, not 2"),
        ("p.csv", b"problem,answer\na\n", "line 2 has 1 fields, not 2"),
        ("p.parquet", b"PAR1 cut", "cannot be read"),
        ("p.arrow", b"ARROW1 cut", "cannot be read"),
        ("p.arrow", b"", "cannot be read"),
        ("p.txt", b"x", "does not end in one of"),
    ],
)
def test_a_bad_file_is_one_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_problems(tmp_path / name)


def test_what_is_not_there(tmp_path):
    with pytest.raises(MissingInputError, match="there is no file or folder"):
        read_problems(tmp_path / "none.jsonl")
    with pytest.raises(MissingInputError):
        read_problems("none/problems.jsonl")
    with pytest.raises(InputError, match="holds no file"):
        read_problems(tmp_path)
    with pytest.raises(ConfigError, match="no splits"):
        read_problems(write(tmp_path, "jsonl"), split="train")
    with pytest.raises(ConfigError, match="limit of 0"):
        read_problems(write(tmp_path, "jsonl"), limit=0)


def test_a_byte_order_mark_and_empty_lines_are_accepted(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\n\n" + json.dumps(ROWS[1]).encode())
    assert len(read_problems(path).problems) == 2
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbfproblem,answer\nx,033\n")
    assert read_problems(tmp_path / "p.csv").problems[0].answers == ("033",)


def test_ids(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{**ROWS[0], "id": 7}, {**ROWS[1], "id": "b"}])
    assert [p.problem_id for p in read_problems(path, id_column="id").problems] == ["7", "b"]
    write_jsonl(path, [{**ROWS[0], "id": 7}, {**ROWS[1], "id": "7"}])
    with pytest.raises(InputError, match=r"line 2 has the id '7' of .* line 1"):
        read_problems(path, id_column="id")
    write_jsonl(path, [{**ROWS[0], "id": True}])
    with pytest.raises(InputError, match="'id' is bool"):
        read_problems(path, id_column="id")


def test_responses_without_answers(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"problem": "x", "solution": "so 1"}])
    (problem,) = read_problems(path, response_column="solution", need_answer=False).problems
    assert (problem.response, problem.answers, problem.messages) == ("so 1", (), None)
    with pytest.raises(InputError, match="no column 'answer'"):
        read_problems(path, response_column="solution")


def conversation(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def test_messages(tmp_path):
    turns = conversation("s:be brief", "u:1+1?", "a:2", "u:2+2?", "a:4")
    path = write_jsonl(tmp_path / "p.jsonl", [{"messages": turns}, {"messages": turns[:2]}])
    first, second = read_problems(path, messages_column="messages", need_answer=False).problems
    assert (first.problem, first.response, first.messages) == ("2+2?", "4", turns[:4])
    assert (second.problem, second.response, second.messages) == ("1+1?", None, turns[:2])


def test_message_parts(tmp_path):
    parts = [{"role": "user", "content": [{"type": "text", "text": "1+1"}, {"type": "text", "text": "?"}]}]
    path = write_jsonl(tmp_path / "p.jsonl", [{"messages": parts}])
    assert read_problems(path, messages_column="messages", need_answer=False).problems[0].problem == "1+1?"
    write_jsonl(path, [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}])
    with pytest.raises(InputError, match="'content' is list"):
        read_problems(path, messages_column="messages", need_answer=False)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("text", "'messages' is str"),
        ([], "no user message"),
        (conversation("a:4"), "no user message"),
        ([{"content": "x"}], "'role' is null"),
        (conversation("u:1?", "a: "), "'content' is empty"),
    ],
)
def test_bad_messages(tmp_path, messages, message):
    path = write_jsonl(tmp_path / "p.jsonl", [{"messages": messages}])
    with pytest.raises(InputError, match=message):
        read_problems(path, messages_column="messages", need_answer=False)


def test_the_problem_sets_are_read(shared):
    sets = {path.stem: read_problems(path) for path in sorted((shared / "data").glob("*.jsonl"))}
    assert len(sets["math500"].problems) == 500
    assert len(sets["gsm8k_train"].problems) == 7473
    assert sets["amc23"].problems[0].answers == ("142",)
    assert max(len(problem.answers) for problem in sets["minerva"].problems) > 1
