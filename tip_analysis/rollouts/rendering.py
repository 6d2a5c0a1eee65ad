"""Prompts as a model is shown them: templates around a problem, chat templates, and token ids.

Reads prompts (`prompts`), writes nothing. User text is only ever inserted, never formatted:
problems are full of braces.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tip_analysis.core.errors import OptionError, PromptFileError, UnknownNameError
from tip_analysis.core.text import one_line
from tip_analysis.rollouts.row_files import preview

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from tip_analysis.rollouts.prompts import Message, Prompt
from tip_analysis.rollouts.template_limits import (
    BYTES,
    MAX_CHARACTERS,
    check_template,
    memory_limit,
    time_limit,
)

TEMPLATES: dict[str, str] = {
    "plain": "{problem}",
    "boxed": "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
}
"""What is put around a problem in the user's turn, by name."""


_PLACEHOLDER = "{problem}"


_RESERVED_SWITCHES = (
    "conversation",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_dict",
)


@dataclass(frozen=True)
class RenderedPrompt:
    """What a model is shown."""

    text: str
    """Chat markers and a beginning-of-sequence token included."""
    token_ids: list[int]
    """Its token ids; the beginning-of-sequence token occurs at most once."""
    is_chat: bool
    """Whether a chat template made it; false for the bare text."""


def with_tools(switches: Mapping[str, Any] | None, tools: Sequence[Any] | None) -> dict[str, Any]:
    """Switches of a chat template, with the tools of one conversation."""
    return dict(switches or {}) | ({"tools": list(tools)} if tools else {})


def resolve_template(template: str) -> str:
    """The text of a named template, or a template text of the user's own, which contains
    `{problem}`.

    Raises:
        UnknownNameError: neither.
    """
    if template in TEMPLATES:
        return TEMPLATES[template]
    if _PLACEHOLDER in template:
        return template
    raise UnknownNameError(
        "prompt template", template, [*TEMPLATES, f"any text that contains {_PLACEHOLDER}"]
    )


def fill_template(template: str, problem: str) -> str:
    """Put a problem into a template; no other character of either is interpreted."""
    return resolve_template(template).replace(_PLACEHOLDER, problem)


def student_messages(prompt: Prompt, template: str = "plain") -> list[Message]:
    """The conversation that the student is shown.

    A bare problem becomes one user turn. In a given conversation the template goes around the last
    user turn, so that `plain` leaves it as it is.
    """
    if prompt.problem is not None:
        return [{"role": "user", "content": fill_template(template, prompt.problem)}]
    text = resolve_template(template)
    return _edit_last_user_turn(prompt.messages or (), lambda content: fill_template(text, content))


def teacher_messages(messages: Sequence[Message], solution: str) -> list[Message]:
    """The conversation for a teacher that sees the reference solution in the last user turn."""
    return _edit_last_user_turn(messages, lambda content: teacher_user_turn(content, solution))


def teacher_user_turn(problem_text: str, solution: str) -> str:
    """A user's turn, followed by the reference solution: the privileged context of on-policy
    self-distillation."""
    return (
        f"{problem_text}\n\nReference solution:\n{solution}\n\nNow solve the problem step by step"
        " in your own words."
    )


def _edit_last_user_turn(messages: Sequence[Message], edit: Callable[[str], str]) -> list[Message]:
    edited = list(messages)
    for index in reversed(range(len(edited))):
        if edited[index]["role"] == "user":
            edited[index] = {**edited[index], "content": edit(edited[index]["content"])}
            return edited
    raise PromptFileError(
        f"expected a conversation with a turn of the user, found the roles {roles_of(edited)}"
    )


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> RenderedPrompt:
    """The text and token ids that a model is shown: its chat template, or the bare text where it
    has none.

    Args:
        tokenizer: The model's own.
        messages: The conversation; the template opens the assistant's turn after it.
        chat_template_kwargs: Switches for the template, such as `enable_thinking`, passed through.

    Raises:
        PromptFileError: the template refuses the conversation, there is no template for more than
            one message, or no token is left.
    """
    if getattr(tokenizer, "chat_template", None):
        text = render_chat(tokenizer, messages, chat_template_kwargs=chat_template_kwargs)
        # The template writes its own special tokens: adding them once more would double the first
        # one.
        rendered = RenderedPrompt(text, encode(tokenizer, text), is_chat=True)
    elif (chat_template_kwargs or {}).get("tools"):
        raise PromptFileError("the model has no chat template, so tools cannot be shown to it")
    elif len(messages) == 1:
        rendered = render_bare(tokenizer, messages[0]["content"])
    else:
        raise PromptFileError(
            f"the model has no chat template, so a conversation ({roles_of(messages)}) cannot be"
            " shown to it; give each prompt as one `problem`, or choose a chat model"
        )
    if not rendered.token_ids:
        raise PromptFileError(f"the prompt {preview(messages[-1]['content'])} has no token")
    return rendered


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """A conversation as the text that the chat template makes of it.

    Raises:
        PromptFileError: the template refuses the conversation (alternating roles, no system turn
            …).
        OptionError: a switch that is not the template's but the renderer's.
    """
    switches = dict(chat_template_kwargs or {})
    if reserved := [name for name in _RESERVED_SWITCHES if name in switches]:
        raise OptionError(f"chat template switches: {', '.join(reserved)} cannot be set here")
    check_template(str(tokenizer.chat_template))
    refused = f"the chat template refuses the conversation ({roles_of(messages)})"
    try:
        with time_limit(), memory_limit():
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **switches,
            )
    except MemoryError:  # without its cause, which holds what was allocated
        raise PromptFileError(f"{refused}: it needs more than {BYTES / 1e9:.0f} GB") from None
    except Exception as problem:  # a template is a program of the model's author's
        raise PromptFileError(f"{refused}: {one_line(str(problem), 200)}") from problem
    assert isinstance(text, str)
    if len(text) > MAX_CHARACTERS:
        raise PromptFileError(f"{refused}: it makes a text of {len(text):,} characters of it")
    return text


def roles_of(messages: Sequence[Message]) -> str:
    """The roles of a conversation for an error message."""
    return one_line(", ".join(message["role"] for message in messages), 160)


def render_bare(tokenizer: "PreTrainedTokenizerBase", text: str) -> RenderedPrompt:
    """A text without a template, opened as the tokenizer opens a sequence, and never closed.

    The tokenizer's beginning-of-sequence token is put in front unless the text begins with it; an
    end-of-sequence token that the tokenizer would append is not part of a prompt.
    """
    bare = encode(tokenizer, text)
    framed = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    opening = next(
        (
            framed[:i]
            for i in range(len(framed) - len(bare) + 1)
            if framed[i : i + len(bare)] == bare
        ),
        [],
    )
    if opening and bare[: len(opening)] == opening:
        opening = []
    marks = "".join(tokenizer.convert_ids_to_tokens(opening)) if opening else ""
    return RenderedPrompt(marks + text, opening + bare, is_chat=False)


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a text, with no special token but those written in it.

    Raises:
        PromptFileError: the tokenizer fails: it has no token for what it does not know, say.
    """
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except Exception as problem:  # tokenizers raises no other kind
        raise PromptFileError(
            f"the model's tokenizer cannot encode {preview(text)}: {one_line(str(problem), 200)}"
        ) from problem


def unused_switches(
    tokenizer: "PreTrainedTokenizerBase", chat_template_kwargs: Iterable[str]
) -> list[str]:
    """Names of the switches that the chat template does not mention: setting them changes
    nothing."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    return [
        name for name in chat_template_kwargs if not re.search(rf"\b{re.escape(name)}\b", template)
    ]
