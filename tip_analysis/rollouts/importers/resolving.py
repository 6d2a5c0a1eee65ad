"""From drafts to rows of the rollout table: token ids, chat markers, identifiers, and the account
of what was lost."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tip_analysis.core.errors import ImportFormatError, PromptFileError
from tip_analysis.core.names import FinishReason, IdsOrigin, TemplateOrigin
from tip_analysis.rollouts.importers.conversations import render_conversation, special_tokens
from tip_analysis.rollouts.importers.drafts import Draft, ImportReport
from tip_analysis.rollouts.importers.restoring import PromptRestorer
from tip_analysis.rollouts.prompts import Message, Prompt
from tip_analysis.rollouts.rendering import encode, render, render_bare, unused_switches, with_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class _Shown:
    """A prompt as the student is taken to have seen it."""

    text: str
    token_ids: list[int]
    template_origin: TemplateOrigin
    messages: Sequence[Message] | None = None
    prompt: Prompt | None = None
    is_exact: bool = False


@dataclass
class _Written:
    """A response."""

    text: str
    token_ids: list[int]
    loss_mask: list[bool]
    is_exact: bool = False
    shows_all: bool = True


class Resolver:
    """Makes rows of drafts for one tokenizer, and counts what could not be recovered."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        report: ImportReport,
        *,
        prompts: Mapping[str, Prompt],
        template: str = "plain",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._report = report
        self._facts: Counter[str] = Counter()
        self._switches = dict(chat_template_kwargs or {})
        self._specials = special_tokens(tokenizer)
        self._token_ids = frozenset(tokenizer.get_vocab().values())  # they may have gaps
        self._is_chat = bool(getattr(tokenizer, "chat_template", None))
        self._restorer: PromptRestorer | None = None
        self._prompts, self._template = prompts, template

    def resolve(self, draft: Draft) -> tuple[dict[str, Any], Counter[str]]:
        """The columns that a rollout's own draft decides, and what it adds to the report's counts;
        identifiers and batches come later.

        Raises:
            ImportFormatError: there is no prompt or no response, ids do not belong to this
                tokenizer, or the student's tokens cannot be told from those of its environment.
        """
        self._facts = Counter()
        if isinstance(draft.response, tuple) and draft.response_token_ids is None:
            shown, written = self._conversation(draft)
        else:
            shown, written = self._shown(draft), self._written(draft)
        prompt = shown.prompt
        tools = draft.tools or (prompt.tools if prompt else None)
        self._check_tools(tools)
        row: dict[str, Any] = {
            "prompt_key": draft.prompt_key or (prompt.id if prompt else None),
            "messages": (
                json.dumps(list(shown.messages), ensure_ascii=False) if shown.messages else None
            ),
            "tools": json.dumps(list(tools), ensure_ascii=False) if tools else None,
            "prompt_text": shown.text,
            "prompt_token_ids": shown.token_ids,
            "response_text": written.text,
            "response_token_ids": written.token_ids,
            "loss_mask": written.loss_mask,
            "finish_reason": self._finish_reason(draft, written).value,
            "ids_origin": _ids_origin(shown, written).value,
            "template_origin": shown.template_origin.value,
        }
        if prompt is not None:
            row |= {"ground_truth": prompt.answer, "solution": prompt.solution}
        row |= {name: value for name, value in draft.extras.items() if value is not None}
        if (logprobs := row.get("sampled_logprobs")) is not None:
            row["sampled_logprobs"] = _fitted(logprobs, draft.response_token_ids, written.token_ids)
        self._count(row, draft, shown, written)
        return row, self._facts

    def _shown(self, draft: Draft) -> _Shown:
        messages = draft.prompt if isinstance(draft.prompt, tuple) else None
        if draft.prompt_token_ids is not None:
            self._check_ids(draft.prompt_token_ids, f"{draft.where}: the prompt's ids")
            ids = self._without_padding(draft.prompt_token_ids, draft)
            if not ids:
                raise ImportFormatError(f"{draft.where}: the prompt has no token")
            return _Shown(self._decode(ids), ids, TemplateOrigin.EXACT, messages, is_exact=True)
        if messages is not None:
            return self._rendered(draft, messages)
        if not isinstance(draft.prompt, str):
            raise ImportFormatError(
                f"{draft.where}: there is no prompt: neither text, nor messages, nor token ids"
            )
        return self._shown_text(draft.prompt, draft)

    def _shown_text(self, text: str, draft: Draft) -> _Shown:
        if self._is_chat and draft.specials_skipped and not self._has_specials(text):
            restored = self._restored(text)
            self._facts["prompts_not_restored" if restored is None else "prompts_restored"] += 1
            if restored is not None:
                return restored
        if self._is_chat and self._has_specials(text):
            return _Shown(text, encode(self._tokenizer, text), TemplateOrigin.EXACT)
        bare = render_bare(self._tokenizer, text)
        if not bare.token_ids:
            raise ImportFormatError(f"{draft.where}: the prompt has no token")
        return _Shown(bare.text, bare.token_ids, TemplateOrigin.NONE)

    def _restored(self, text: str) -> _Shown | None:
        """The prompt with its chat markers; None where it is none that is known."""
        if self._restorer is None:
            self._restorer = PromptRestorer(
                self._tokenizer,
                prompts=self._prompts.values(),
                template=self._template,
                chat_template_kwargs=self._switches,
            )
        found = self._restorer.restore(text)
        if found is None:
            return None
        shown = found.rendered.text, found.rendered.token_ids, TemplateOrigin.REAPPLIED
        return _Shown(*shown, found.messages, found.prompt)

    def _rendered(self, draft: Draft, messages: tuple[Message, ...]) -> _Shown:
        switches = with_tools(self._switches, draft.tools)
        try:
            rendered = render(self._tokenizer, messages, chat_template_kwargs=switches)
        except PromptFileError as problem:
            raise ImportFormatError(f"{draft.where}: {problem}") from problem
        origin = TemplateOrigin.REAPPLIED if rendered.is_chat else TemplateOrigin.NONE
        return _Shown(rendered.text, rendered.token_ids, origin, messages)

    def _written(self, draft: Draft) -> _Written:
        text = draft.response if isinstance(draft.response, str) else None
        if draft.response_token_ids is None:
            if text is None:
                raise ImportFormatError(
                    f"{draft.where}: there is no response: neither text nor token ids"
                )
            ids = encode(self._tokenizer, text)
            return _Written(text, ids, [True] * len(ids))
        self._check_ids(draft.response_token_ids, f"{draft.where}: the response's ids")
        ids = self._to_the_end(draft.response_token_ids, draft)
        mask = [True] * len(ids) if draft.loss_mask is None else draft.loss_mask
        if len(mask) != len(ids):
            raise ImportFormatError(
                f"{draft.where}: loss_mask has {len(mask)} entries for {len(ids)} response tokens"
            )
        if (
            text is not None
            and self._without_specials(text) != self._decode(ids, skip_special_tokens=True).strip()
        ):
            self._facts["text_mismatches"] += 1
        return _Written(self._decode(ids), ids, mask, is_exact=True)

    def _conversation(self, draft: Draft) -> tuple[_Shown, _Written]:
        assert isinstance(draft.response, tuple)
        if isinstance(draft.prompt, tuple) and not self._is_chat and _is_text(draft.response):
            text = Draft(draft.where, prompt=draft.prompt, response=draft.response[0]["content"])
            return self._shown(text), self._written(text)
        if not isinstance(draft.prompt, tuple) or not self._is_chat:
            reason = (
                "the prompt is no conversation"
                if self._is_chat
                else "the student has no chat template"
            )
            raise ImportFormatError(
                f"{draft.where}: the response is a list of messages, but {reason}"
            )
        switches = with_tools(self._switches, draft.tools)
        rendered = render_conversation(
            self._tokenizer,
            [*draft.prompt, *draft.response],
            len(draft.prompt),
            draft.where,
            chat_template_kwargs=switches,
            turn_end=draft.turn_end,
        )
        shown = _Shown(
            rendered.prompt_text,
            encode(self._tokenizer, rendered.prompt_text),
            TemplateOrigin.REAPPLIED,
            draft.prompt,
        )
        return shown, _Written(
            rendered.response_text,
            rendered.response_token_ids,
            rendered.loss_mask,
            shows_all=rendered.shows_all,
        )

    def _without_padding(self, ids: list[int], draft: Draft) -> list[int]:
        """Prompt ids without what a padded batch put in front of them, or behind."""
        num = draft.num_padding or 0
        if num == 0:
            return ids
        self._facts["padding_removed"] += 1
        for padding, rest in ((ids[:num], ids[num:]), (ids[-num:], ids[:-num])):
            if len(padding) == num and len(set(padding)) == 1 and self._is_special(padding[0]):
                return rest
        raise ImportFormatError(
            f"{draft.where}: {num} of the prompt's tokens are said to be padding, but neither its"
            " first nor its last ones are one special token"
        )

    def _to_the_end(self, ids: list[int], draft: Draft) -> list[int]:
        """Response ids of a padded batch, through the token that ended the response."""
        if draft.num_padding is None:
            return ids
        eos, pad = self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        if eos in ids:
            kept = ids[: ids.index(eos) + 1]
        else:
            num = next((i for i, one in enumerate(reversed(ids)) if one != pad), len(ids))
            kept = ids[: len(ids) - num]
            # a run of padding begins with the token that ended the response, unless another did
            if num and not (kept and self._is_special(kept[-1])):
                kept = ids[: len(kept) + 1]
        self._facts["padding_removed"] += kept != ids and not draft.num_padding
        return kept

    def _is_special(self, token_id: int) -> bool:
        return self._tokenizer.convert_ids_to_tokens(token_id) in self._specials

    def _check_tools(self, tools: Sequence[Any] | None) -> None:
        if tools and unused_switches(self._tokenizer, ["tools"]):
            self._report.note(
                "the student's chat template does not show tools: the prompts hold none of those"
                " that the files name"
            )

    def _count(
        self, row: Mapping[str, Any], draft: Draft, shown: _Shown, written: _Written
    ) -> None:
        facts = self._facts
        facts["rollouts"] += 1
        facts["empty_responses"] += not written.token_ids
        facts["tokens_not_students"] += written.loss_mask.count(False)
        facts["ids_exact"] += row["ids_origin"] == IdsOrigin.EXACT
        facts["ids_retokenized"] += row["ids_origin"] == IdsOrigin.RETOKENIZED
        facts["round_trip_mismatches"] += any(
            not part.is_exact
            and ("\ufffd" in part.text or self._decode(part.token_ids) != part.text)
            for part in (shown, written)
        )
        facts["texts_with_lost_characters"] += any(
            not part.is_exact and "\ufffd" in part.text for part in (shown, written)
        )
        facts["thoughts_dropped"] += not written.shows_all
        if not (written.token_ids and self._is_special(written.token_ids[-1])):
            facts["ends_lost"] += row["finish_reason"] == FinishReason.STOP
            facts["ends_unknown"] += (
                row["finish_reason"] == FinishReason.GIVEN and not written.is_exact
            )
        for origin in TemplateOrigin:
            facts[f"template_{origin}"] += row["template_origin"] == origin

    def _finish_reason(self, draft: Draft, written: _Written) -> FinishReason:
        if draft.finish_reason is not None:
            return draft.finish_reason
        ended = (
            bool(written.token_ids)
            and self._tokenizer.convert_ids_to_tokens(written.token_ids[-1]) in self._specials
        )
        return FinishReason.STOP if written.is_exact and ended else FinishReason.GIVEN

    def _check_ids(self, ids: Sequence[int], what: str) -> None:
        if strange := [token_id for token_id in ids if token_id not in self._token_ids]:
            raise ImportFormatError(
                f"{what}: the student's tokenizer has {len(self._token_ids)} tokens, found the id"
                f" {strange[0]}; is --student the model that wrote these rollouts?"
            )

    def _has_specials(self, text: str) -> bool:
        return any(special in text for special in self._specials)

    def _without_specials(self, text: str) -> str:
        for special in self._specials:
            text = text.replace(special, "")
        return text.strip()

    def _decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)


def _ids_origin(shown: _Shown, written: _Written) -> IdsOrigin:
    exact = shown.is_exact and written.is_exact
    return IdsOrigin.EXACT if exact else IdsOrigin.RETOKENIZED


def _is_text(response: Sequence[Message]) -> bool:
    """Whether a response is one turn of text: no thought and no tool call that only a chat template
    could show."""
    return len(response) == 1 and not any(
        response[0].get(name) for name in ("reasoning_content", "tool_calls")
    )


def _fitted(
    logprobs: list[float | None], given: list[int] | None, kept: list[int]
) -> list[float | None] | None:
    """The log-probabilities of the tokens that were kept: null for an end that was put there; None
    where they belong to other tokens."""
    common = min(len(kept), len(given or ()))
    if given is None or len(logprobs) != len(given) or given[:common] != kept[:common]:
        return None
    return logprobs[:common] + [None] * (len(kept) - common)
