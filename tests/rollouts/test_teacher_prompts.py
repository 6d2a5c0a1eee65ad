"""What the teacher is shown: each rollout's own solution, and the tools of its prompt."""

import json
from types import SimpleNamespace

import polars as pl
from importing import assistant, imported, user, write_lines
from small_tokenizers import CHAT_TEMPLATE, make_tokenizer

from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.schema import RolloutTable
from tip_analysis.rollouts.encoded import encode_prompts
from tip_analysis.rollouts.prompts import read_prompts
from tip_analysis.rollouts.teacher_prompts import with_teacher_prompts

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHAT_TEMPLATE
)
TOKENIZER = make_tokenizer(TOOL_TEMPLATE)
MODEL = SimpleNamespace(tokenizer=TOKENIZER, name="tiny", vocab_size=420)


def shown_to_teacher(rows):
    frame = pl.DataFrame(rows, schema=polars_schema(RolloutTable))
    frame = with_teacher_prompts(frame, MODEL, "solution")
    return [TOKENIZER.decode(ids) for ids in frame["teacher_prompt_token_ids"]]


def test_two_rollouts_of_one_prompt_are_shown_each_its_own_solution(tmp_path):
    messages = [user("1+1?"), assistant("2")]
    rows = [
        {"messages": messages, "id": "p", "solution": "Count.", "answer": "2"},
        {"messages": messages, "id": "p", "solution": "Add."},
        {"messages": messages, "id": "p", "solution": "Count."},
    ]
    found, _ = imported("chat", write_lines(tmp_path / "c.jsonl", rows), tokenizer=TOKENIZER)
    assert {row["prompt_id"] for row in found} == {"p"}
    texts = shown_to_teacher(found)
    assert ["Count." in text for text in texts] == [True, False, True]
    assert ["Add." in text for text in texts] == [False, True, False]


def test_tools_reach_the_student_the_teacher_and_the_table(tmp_path):
    rows = [
        {"problem": "1+1?", "solution": "Add.", "tools": TOOLS},
        {"problem": "1+2?", "solution": "Add.", "tools": json.dumps(TOOLS)},
        {"problem": "1+3?", "solution": "Add.", "tools": []},
        {"problem": "1+4?", "solution": "Add."},
    ]
    prompts = read_prompts(write_lines(tmp_path / "p.jsonl", rows))
    encoded = encode_prompts(prompts, student=MODEL, teacher=MODEL, teacher_context="solution")
    assert ['"name": "add"' in one.shown.text for one in encoded] == [True, True, False, False]
    assert ['"name": "add"' in one.shown_to_teacher.text for one in encoded] == [
        True,
        True,
        False,
        False,
    ]
    path = write_lines(tmp_path / "t.jsonl", [row | {"response": "2"} for row in rows])
    found, _ = imported("text", path, tokenizer=TOKENIZER)
    assert [row["tools"] and json.loads(row["tools"]) for row in found] == [
        TOOLS,
        TOOLS,
        None,
        None,
    ]
    assert ['"name": "add"' in row["prompt_text"] for row in found] == [True, True, False, False]
    assert ['"name": "add"' in text for text in shown_to_teacher(found)] == [
        True,
        True,
        False,
        False,
    ]
