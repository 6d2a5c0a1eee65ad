"""Conversations as prompt and response, with a mask of the tokens that the student wrote.

The text of a conversation is cut where the template changes hands, and each piece is encoded on its
own, as the student and the environment once did: so the mask is exact by construction, and no token
straddles a boundary. Boundaries come from the template's generation blocks where it has them, else
from rendering ever longer prefixes of the conversation.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tip_analysis.core.errors import ImportFormatError, PromptFileError
from tip_analysis.rollouts.importers.drafts import TurnEnd
from tip_analysis.rollouts.prompts import Message
from tip_analysis.rollouts.rendering import encode, render_chat, roles_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation."""

    prompt_text: str
    response_text: str
    """Up to the end of the student's last turn, its end-of-turn token included."""
    response_token_ids: list[int]
    loss_mask: list[bool]
    """True where the student wrote."""
    shows_all: bool
    """Whether everything that the student wrote, thoughts included, is in the response."""


def split_turns(messages: Sequence[Message], where: str, *, all_turns: bool = False) -> int:
    """How many messages are the prompt: those before the assistant's first turn, or its first after
    the last of the user's.

    Turns of the user that no answer follows are passed over. The default takes earlier turns of the
    assistant as context, since they may be examples that the student never wrote.

    Raises:
        ImportFormatError: no turn of the assistant, or one that nothing precedes.
    """
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ImportFormatError(
            f"{where}: expected a turn of the assistant, found the roles {roles_of(messages)}"
        )
    last = len(roles) - 1 - roles[::-1].index("assistant")
    users = [index for index in range(last) if roles[index] == "user"]
    num_prompt = roles.index("assistant", 0 if all_turns or not users else users[-1])
    if num_prompt == 0:
        raise ImportFormatError(
            f"{where}: the conversation begins with the assistant's turn: there is no prompt"
        )
    return num_prompt


def render_conversation(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    num_prompt: int,
    where: str,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    turn_end: TurnEnd = TurnEnd.CLOSED,
) -> Conversation:
    """Render a conversation and tell the student's tokens from the others'.

    Args:
        tokenizer: The student's, with a chat template.
        messages: The whole conversation.
        num_prompt: How many messages come before the response.
        where: For error messages.
        chat_template_kwargs: Switches for the template.
        turn_end: Whether the end of the last turn, as the template closes it, is the student's.

    Raises:
        ImportFormatError: the template shows earlier turns differently once later ones are there,
            so that tokens cannot be attributed; or it refuses the conversation.
    """
    switches = chat_template_kwargs or {}
    try:
        full = render_chat(
            tokenizer, messages, add_generation_prompt=False, chat_template_kwargs=switches
        )
        prompt = render_chat(tokenizer, messages[:num_prompt], chat_template_kwargs=switches)
        _require_prefix(full, prompt, where)
        if _GENERATION_BLOCK.search(_template_text(tokenizer, switches)):
            spans = _generation_spans(tokenizer, messages, full, switches, where)
        else:
            spans = _incremental_spans(tokenizer, messages, num_prompt, full, switches, where)
    except PromptFileError as problem:
        raise ImportFormatError(f"{where}: {problem}") from problem
    spans = [(max(start, len(prompt)), end) for start, end in spans if end > len(prompt)]
    if not spans:
        raise ImportFormatError(
            f"{where}: the chat template leaves nothing that the assistant wrote"
        )
    if turn_end is not TurnEnd.CLOSED:
        start, end = spans[-1]
        specials = special_tokens(tokenizer)
        written = _written_end(full[start:end], messages[-1], turn_end, specials, where)
        spans[-1] = (start, start + written)
    pieces = "".join(full[start:end] for start, end in spans)
    return _encode_pieces(
        tokenizer, full, prompt, spans, shows_all=_shows_all(pieces, messages[num_prompt:])
    )


