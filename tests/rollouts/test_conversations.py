"""Conversations: thoughts, tools, and where the student's last turn ends."""

import json

import pytest
from importing import CHAT, assistant, encoded, imported, refused, user, write_lines
from small_tokenizers import CHAT_TEMPLATE, make_tokenizer

THINKING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content.strip('\\n') }}\n</think>\n\n"
    "{% endif %}{{ m.content.lstrip('\\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen3 shows the turns after the last of the user's."""
FORGETFUL_TEMPLATE = THINKING_TEMPLATE.replace("{% if m.reasoning_content %}", "{% if false %}")
OBJECTS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %} {{ tool.function.name }}"
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call {{ call.function.name }}"
    "{% for name, value in call.function.arguments.items() %} {{ name }}={{ value }}{% endfor %}>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen3-Coder iterates over the arguments, which must be an object."""
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
THINKING = make_tokenizer(THINKING_TEMPLATE)


def response(finish_reason="stop", **message):
    choice = {"message": {"role": "assistant", **message}, "finish_reason": finish_reason}
    return {"choices": [choice], "messages": [user("1+1?")]}


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_a_thought_is_shown_whatever_the_server_calls_it(tmp_path, name):
    path = write_lines(tmp_path / "r.jsonl", [response(content="2", **{name: "1+1=2"})])
    (row,), report = imported("openai", path, tokenizer=THINKING)
    assert row["response_text"] == "<think>\n1+1=2\n</think>\n\n2<|im_end|>"
    assert (row["finish_reason"], report.thoughts_dropped, report.ends_lost) == ("stop", 0, 0)


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_a_thought_that_was_cut_off_is_not_closed(tmp_path, name, content):
    row = response("length", content=content, **{name: "1+1 is"})
    (row,), report = imported("vllm", write_lines(tmp_path / "r.jsonl", [row]), tokenizer=THINKING)
    assert row["response_text"] == "<think>\n1+1 is"
    assert row["response_token_ids"] == encoded("<think>\n1+1 is", THINKING)
    assert (row["finish_reason"], report.ends_lost, report.ends_unknown) == ("length", 0, 0)


def test_an_answer_that_was_cut_off_has_no_end(tmp_path):
    row = response("length", content="So 1+1", reasoning="Add.")
    (row,), _ = imported("vllm", write_lines(tmp_path / "r.jsonl", [row]), tokenizer=THINKING)
    assert row["response_text"] == "<think>\nAdd.\n</think>\n\nSo 1+1"


def test_a_tool_call_that_was_cut_off_is_refused(tmp_path):
    call = {"function": {"name": "add", "arguments": '{"a": 1'}}
    path = write_lines(tmp_path / "r.jsonl", [response("length", content="", tool_calls=[call])])
    refused("line 1: a tool call that was cut off cannot be rendered", "openai", path)


def test_thoughts_that_the_template_drops_are_counted_and_warned_about(tmp_path):
    messages = [user("a"), assistant("b", reasoning_content="hm"), user("c"), assistant("d")]
    path = write_lines(tmp_path / "c.jsonl", [{"messages": messages}, {"messages": messages[2:]}])
    tokenizer = make_tokenizer(FORGETFUL_TEMPLATE)
    rows, report = imported("chat", path, tokenizer=tokenizer, all_turns=True)
    assert rows[0]["response_text"].startswith("b<|im_end|>")
    assert report.thoughts_dropped == 1
    assert any("the chat template does not show" in text for text in report.warnings())
    assert imported("chat", path, tokenizer=THINKING, all_turns=True)[1].thoughts_dropped == 0
    # nothing of a thought that was cut off would be left
    cut = write_lines(tmp_path / "r.jsonl", [response("length", content=None, reasoning="hm")])
    refused("line 1: the chat template does not show", "openai", cut, tokenizer=tokenizer)


def test_a_thought_inside_the_content_that_the_template_drops_is_counted(tmp_path):
    splits = CHAT_TEMPLATE.replace(
        "{{ message.content }}{% for call", "{{ message.content.split('</think>')[-1] }}{% for call"
    )
    path = write_lines(
        tmp_path / "c.jsonl", [{"messages": [user("a"), assistant("<think>hm</think>b")]}]
    )
    (row,), report = imported("chat", path, tokenizer=make_tokenizer(splits))
    assert (row["response_text"], report.thoughts_dropped) == ("b<|im_end|>", 1)


def test_a_thought_without_a_template_to_show_it_is_refused(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [response(content="2", reasoning="hm")])
    refused(
        "line 1: the response is a list of messages, but the student has no chat template",
        "openai",
        path,
        tokenizer=make_tokenizer(None),
    )


def test_arguments_as_json_text_reach_the_template_as_an_object(tmp_path):
    tokenizer = make_tokenizer(OBJECTS_TEMPLATE)
    texts = ['{"a": 12, "b": 34}', {"a": 12, "b": 34}]
    rows = [
        response(
            "tool_calls",
            content=None,
            tool_calls=[{"function": {"name": "add", "arguments": text}}],
        )
        | {"tools": TOOLS}
        for text in texts
    ]
    found, report = imported("openai", write_lines(tmp_path / "r.jsonl", rows), tokenizer=tokenizer)
    assert [row["response_text"] for row in found] == ["<call add a=12 b=34><|im_end|>"] * 2
    assert all("Tools: add" in row["prompt_text"] for row in found)
    assert [json.loads(row["tools"]) for row in found] == [TOOLS] * 2
    assert [row["finish_reason"] for row in found] == ["stop"] * 2
    assert report.notes == []


def test_arguments_that_are_no_json_stay_as_the_model_wrote_them(tmp_path):
    call = {"function": {"name": "add", "arguments": '{"a": 1'}}
    path = write_lines(
        tmp_path / "r.jsonl", [response("tool_calls", content="", tool_calls=[call])]
    )
    (row,), _ = imported("openai", path)
    assert '"arguments": "{\\"a\\": 1"' in row["response_text"]


def test_tools_that_the_template_does_not_show_are_remarked_on(tmp_path):
    row = {"messages": [user("a"), assistant("b")], "tools": json.dumps(TOOLS)}
    (found,), report = imported("chat", write_lines(tmp_path / "c.jsonl", [row]))
    assert json.loads(found["tools"]) == TOOLS
    assert any("does not show tools" in note for note in report.notes)


def test_a_trl_conversation_that_was_cut_off_gains_no_end(tmp_path):
    import polars as pl

    frame = pl.DataFrame(
        {
            "step": [1, 1],
            "prompt": [[user("a")]] * 2,
            "completion": [[assistant("It is ")], [assistant("It is 46.")]],
        }
    )
    frame.write_parquet(tmp_path / "completions_00001.parquet")
    rows, report = imported("trl", tmp_path)
    assert [row["response_text"] for row in rows] == ["It is ", "It is 46."]
    assert all(all(row["loss_mask"]) for row in rows)
    assert report.ends_unknown == 2
    assert any("come without the token that ended them" in text for text in report.warnings())


def test_lm_evals_null_is_an_empty_rollout_that_is_counted(tmp_path):
    row = {
        "doc_id": 0,
        "arguments": {"gen_args_0": {"arg_0": "1+1=", "arg_1": {}}},
        "resps": [[None]],
        "target": "2",
    }
    (found,), report = imported("lm-eval", write_lines(tmp_path / "samples_x.jsonl", [row]))
    assert (found["response_text"], found["response_token_ids"]) == ("", [])
    assert report.empty_responses == 1
    assert CHAT.decode(found["prompt_token_ids"]) == "1+1="
