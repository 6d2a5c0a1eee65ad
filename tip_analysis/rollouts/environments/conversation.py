"""One conversation as token ids that only ever grow.

What the student wrote stays as it was sampled. What its environment says is the difference between
the template's rendering of the conversation with it and the text so far. Where that text is no
beginning of the rendering, the template shows an earlier turn otherwise than it was written (it
drops thoughts, trims space …): the conversation is refused, or goes on and is marked.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tip_analysis.core.errors import InputError, PromptFileError
from tip_analysis.core.names import ConversationMatch, FinishReason, OnRewrite
from tip_analysis.rollouts.answers.reading import opened_thought
from tip_analysis.rollouts.encoded import EncodedPrompt
from tip_analysis.rollouts.environments.turns import parse_turn
from tip_analysis.rollouts.prompts import Message
from tip_analysis.rollouts.rendering import encode, render_chat
from tip_analysis.rollouts.row_files import preview
from tip_analysis.rollouts.sampling import Generation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STUB = "What was written here."
"""Stands for the student's turn where only what follows it is asked for."""


class RewrittenTurnError(InputError):
    """A chat template shows an earlier turn otherwise than it was written."""


class Conversation:
    """Token ids, their text, and which of them the student wrote."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        prompt: EncodedPrompt,
        switches: Mapping[str, Any],
        *,
        name: str,
        on_rewrite: OnRewrite = OnRewrite.REFUSE,
    ) -> None:
        self.tokenizer, self.name, self.on_rewrite = tokenizer, name, on_rewrite
        self.switches = dict(switches)
        self.prompt_ids = list(prompt.token_ids)
        self.messages: list[Message] = list(prompt.messages)
        """As the template is given them: the student's turns as plain text."""
        self.said: list[Message] = list(prompt.messages)
        """As an environment reads them: thoughts and tool calls apart."""
        self.num_prompt = len(prompt.messages)
        self.text = prompt.shown.text
        self.response: list[int] = []
        self.loss_mask: list[bool] = []
        self.logprobs: list[float | None] = []
        self.turn_starts: list[int] = []
        self.match = ConversationMatch.IDS
        self._closing = ""
        self._text_starts: list[int] = []

    @property
    def token_ids(self) -> list[int]:
        """All ids so far: what the next turn is written after."""
        return [*self.prompt_ids, *self.response]

    def add_turn(self, generation: Generation) -> Message:
        """Take in what the student wrote; returns it as a message."""
        ids = list(generation.token_ids)
        self.turn_starts.append(len(self.response))
        self._text_starts.append(len(self.text))
        self.response += ids
        self.loss_mask += [True] * len(ids)
        self.logprobs += generation.logprobs
        stopped = generation.finish_reason is FinishReason.STOP
        written = self._decode(ids[:-1] if stopped else ids)
        self._closing = self._decode(ids[-1:]) if stopped else ""
        opened = opened_thought(self.text)
        content = (self.text[self.text.rfind(opened) :] if opened else "") + written
        self.text += written + self._closing
        self.messages.append({"role": "assistant", "content": content})
        self.said.append(parse_turn(content))
        return self.said[-1]

    def answer(self, messages: Sequence[Message]) -> list[int]:
        """The ids that what the environment says adds, the opening of the next turn included; they
        are taken in by `extend`.

        Raises:
            RewrittenTurnError: the template shows an earlier turn otherwise, and that is refused.
            PromptFileError: the template refuses the conversation.
        """
        whole = self._render([*self.messages, *messages])
        if whole.startswith(self.text):
            return encode(self.tokenizer, whole[len(self.text) :])
        if self.on_rewrite is OnRewrite.REFUSE:
            raise RewrittenTurnError(self._difference(whole))
        self.match = ConversationMatch.REWRITTEN
        return encode(self.tokenizer, self._apart(messages))

    def extend(self, messages: Sequence[Message], ids: Sequence[int]) -> None:
        """Take in what the environment said, as `answer` gave it."""
        self.messages += messages
        self.said += messages
        self.response += ids
        self.loss_mask += [False] * len(ids)
        self.logprobs += [None] * len(ids)
        if self.match is ConversationMatch.REWRITTEN:
            self.text += self._decode(ids)
            return
        self.text = self._render(self.messages)
        if encode(self.tokenizer, self.text) != self.token_ids:
            self.match = ConversationMatch.TEXT

    def _render(self, messages: Sequence[Message], *, opens: bool = True) -> str:
        return render_chat(
            self.tokenizer,
            messages,
            add_generation_prompt=opens,
            chat_template_kwargs=self.switches,
        )

    def _apart(self, messages: Sequence[Message]) -> str:
        """What the template adds for these messages, whatever was written before them."""
        stub = [*self.messages[: self.num_prompt], {"role": "assistant", "content": _STUB}]
        whole = self._render([*stub, *messages])
        at = whole.rfind(_STUB)
        if at < 0:
            raise RewrittenTurnError(
                f"{self.name}: the chat template does not show the assistant's turns as written"
            )
        return whole[at + len(_STUB) :].removeprefix(self._closing)

    def _difference(self, whole: str) -> str:
        """Where the template's rendering leaves what was written."""
        pairs = enumerate(zip(whole, self.text, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(whole), len(self.text)))
        turn = sum(start <= at for start in self._text_starts)
        written, shown = (preview(text[at : at + 40]) for text in (self.text, whole))
        where = f"turn {turn} of the student" if turn else "the prompt"
        return (
            f"{self.name}: the chat template shows {where} otherwise than it was written once more"
            f" follows ({written} becomes {shown}), so the student would not read its own ids; keep"
            " such rollouts with --on-rewrite record, or use a template that keeps earlier turns"
        )

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


REFUSALS = (RewrittenTurnError, PromptFileError)
"""Why a conversation may not go on."""