def _written_end(
    turn: str, message: Message, turn_end: TurnEnd, specials: set[str], where: str
) -> int:
    """Where the student's text ends in a turn that the template closed for it: behind what it wrote
    last."""
    if message.get("tool_calls"):
        if turn_end is TurnEnd.CUT:
            raise ImportFormatError(
                f"{where}: a tool call that was cut off cannot be rendered as it was written;"
                " import exact token ids"
            )
        bare = turn.rstrip()
        for special in specials:
            bare = bare.removesuffix(special)
        return len(bare)
    last = next((text for text in reversed(_texts(message)) if text.strip()), "")
    for text in (last, last.strip()):
        if text and (begin := turn.rfind(text)) >= 0:
            return begin + len(text)
    if not last:
        return 0
    raise ImportFormatError(
        f"{where}: the chat template does not show how the student's last turn ends, which was cut"
        " off (it drops thoughts, most likely); import exact token ids"
    )


def _texts(message: Message) -> list[str]:
    """What the student wrote in a turn, in order."""
    return [str(message.get(name) or "") for name in ("reasoning_content", "content")]


def _shows_all(shown: str, messages: Sequence[Message]) -> bool:
    """Whether the texts of the assistant's turns stand in what is shown, one after the other."""
    position = 0
    for message in messages:
        if message["role"] != "assistant":
            continue
        for text in map(str.strip, _texts(message)):
            found = shown.find(text, position)
            if found < 0:
                return False
            position = found + len(text)
    return True


def _encode_pieces(
    tokenizer: "PreTrainedTokenizerBase",
    full: str,
    prompt: str,
    spans: list[tuple[int, int]],
    *,
    shows_all: bool,
) -> Conversation:
    ids: list[int] = []
    mask: list[bool] = []
    position = len(prompt)
    for start, end in spans:
        for piece, is_students in ((full[position:start], False), (full[start:end], True)):
            piece_ids = encode(tokenizer, piece) if piece else []
            ids += piece_ids
            mask += [is_students] * len(piece_ids)
        position = end
    return Conversation(prompt, full[len(prompt) : position], ids, mask, shows_all)


def _incremental_spans(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    num_prompt: int,
    full: str,
    switches: Mapping[str, Any],
    where: str,
) -> list[tuple[int, int]]:
    """Each turn of the assistant as (start, end) in characters: from where it was to write, through
    its end-of-turn token."""
    spans = []
    for index in range(num_prompt, len(messages)):
        if messages[index]["role"] != "assistant":
            continue
        before = render_chat(tokenizer, messages[:index], chat_template_kwargs=switches)
        _require_prefix(full, before, where)
        after = render_chat(
            tokenizer,
            messages[: index + 1],
            add_generation_prompt=False,
            chat_template_kwargs=switches,
        )
        start = len(before)
        if full.startswith(after) and len(after) > start:
            end = start + len(
                _without_trailing_space(full[start : len(after)], special_tokens(tokenizer))
            )
        # some templates show a last turn otherwise than an earlier one: the end-of-turn token still
        # ends it
        else:
            closing = full.find(str(tokenizer.eos_token), start) if tokenizer.eos_token else -1
            if closing < 0:
                _refuse(where)
            end = closing + len(str(tokenizer.eos_token))
        spans.append((start, end))
    return spans


def _generation_spans(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    full: str,
    switches: Mapping[str, Any],
    where: str,
) -> list[tuple[int, int]]:
    """What stands in the template's generation blocks, as (start, end) in characters."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, spans = render_jinja_template(
        conversations=[[dict(message) for message in messages]],
        chat_template=_template_text(tokenizer, switches),
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **switches},
    )
    if rendered[0] != full:
        _refuse(where)
    return [(int(start), int(end)) for start, end in spans[0]]  # pyright: ignore


def _template_text(tokenizer: "PreTrainedTokenizerBase", switches: Mapping[str, Any]) -> str:
    return tokenizer.get_chat_template(tools=switches.get("tools"))


def _without_trailing_space(text: str, specials: set[str]) -> str:
    """A turn without the line break that the template puts after its end-of-turn token: the student
    did not write it."""
    trimmed = text.rstrip()
    return trimmed if any(trimmed.endswith(special) for special in specials) else text


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """The tokens that decoding skips when it skips special tokens."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | {str(token) for token in tokenizer.all_special_tokens}


def _require_prefix(full: str, beginning: str, where: str) -> None:
    if not full.startswith(beginning):
        _refuse(where)


def _refuse(where: str) -> None:
    raise ImportFormatError(
        f"{where}: the chat template shows a turn differently once later turns follow, so the"
        " student's tokens cannot be told from the others; use a template with {% generation %}"
        " blocks, or import exact token ids with a loss_mask (native)"
    )
