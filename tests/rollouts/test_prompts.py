"""Prompts: files and hub datasets of them."""

import json
import subprocess
import sys

import polars as pl
import pytest
from shared_data import shared_file

from tip_analysis.core.errors import OptionError, PromptFileError
from tip_analysis.rollouts.prompts import read_prompts


def write_lines(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path


def user(text):
    return {"role": "user", "content": text}


# --- files
# --------------------------------------------------------------------------------------------------


def test_jsonl_of_problems(tmp_path):
    path = write_lines(
        tmp_path / "p.jsonl",
        [
            {"id": "a", "problem": "1+1?", "answer": "2", "solution": "Two.", "level": 3},
            "",
            {"problem": "2+2?", "answer": 4},
        ],
    )
    first, second = read_prompts(path)
    assert (first.id, first.problem, first.answer, first.solution, first.metadata) == (
        "a",
        "1+1?",
        "2",
        "Two.",
        {"level": 3},
    )
    assert (second.id, second.answer, second.solution, second.messages) == ("p-1", "4", None, None)


def test_a_byte_order_mark_crlf_and_line_separators_inside_strings(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes('\ufeff{"problem": "a\u2028b"}\r\n{"problem": "c"}'.encode())
    assert [prompt.problem for prompt in read_prompts(path)] == ["a\u2028b", "c"]


def test_parquet_of_problems_with_null_columns(tmp_path):
    frame = pl.DataFrame(
        {
            "id": [7, 8],
            "problem": ["1+1?", "2+2?"],
            "answer": ["2", None],
            "solution": [None, "Four."],
        }
    )
    frame.write_parquet(tmp_path / "p.parquet")
    first, second = read_prompts(tmp_path / "p.parquet")
    assert (first.id, first.answer, first.solution) == ("7", "2", None)
    assert (second.id, second.answer, second.solution) == ("8", None, "Four.")


def test_verl_prompt_parquet(tmp_path):
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"What is {i}+{i}?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            "extra_info": {"index": i, "split": "train"},
        }
        for i in range(3)
    ]
    pl.DataFrame(rows).write_parquet(tmp_path / "train.parquet")
    prompts = read_prompts(tmp_path / "train.parquet", limit=2)
    assert [p.answer for p in prompts] == ["0", "2"]
    assert prompts[1].messages == (user("What is 1+1?"),)
    assert prompts[1].metadata["extra_info"] == {"index": 1, "split": "train"}


def test_messages_keep_their_turns_and_join_text_parts(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Add "}, {"type": "text", "text": "1 and 2."}],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "3", "name": "add"},
    ]
    path = write_lines(tmp_path / "p.jsonl", [{"messages": messages}])
    (prompt,) = read_prompts(path)
    assert [m["role"] for m in prompt.messages] == ["system", "user", "assistant", "tool"]
    assert prompt.messages[1]["content"] == "Add 1 and 2."
    assert prompt.messages[2]["content"] == ""
    assert prompt.messages[2]["tool_calls"][0]["function"]["name"] == "add"
    assert prompt.messages[3]["name"] == "add"


def test_a_problem_goes_before_messages_that_hold_its_solution(tmp_path):
    row = {"problem": "1+1?", "messages": [user("1+1?"), {"role": "assistant", "content": "2"}]}
    assert read_prompts(write_lines(tmp_path / "p.jsonl", [row]))[0].problem == "1+1?"


def test_limit_does_not_look_further(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"problem": "a"}, {"problem": "b"}, "{broken"])
    assert len(read_prompts(path, limit=2)) == 2
    with pytest.raises(OptionError, match="limit: expected at least 1, found 0"):
        read_prompts(path, limit=0)


