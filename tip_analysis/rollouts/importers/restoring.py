"""Chat prompts whose special tokens were skipped when they were written down, restored.

`user\\nWhat is 1+1?\\nassistant\\n` was `<|im_start|>user\\nWhat is
1+1?<|im_end|>\\n<|im_start|>assistant\\n`. Two ways lead back: a file of prompts, of which each is
rendered and stripped in the same way, and the shape that the chat template gives to one turn of the
user, with or without a system turn. A restored prompt, stripped again, is the text that was there.
A text that could also be a conversation of several turns is left alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tip_analysis.core.errors import PromptFileError
from tip_analysis.rollouts.prompts import Message, Prompt
from tip_analysis.rollouts.rendering import RenderedPrompt, render, student_messages, with_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = ("@@first@@", "@@second@@", "@@third@@")


class Restored(NamedTuple):
    """A prompt with its chat markers."""

    messages: Sequence[Message]
    rendered: RenderedPrompt
    prompt: Prompt | None
    """The prompt of the file, where that is where it comes from."""


class PromptRestorer:
    """Restores prompts for one tokenizer; each distinct text is worked out once."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        prompts: Iterable[Prompt] = (),
        template: str = "plain",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._switches = chat_template_kwargs
        self._found: dict[str, Restored | None] = {}
        for prompt in prompts:
            messages = student_messages(prompt, template)
            switches = with_tools(chat_template_kwargs, prompt.tools)
            rendered = render(tokenizer, messages, chat_template_kwargs=switches)
            self._found[self._strip(rendered.text)] = Restored(messages, rendered, prompt)
        self._user_shape = self._shape("user")
        self._system_shape = self._shape("system", "user")
        turns = self._shape("user", "assistant", "user")
        self._answer_opening = turns[1] if turns else None

    def restore(self, text: str) -> Restored | None:
        """The prompt that `text` is left of; None where it cannot be told."""
        if text not in self._found:
            self._found[text] = self._restore(text)
        return self._found[text]

    def _restore(self, text: str) -> Restored | None:
        for roles, shape in (
            (("user",), self._user_shape),
            (("system", "user"), self._system_shape),
        ):
            contents = _match(text, shape) if shape else None
            if contents is None or (
                self._answer_opening
                and any(self._answer_opening in content for content in contents)
            ):
                continue
            messages = [
                {"role": role, "content": content}
                for role, content in zip(roles, contents, strict=True)
            ]
            rendered = render(self._tokenizer, messages, chat_template_kwargs=self._switches)
            if self._strip(rendered.text) == text:
                return Restored(messages, rendered, None)
        return None

    def _strip(self, text: str) -> str:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _shape(self, *roles: str) -> list[str] | None:
        """What the stripped template puts before, between and after the contents of these turns;
        None if it refuses them."""
        messages = [
            {"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=False)
        ]
        try:
            text = self._strip(
                render(self._tokenizer, messages, chat_template_kwargs=self._switches).text
            )
        except PromptFileError:
            return None
        parts = []
        for mark in _MARKS[: len(roles)]:
            before, found, text = text.partition(mark)
            if not found:
                return None
            parts.append(before)
        return [*parts, text]


def _match(text: str, shape: list[str]) -> list[str] | None:
    """Contents that fit a shape of one or two turns, if there is one way only."""
    first, *between, last = shape
    if len(text) < len(first) + len(last) or not (text.startswith(first) and text.endswith(last)):
        return None
    inner = text[len(first) : len(text) - len(last)]
    if not between:
        return [inner]
    contents = inner.split(between[0]) if between[0] else []
    return contents if len(contents) == len(between) + 1 else None
