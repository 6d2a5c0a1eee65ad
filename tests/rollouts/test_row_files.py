"""Rows of files that are broken in the ways that files are, and what one bad row costs."""

import json

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from importing import imported, refused, user, write_lines

from tip_analysis.core.errors import ImportFormatError, PromptFileError
from tip_analysis.rollouts.importers.drafts import number
from tip_analysis.rollouts.prompts import read_prompts

GOOD = {"problem": "1+1?", "response": "2"}
BAD_LINES = {
    "brackets": ("[" * 100_000, "line 2: JSON that is nested"),
    "objects": ('{"a":' * 100_000, "line 2: JSON that is nested"),
    "not UTF-8": (b'{"problem": "\xff"}', "line 2: text that is not UTF-8"),
    "no object": ("[1]", "line 2: expected a JSON object, found a list"),
    "a null": ("null", "line 2: expected a JSON object, found null"),
    "broken": ('{"problem": ', "line 2: broken JSON"),
    "a large number": ('{"problem": ' + "9" * 5000 + "}", "line 2: broken JSON"),
    "no response": ('{"problem": "a"}', "line 2: expected the field 'response'"),
    "an infinite reward": (
        json.dumps(GOOD | {"reward": "inf"}),
        "line 2: reward: expected a finite",
    ),
    "Infinity": ('{"problem": "a", "response": "b", "reward": Infinity}', "line 2: reward"),
    "two rewards": (json.dumps(GOOD | {"reward": [1, 2]}), "line 2: reward: expected one for each"),
    "prompt of numbers": ('{"prompt": [1, 2], "response": "b"}', "line 2: prompt"),
    "prompt of texts": ('{"prompt": ["a", "b"], "response": "b"}', "line 2: prompt"),
    "tools": (json.dumps(GOOD | {"tools": "{"}), "line 2: tools: broken JSON"),
    "deep tools": (
        json.dumps(GOOD | {"tools": "[" * 100_000}),
        "line 2: tools: JSON that is nested",
    ),
}


@pytest.fixture(params=BAD_LINES)
def bad(request, tmp_path):
    line, message = BAD_LINES[request.param]
    good = json.dumps(GOOD).encode()
    path = tmp_path / "t.jsonl"
    path.write_bytes(
        b"\n".join([good, line if isinstance(line, bytes) else line.encode(), good, b""])
    )
    return path, message


def test_one_bad_row_is_named_or_left_out_and_counted(bad):
    path, message = bad
    refused(message, "text", path)
    rows, report = imported("text", path, on_bad_row="skip")
    assert [row["response_text"] for row in rows] == ["2", "2"]
    assert (report.skipped_rows, report.rows_read) == (1, 3)
    assert message.partition(":")[0] in report.skipped[0]
    assert any(
        "1 row(s) that could not be used were left out" in text for text in report.warnings()
    )


def test_a_file_of_bad_rows_only_is_refused_with_the_first(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", [{"a": 1}, {"a": 2}])
    refused("holds no rollout .* line 1: expected the field", "text", path, on_bad_row="skip")


def test_rows_that_the_table_refuses_or_that_repeat_an_id_are_named_and_skipped(tmp_path):
    ids = {"prompt_token_ids": [20], "response_token_ids": [30]}
    rows = [ids, ids | {"step": "x"}, ids | {"rollout_id": "a"}, ids | {"rollout_id": "a"}]
    path = write_lines(tmp_path / "n.jsonl", rows)
    refused("line 4: the rollout_id 'a' occurs twice", "native", path)
    found, report = imported("native", path, on_bad_row="skip")
    assert [row["rollout_id"] for row in found] == ["native-0/0", "a"]
    assert (report.skipped_rows, report.ids_exact) == (2, 2)
    assert "line 2: the rows do not fit the rollout table" in report.skipped[1]


def test_half_characters_are_named_or_left_out_and_whole_ones_read(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"problem": "\\ud83d\\ude00", "response": "whole"}\n'
        '{"problem": "a \\ud83d b", "response": "half"}\n'
        '{"problem": "a", "response": "b", "\\uD800": 1}\n'
    )
    refused("line 2: half of a surrogate pair", "text", path)
    (row,), report = imported("text", path, on_bad_row="skip")
    assert "😀" in row["prompt_text"]
    assert report.skipped_rows == 2
    with pytest.raises(PromptFileError, match="line 2: half of a surrogate pair"):
        read_prompts(path)
    assert len(read_prompts(path, on_bad_row="skip")) == 1


def test_text_with_a_replacement_character_has_lost_its_ids(tmp_path):
    rows = [GOOD, GOOD | {"response": "2 \ufffd"}, {"problem": "\ufffd?", "response": "2"}]
    _, report = imported("text", write_lines(tmp_path / "t.jsonl", rows))
    assert (report.texts_with_lost_characters, report.round_trip_mismatches) == (2, 2)
    assert any("2 of 3 rollouts have U+FFFD in their text" in text for text in report.warnings())