BAD_ROWS = {
    "broken JSON": ('{"problem": "a"', r"p\.jsonl, line 2: broken JSON \(Expecting"),
    "no object": ("[1, 2]", "line 2: expected a JSON object, found a list"),
    "no field": (
        {"question": "a", "id": "x"},
        "line 2: expected one of the fields problem, prompt, messages; found question, id",
    ),
    "null field": (
        {"problem": None},
        "line 2: expected one of the fields problem, prompt, messages; found none",
    ),
    "blank": ({"problem": " \n"}, "line 2: the field 'problem' is blank"),
    "number": (
        {"problem": 3},
        "line 2: problem: expected a list of messages {role, content}, found a number",
    ),
    "messages text": (
        {"messages": "hello"},
        "line 2: messages: expected a list of messages {role, content}, found a string",
    ),
    "no messages": (
        {"messages": []},
        "line 2: messages: expected a list of messages {role, content}, found an empty list",
    ),
    "no role": (
        {"messages": [{"content": "a"}]},
        r"line 2: messages\[0\]: expected a message {role, content}, found {'content",
    ),
    "no content": (
        {"messages": [{"role": "user"}]},
        r"line 2: messages\[0\]: the message of the user has no content",
    ),
    "bad content": (
        {"messages": [{"role": "user", "content": 3}]},
        r"messages\[0\]: content: expected a string or a list of parts",
    ),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        r"messages\[0\]: content: only text parts can be read, found a part of the type 'image'",
    ),
    "assistant last": (
        {"messages": [user("a"), {"role": "assistant", "content": "b"}]},
        "line 2: the conversation ends with the assistant's turn",
    ),
    "answer list": (
        {"problem": "a", "answer": ["1", "2"]},
        "line 2: answer: expected a string or a number, found a list",
    ),
    "answer bool": (
        {"problem": "a", "answer": True},
        "line 2: answer: expected a string or a number, found a boolean",
    ),
    "answer nan": (
        '{"problem": "a", "answer": NaN}',
        "line 2: answer: expected a string or a finite number, found nan",
    ),
    "truth object": (
        {"prompt": [user("a")], "reward_model": {"ground_truth": {"x": 1}}},
        "line 2: reward_model.ground_truth: expected a string or a number, found an object",
    ),
    "solution": (
        {"problem": "a", "solution": 3},
        "line 2: solution: expected a string, found a number",
    ),
    "id": ({"problem": "a", "id": 1.5}, "line 2: id: expected a string or an integer, found 1.5"),
    "id bool": (
        {"problem": "a", "id": True},
        "line 2: id: expected a string or an integer, found True",
    ),
    "duplicate id": (
        {"problem": "b", "id": "x"},
        r"line 2: the id 'x' occurs twice \(first in .*p\.jsonl, line 1\)",
    ),
    "deep": ("[" * 200_000, "line 2: JSON that is nested too deeply|line 2: broken JSON"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, name):
    row, message = BAD_ROWS[name]
    path = write_lines(tmp_path / "p.jsonl", [{"problem": "a", "id": "x"}, row])
    with pytest.raises(PromptFileError, match=message) as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(PromptFileError, match=r"gone\.jsonl: no such file"):
        read_prompts(tmp_path / "gone.jsonl")
    with pytest.raises(PromptFileError, match=r"expected a file .* found a folder"):
        read_prompts(tmp_path)
    with pytest.raises(PromptFileError, match=r"holds no prompt"):
        read_prompts(write_lines(tmp_path / "empty.jsonl", ["", " "]))
    with pytest.raises(
        PromptFileError,
        match=r"p\.csv: expected one of the extensions \.jsonl.*found the extension '\.csv'",
    ):
        read_prompts(write_lines(tmp_path / "p.csv", ["problem"]))
    with pytest.raises(PromptFileError, match="a pickle can run any code"):
        read_prompts(write_lines(tmp_path / "p.pt", ["x"]))
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "a"}\n{"problem": "\xe9"}\n')
    with pytest.raises(PromptFileError, match="line 2: text that is not UTF-8"):
        read_prompts(tmp_path / "latin.jsonl")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(
        PromptFileError, match=r"p\.parquet: not a Parquet file that can be read"
    ) as caught:
        read_prompts(tmp_path / "p.parquet")
    assert "\n" not in str(caught.value)


def test_a_bad_parquet_row_is_named(tmp_path):
    pl.DataFrame({"id": ["a", "a"], "problem": ["x", "y"]}).write_parquet(tmp_path / "p.parquet")
    with pytest.raises(
        PromptFileError, match=r"p\.parquet, row 1: the id 'a' occurs twice \(first in .*row 0\)"
    ):
        read_prompts(tmp_path / "p.parquet")


class FakeHub:
    """Stands in for `datasets.load_dataset`."""

    def __init__(self, splits):
        self.splits, self.calls = splits, []

    def __call__(self, name, config, *, split):
        self.calls.append((name, config, split))
        if name == "nobody/nothing":
            raise FileNotFoundError("Dataset 'nobody/nothing' doesn't exist\nsecond line")
        return self.splits if split is None else self.splits[split]


def test_hub_datasets(monkeypatch, tmp_path):
    import datasets

    monkeypatch.chdir(tmp_path)
    rows = [{"problem": "1+1?", "answer": "2", "solution": None}]
    hub = FakeHub({"test": rows})
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert read_prompts("someone/MATH-500")[0].id == "MATH-500-0"
    assert read_prompts("someone/MATH-500:test")[0].answer == "2"
    read_prompts("someone/MATH-500:main:test")
    assert hub.calls == [
        ("someone/MATH-500", None, None),
        ("someone/MATH-500", None, "test"),
        ("someone/MATH-500", "main", "test"),
    ]
    hub.splits = {"train": rows, "test": rows}
    with pytest.raises(
        PromptFileError, match="choose a split, as in someone/x:train; it has train, test"
    ):
        read_prompts("someone/x")
    with pytest.raises(
        PromptFileError,
        match="'nobody/nothing' is no file here and could not be loaded as a hub dataset",
    ) as caught:
        read_prompts("nobody/nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(PromptFileError, match=r"problems\.jsonl: no such file"):
        read_prompts("some/problems.jsonl")
    with pytest.raises(PromptFileError, match="no such file"):
        read_prompts("/no/such/place")


def test_reading_prompts_needs_neither_torch_nor_transformers():
    code = (
        "import sys, tip_analysis.rollouts.prompts; print([m for m in ('torch', 'transformers',"
        " 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.shared
def test_the_problem_files_can_be_read():
    folder = shared_file("gsm8k_train_1k.jsonl").parent
    files = sorted(folder.glob("*.jsonl"))
    assert files, f"no problem file in {folder}"
    for path in files:
        prompts = read_prompts(path)
        assert all(prompt.problem and prompt.answer for prompt in prompts)
