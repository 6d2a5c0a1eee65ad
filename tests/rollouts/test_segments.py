"""Turns and segments of tokens, in the manner of several models' templates."""

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.schema import RolloutTable, TokenTable
from tip_analysis.rollouts.segments import (
    argument_spans,
    call_spans,
    label_segments,
    segment_turn,
    thought_spans,
    turn_starts,
    turns_of,
)


def segments(text, special=(), opened=""):
    """One letter a character: t(hink), a(nswer), c(all), o(ther)."""
    found = segment_turn(
        list(text), [place in special for place in range(len(text))], opened=opened
    )
    letters = {"think": "t", "answer": "a", "tool_call": "c", "other": "o"}
    return "".join(letters[str(segment)] for segment, _ in found)


def parts(text):
    letters = {None: ".", "name": "n", "argument": "a", "syntax": "s"}
    found = segment_turn(list(text), [False] * len(text))
    return "".join(letters[None if part is None else str(part)] for _, part in found)


def test_thought_call_and_answer_of_one_turn():
    text = '<think>hm</think>\n\n<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    call = text[text.index("<tool_call>") :]
    assert segments(text) == "t" * 17 + "oo" + "c" * len(call)
    assert segments("<think>hm</think>\n\n42") == "t" * 17 + "aaaa"
    assert segments("plain answer") == "a" * 12


def test_thoughts_that_a_template_opened_or_nobody_closed():
    assert segments("hm</think>yes", opened="<think>") == "t" * 10 + "aaa"
    assert segments("hm</think>yes") == "t" * 10 + "aaa"
    assert segments("a<think>hm") == "a" + "t" * 9


def test_a_call_within_a_thought_is_thought():
    text = "<think>say <tool_call>x</tool_call></think>ok"
    assert segments(text) == "t" * (len(text) - 2) + "aa"


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "parameters": {"a": 1}}',
        '<|python_tag|>{"name": "f", "parameters": {"a": 1}}',
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]',
        "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>",
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}',
    ],
)
def test_other_manners_of_calling(text):
    assert set(segments(text)) == {"c"}
    assert text[parts(text).index("n")] == "f"
    argument = "".join(c for c, part in zip(text, parts(text), strict=True) if part == "a")
    assert argument.startswith(('{"a": 1}', "<parameter=a>"))


def test_json_in_an_answer_is_no_call():
    assert set(segments('The answer is {"name": "f", "arguments": {}}.')) == {"a"}


def test_names_within_arguments_are_arguments():
    text = '<tool_call>{"name": "f", "arguments": {"name": "x}\\"", "b": [1]}}</tool_call>'
    found = parts(text)
    assert "".join(c for c, part in zip(text, found, strict=True) if part == "n") == "f"
    (span,) = argument_spans(text)
    assert text[span.start : span.end] == '{"name": "x}\\"", "b": [1]}'


def test_special_tokens_are_other_but_for_tags():
    texts, special = (
        ["<think>", "hm", "</think>", "yes", "<|im_end|>"],
        [True, False, True, False, True],
    )
    found = [str(segment) for segment, _ in segment_turn(texts, special)]
    assert found == ["think", "think", "think", "answer", "other"]


@given(st.lists(st.booleans(), max_size=30))
def test_turns_count_the_runs_that_the_student_wrote(mask):
    starts = turn_starts(mask)
    turns = turns_of(len(mask), starts)
    assert len(turns) == len(mask)
    count, before = -1, False
    for place, written in enumerate(mask):
        count += written and not before
        before = written
        assert turns[place] == max(count, 0)
    assert [mask[start] for start in starts] == [True] * len(starts)


@given(st.text(alphabet='<>/{}"think:, ol_cals', max_size=60))
def test_any_text_has_a_segment_for_each_token(text):
    assert len(segments(text)) == len(text)
    spans = thought_spans(text)
    assert all(0 <= span.start < span.end <= len(text) for span in spans + call_spans(text, spans))


def table(texts, mask, ids):
    schema = polars_schema(TokenTable)
    columns = {"token": texts, "loss_mask": mask, "token_id": ids}
    return pl.DataFrame(
        {**columns, **{n: [None] * len(texts) for n in schema if n not in columns}},
        schema={
            name: schema[name] for name in [*columns, *(n for n in schema if n not in columns)]
        },
    )


def rollout(mask, prompt="Q", starts=None):
    schema = polars_schema(RolloutTable)
    row = {"prompt_text": prompt, "loss_mask": mask, "turn_starts": starts}
    return pl.DataFrame([row], schema={name: schema[name] for name in row})


def test_a_conversation_with_a_tool_turn():
    texts = [
        "hm",
        "</think>",
        "<tool_call>",
        "x",
        "</tool_call>",
        "<end>",
        "\n",
        "5",
        "<think>",
        "ah",
        "</think>",
        "5",
        "<end>",
    ]
    mask = [True] * 6 + [False] * 3 + [True] * 4
    found = label_segments(
        table(texts, mask, [9 if text == "<end>" else 1 for text in texts]),
        rollout(mask, "Q<think>\n"),
        special_ids=[9],
    )
    assert found["turn"].to_list() == [0] * 9 + [1] * 4
    assert found["segment"].to_list() == [
        "think", "think", "tool_call", "tool_call", "tool_call", "other", None, None, None,
        "think", "think", "answer", "other",
    ]  # fmt: skip


def test_turns_that_follow_each_other_need_their_starts():
    mask = [True] * 4
    found = label_segments(
        table(list("abcd"), mask, [1] * 4), rollout(mask, starts=[0, 2]), special_ids=[]
    )
    assert found["turn"].to_list() == [0, 0, 1, 1]