def test_parquet_text_that_is_no_text_names_its_row(tmp_path):
    texts = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    table = pa.table({"problem": texts, "response": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "t.parquet")
    refused("row 1: text that is not UTF-8", "text", tmp_path / "t.parquet")
    rows, report = imported("text", tmp_path / "t.parquet", on_bad_row="skip")
    assert [row["response_text"] for row in rows] == ["x", "z"]
    assert report.skipped_rows == 1


def test_a_prompt_may_be_json_text_of_messages(tmp_path):
    text = json.dumps([user("1+1?")])
    rows = [
        {"prompt": text, "response": "2"},
        {"messages": text, "response": "2"},
        {"prompt": "[1, 2] is a list", "response": "2"},
    ]
    path = write_lines(tmp_path / "t.jsonl", rows)
    found, _ = imported("text", path)
    assert [json.loads(row["messages"])[0]["content"] for row in found] == [
        "1+1?",
        "1+1?",
        "[1, 2] is a list",
    ]
    assert [prompt.messages is None for prompt in read_prompts(path)] == [False, False, True]
    pair = {"prompt": text, "completion": json.dumps([{"role": "assistant", "content": "2"}])}
    (found,), _ = imported("chat", write_lines(tmp_path / "c.jsonl", [pair]))
    assert found["response_text"] == "2<|im_end|>"


def test_an_answer_of_the_text_none_stays(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", [GOOD | {"answer": "None"}])
    assert imported("text", path)[0][0]["ground_truth"] == "None"
    row = {"messages": [user("a"), {"role": "assistant", "content": "b"}], "answer": "None"}
    path = write_lines(tmp_path / "c.jsonl", [row])
    assert imported("chat", path)[0][0]["ground_truth"] == "None"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("np.True_", 1.0), ("numpy.False_", 0.0), ("[1.0]", 1.0), ([1.0], 1.0), (["0.5"], 0.5),
        ("np.float64(0.5)", 0.5), ("tensor(0.25)", 0.25), ("tensor([0.25])", 0.25), (True, 1.0),
        ("tensor(1., device='cuda:0')", 1.0), ("None", None), ("nan", None), (None, None),
        ("np.float64(nan)", None), (float("nan"), None), ("1e-3", 1e-3), ("-2", -2.0),
    ],
)  # fmt: skip
def test_numbers_as_python_and_numpy_write_them(written, value):
    assert number(written, "here") == value


@pytest.mark.parametrize(
    "written", ["inf", "-inf", float("inf"), "np.float64(inf)", 10**400, "x", [1, 2], {}]
)
def test_no_finite_numbers(written):
    with pytest.raises(ImportFormatError, match=r"here: expected a (finite )?number, found"):
        number(written, "here")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_comes_back_however_it_is_wrapped(value):
    for text in (repr(value), f"np.float64({value!r})", f"[{value!r}]", f"tensor({value!r})"):
        assert number(text, "here") == value


def test_an_output_root_is_searched_at_any_depth_in_natural_order(tmp_path):
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}" / "dumps"
        folder.mkdir(parents=True)
        row = {"input": f"q{step}", "output": "a", "step": step, "score": 1.0}
        write_lines(folder / f"{step}.jsonl", [row])
    assert [row["step"] for row in imported("verl", tmp_path)[0]] == [2, 10]
    frame = pl.DataFrame({"step": [3], "prompt": ["a"], "completion": ["b"]})
    (tmp_path / "out" / "completions").mkdir(parents=True)
    frame.write_parquet(tmp_path / "out" / "completions" / "completions_00003.parquet")
    frame.rename({"step": "x"}).write_parquet(tmp_path / "out" / "other.parquet")
    assert [row["step"] for row in imported("trl", tmp_path)[0]] == [3]
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "README.md").write_text("text")
    write_lines(tmp_path / "given" / "a.jsonl", [GOOD])
    assert len(imported("text", tmp_path / "given")[0]) == 1


def test_prompts_of_a_completion_request_as_texts_and_ids(tmp_path):
    choices = [{"text": str(i), "index": i, "finish_reason": "length"} for i in range(4)]
    rows = [
        {"prompt": ["a", "b"], "n": 2, "choices": choices},
        {"prompt": [20, 21, 22], "choices": choices[:1]},
        {"prompt": [[20, 21], [22]], "choices": choices[:2]},
    ]
    found, report = imported("openai", write_lines(tmp_path / "r.jsonl", rows))
    assert [row["prompt_text"] for row in found[:4]] == ["a", "a", "b", "b"]
    assert [row["prompt_token_ids"] for row in found[4:]] == [[20, 21, 22], [20, 21], [22]]
    assert report.template_exact == 3
    bad = {"prompt": ["a", "b"], "choices": [choices[3]]}
    refused(
        "line 1: prompt: the choice of index 3 answers prompt 3, of which there are 2",
        "openai",
        write_lines(tmp_path / "r.jsonl", [bad]),
    )


TRL_ROWS = {
    "step": [1] * 8,
    "prompt": ["a"] * 4 + ["b"] * 4,
    "completion": list("cdefghij"),
    "accuracy": [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0],
    "length_seen": [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0],
    "count": [3, 1, 4, 1, 5, 9, 2, 6],
    "advantage": [0.5, -0.5, 0.5, -0.5, -0.75, 0.25, 0.25, 0.25],
}


def trl_file(tmp_path, **columns):
    path = tmp_path / "completions_00001.parquet"
    pl.DataFrame(TRL_ROWS | columns, strict=False).write_parquet(path)
    return path


def test_what_reward_functions_log_besides_is_no_reward(tmp_path):
    rows, report = imported("trl", trl_file(tmp_path))
    assert [row["reward"] for row in rows] == TRL_ROWS["accuracy"]
    assert any(
        "the reward is 'accuracy'" in note and "length_seen" in note for note in report.notes
    )
    # a weighted sum of two is neither of them
    rows, report = imported(
        "trl", trl_file(tmp_path, advantage=[1.0, -2.0, 3.0, -2.0, 0.0, 4.0, -4.0, 0.0])
    )
    assert {row["reward"] for row in rows} == {None}
    assert any("several to choose from: accuracy, length_seen" in note for note in report.notes)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_nulls_and_nan_alike_leave_trls_rewards_undecided(tmp_path, missing):
    other = [missing, 1.0] * 4
    path = trl_file(tmp_path, length_seen=other, advantage=[0.1, 0.2, 0.3, 0.4] * 2)
    rows, _ = imported("trl", path)
    assert {row["reward"] for row in rows} == {None}
    rows, _ = imported("trl", path, reward_key="length_seen")
    assert [row["reward"] for row in rows] == [None, 1.0] * 4
    assert {row["reward"] for row in imported("trl", path, reward_key="accuracy")[0]} == {0.0, 1.0}


def lighteval_row(**response):
    from importing import encoded

    shown = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    return {
        "doc": {"query": "1+1?", "id": "1", "task_name": "t"},
        "metric": {"em": 1.0},
        "model_response": {
            "input": shown,
            "input_tokens": encoded(shown),
            "text": ["2."],
            "output_tokens": [encoded("2.<|im_end|>")],
            "padded_tokens_count": 0,
        }
        | response,
    }


def lighteval_import(tmp_path, *rows, **options):
    path = tmp_path / "details_t_2026.parquet"
    pl.DataFrame(list(rows)).write_parquet(path)
    return imported("lighteval", path, **options)


def test_the_padding_of_lightevals_batches_is_taken_off(tmp_path):
    plain = lighteval_row()
    ids = plain["model_response"]["input_tokens"]
    pad = 0
    padded = lighteval_row(
        input_tokens=[pad] * 3 + ids,
        padded_tokens_count=3,
        output_tokens=[plain["model_response"]["output_tokens"][0] + [pad] * 5],
    )
    behind = lighteval_row(input_tokens=ids + [pad] * 2, padded_tokens_count=2)
    after_end = plain["model_response"]["output_tokens"][0]
    going_on = lighteval_row(output_tokens=[[*after_end, 30, 31]])
    rows, report = lighteval_import(tmp_path, plain, padded, behind, going_on)
    assert {tuple(row["prompt_token_ids"]) for row in rows} == {tuple(ids)}
    assert {row["response_text"] for row in rows} == {"2.<|im_end|>"}
    assert {row["finish_reason"] for row in rows} == {"stop"}
    assert (report.padding_removed, report.ids_exact, report.text_mismatches) == (3, 4, 0)
    # padding may be the very token that ended the response: the first of a run is kept
    ended = after_end[:-1] + [pad] * 4
    rows, _ = lighteval_import(tmp_path, lighteval_row(output_tokens=[ended]))
    assert rows[0]["response_token_ids"] == ended[: len(after_end)]


def test_padding_that_is_none_is_refused(tmp_path):
    row = lighteval_row(padded_tokens_count=2)
    with pytest.raises(
        ImportFormatError, match="row 0: 2 of the prompt's tokens are said to be padding"
    ):
        lighteval_import(tmp_path, row)


def test_lm_evals_remark_about_filters_is_true_of_repeats(tmp_path):
    row = {
        "doc_id": 0,
        "arguments": {"gen_args_0": {"arg_0": "1+1=", "arg_1": {}}},
        "resps": [["2", "3"]],
        "target": "2",
        "exact_match": 1.0,
    }
    rows = [row | {"filter": name} for name in ("strict", "loose")]
    found, report = imported("lm-eval", write_lines(tmp_path / "samples_x.jsonl", rows))
    assert [row["reward"] for row in found] == [None, None]
    assert not any("metrics are those of the filter" in note for note in report.notes)
    assert any("several samples together" in note for note in report.notes)
