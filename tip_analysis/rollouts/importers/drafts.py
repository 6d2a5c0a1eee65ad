"""What a format's reader hands over, and the account of what an import could not recover."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tip_analysis.core.errors import ImportFormatError, InputError, UnknownNameError
from tip_analysis.core.names import FinishReason, Name, OnBadRow
from tip_analysis.core.text import one_line
from tip_analysis.rollouts.prompts import Message, Prompt, messages_in_text, parse_messages
from tip_analysis.rollouts.row_files import Row, field_names, preview, read_rows, type_name

_WRAPPED_NUMBER = re.compile(r"(?:np\.|numpy\.)?[a-z]+\d*\(\[?([^(),\[\]]+).*\)")
MAX_SKIPPED_NAMED = 5
"""Rows left out whose fault a report names; the rest are counted."""


class TurnEnd(Name):
    """What a source knows about the end of the student's last turn."""

    CLOSED = "closed"
    """The student ended it: the template's end-of-turn token is the student's."""
    OPEN = "open"
    """The source does not say: the token is not added."""
    CUT = "cut"
    """It was cut off: neither the token nor what closes a thought was written."""


@dataclass
class Draft:
    """One rollout as its source has it. Readers fill in what the source gives and leave the
    rest."""

    where: str
    """File and line, for error messages."""
    prompt: str | tuple[Message, ...] | None = None
    """Text as it was shown, or a conversation that a chat template is to be applied to."""
    response: str | tuple[Message, ...] | None = None
    """Text, or the turns after the prompt's (tool turns among them)."""
    prompt_token_ids: list[int] | None = None
    response_token_ids: list[int] | None = None
    loss_mask: list[bool] | None = None
    """Of `response_token_ids`; None is all true."""
    specials_skipped: bool = False
    """Whether the texts were decoded without their special tokens, so that chat markers are
    gone."""
    tools: Sequence[Any] | None = None
    """Tool definitions for the chat template."""
    prompt_key: str | None = None
    """The source's own identifier of the prompt."""
    finish_reason: FinishReason | None = None
    """`stop` or `length`, where the source says so."""
    turn_end: TurnEnd = TurnEnd.CLOSED
    """Of a response that is a conversation: whether its last turn is the student's to the end."""
    num_padding: int | None = None
    """Padding in front of `prompt_token_ids`, where they come from a padded batch; else None."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Columns of the rollout table that are taken over as they are."""


@dataclass(frozen=True)
class ImportOptions:
    """Choices that some formats need."""

    reward_key: str | None = None
    """Which of several rewards or metrics is the reward."""
    filter_name: str | None = None
    """lm-evaluation-harness: which filter's row of a document is taken."""
    all_turns: bool = False
    """Chat data: every turn of the assistant is the student's, not only those after the last turn
    of the user."""
    prompts: Mapping[str, Prompt] = field(default_factory=dict)
    """Prompts by id: what lost chat markers are restored from, and what responses without a prompt
    are joined to."""
    template: str = "plain"
    """The text around a problem."""
    on_bad_row: OnBadRow = OnBadRow.FAIL
    """Whether a row that cannot be used ends the import, or is left out and counted."""


@dataclass
class ImportReport:
    """What was read, and what could not be recovered; recorded in `run.json` and warned about in
    reports."""

    format: str
    files: list[str] = field(default_factory=list)
    rows_read: int = 0
    rollouts: int = 0
    partial_lines: int = 0
    """Last lines that a writer did not finish: left out."""
    skipped_rows: int = 0
    """Rows that could not be used: left out, since that was asked for."""
    skipped: list[str] = field(default_factory=list)
    """What is wrong with the first of them."""
    failed_requests: int = 0
    """Responses that hold an error instead of text: left out."""
    merged_rows: int = 0
    """Rows that repeat a rollout for another filter."""
    ids_exact: int = 0
    ids_retokenized: int = 0
    round_trip_mismatches: int = 0
    """Retokenised rollouts whose ids do not decode to their text."""
    texts_with_lost_characters: int = 0
    """Rollouts whose text holds U+FFFD: the bytes that it stands for are gone, and the ids with
    them."""
    thoughts_dropped: int = 0
    """Rollouts of which the chat template does not show all that the student wrote."""
    ends_lost: int = 0
    """Rollouts that ended by themselves, without the token that ended them."""
    ends_unknown: int = 0
    """Rollouts without an end token of which the source does not say whether there was one."""
    padding_removed: int = 0
    """Rollouts of padded batches, whose padding was taken off."""
    text_mismatches: int = 0
    """Rollouts with exact ids that decode to another text than the source has beside them."""
    template_exact: int = 0
    template_reapplied: int = 0
    template_none: int = 0
    prompts_restored: int = 0
    """Rollouts whose chat markers were put back."""
    prompts_not_restored: int = 0
    """Rollouts of a chat model whose prompt stays without the markers that it had."""
    empty_responses: int = 0
    without_reward: int = 0
    tokens_not_students: int = 0
    """Response tokens that the student did not write, such as tool output: `loss_mask` is false."""
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Remark on something once."""
        if text not in self.notes:
            self.notes.append(text)

    def add(self, facts: Mapping[str, int]) -> None:
        """Add to its counts, by their names."""
        for name, count in facts.items():
            setattr(self, name, getattr(self, name) + count)

    def to_dict(self) -> dict[str, Any]:
        """For `run.json`."""
        return asdict(self) | {"warnings": self.warnings()}

    def warnings(self) -> list[str]:
        """What a reader of any figure made from these rollouts has to know, a sentence each."""
        texts = [
            f"{count} of {self.rollouts} rollouts {text}"
            for name, text in _FACTS.items()
            if (count := getattr(self, name))
        ]
        if self.partial_lines:
            texts.append(f"{self.partial_lines} unfinished last line(s) were left out")
        if self.skipped_rows:
            texts.append(
                f"{self.skipped_rows} row(s) that could not be used were left out; the first:"
                f" {self.skipped[0]}"
            )
        if self.failed_requests:
            texts.append(f"{self.failed_requests} failed request(s) were left out")
        return texts + self.notes


_FACTS = {
    "ids_retokenized": (
        "were encoded again from text: their token ids may differ from those that were sampled"
    ),
    "round_trip_mismatches": "have ids that do not decode to their text",
    "texts_with_lost_characters": (
        "have U+FFFD in their text, in place of bytes that are lost: their ids are not those that"
        " were sampled"
    ),
    "thoughts_dropped": (
        "hold something that the student wrote and the chat template does not show (a thought,"
        " most likely): their tokens are not all that were sampled"
    ),
    "ends_lost": "lost the token that ended them: their source keeps text only",
    "ends_unknown": (
        "come without the token that ended them, if they were not cut off: their source does not"
        " say"
    ),
    "prompts_not_restored": (
        "have a prompt without its chat markers: the student never saw it like that; give the file"
        " of prompts, from which they can be restored"
    ),
    "template_reapplied": "have a prompt that was rendered again with the student's chat template",
    "text_mismatches": "have token ids that decode to another text than stands beside them",
    "empty_responses": "have an empty response",
}
"""What the counts of a report mean for a reader of figures: `7 of 20 rollouts …`."""


def handle_bad_row(problem: InputError, options: ImportOptions, report: ImportReport) -> None:
    """Raise what is wrong with a row, or count the row as left out.

    Raises:
        InputError: the problem itself, unless bad rows are to be skipped.
    """
    if options.on_bad_row is OnBadRow.FAIL:
        raise problem
    report.skipped_rows += 1
    if len(report.skipped) < MAX_SKIPPED_NAMED:
        report.skipped.append(str(problem))


def rows_of(
    files: Sequence[Path],
    options: ImportOptions,
    report: ImportReport,
    *,
    on_partial_line: Callable[[], None] | None = None,
) -> Iterator[Row]:
    """The rows of files in their order, counted; those that cannot be read are handled."""

    def on_bad_row(problem: InputError) -> None:
        report.rows_read += 1
        handle_bad_row(problem, options, report)

    for path in files:
        for row in read_rows(
            path, error=ImportFormatError, on_partial_line=on_partial_line, on_bad_row=on_bad_row
        ):
            report.rows_read += 1
            yield row


def drafts_of(
    rows: Iterable[Row],
    make: Callable[[Row], Iterable[Draft]],
    options: ImportOptions,
    report: ImportReport,
) -> Iterator[Draft]:
    """The drafts that a format makes of each row; a row that it cannot use is handled, and takes
    none of the others with it."""
    for row in rows:
        try:
            drafts = list(make(row))
        except InputError as problem:
            handle_bad_row(problem, options, report)
            continue
        yield from drafts


def field_of(row: Row, name: str, kind: type | tuple[type, ...] = str) -> Any:
    """A field that a format promises.

    Raises:
        ImportFormatError: it is missing or has another type.
    """
    if name not in row.values:
        raise ImportFormatError(
            f"{row.where}: expected the field {name!r}; found {field_names(row.values)}"
        )
    value = row.values[name]
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(type_name(one()) for one in kinds)
        raise ImportFormatError(f"{row.where}: {name}: expected {expected}, found {preview(value)}")
    return value


def number(value: Any, where: str) -> float | None:
    """A number, also one that was written as text (`1.0`, `True`, `np.float64(1.0)`, `np.True_`,
    `tensor(1.)`) or is the only one of a list; NaN is None.

    Raises:
        ImportFormatError: no number, or an infinite one.
    """
    given, value = value, _only(value)
    if isinstance(value, str):
        value = _NUMBER_WORDS.get(text := _bare_number(value), text)
    try:
        result = math.nan if value is None else float(value)
    except (TypeError, ValueError, OverflowError) as problem:
        raise ImportFormatError(f"{where}: expected a number, found {preview(given)}") from problem
    if math.isinf(result):
        raise ImportFormatError(f"{where}: expected a finite number, found {preview(given)}")
    return None if math.isnan(result) else result


def _only(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


_NUMBER_WORDS: dict[str, float | str] = {
    "true": 1.0, "false": 0.0, "none": math.nan, "null": math.nan, "": math.nan
}  # fmt: skip


def _bare_number(text: str) -> str:
    """Without what Python puts around a number: `np.float64(…)`, `tensor(…)`, `[…]`, `np.…_`."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1].strip()
    wrapped = _WRAPPED_NUMBER.fullmatch(text)
    text = (wrapped[1] if wrapped else text).strip().lower()
    return text.removeprefix("numpy.").removeprefix("np.").removesuffix("_")


def integer(value: Any, where: str) -> int | None:
    """A whole number, also one that was written as text.

    Raises:
        ImportFormatError: no whole number.
    """
    result = number(value, where)
    if result is not None and not result.is_integer():
        raise ImportFormatError(f"{where}: expected a whole number, found {preview(value)}")
    return None if result is None else int(result)


def text_or_messages(value: str | list[Any], where: str) -> str | tuple[Message, ...]:
    """A text as it stands, or messages, also those that a text holds as JSON.

    Raises:
        ImportFormatError: a list that holds something else.
    """
    if isinstance(value, str):
        decoded = messages_in_text(value)
        if decoded is None:
            return value
        value = decoded
    return parse_messages(value, where, error=ImportFormatError)


def text_or_none(value: Any) -> str | None:
    """An answer as text: numbers as written, a list of one as that one, anything deeper as its
    representation."""
    value = _only(value)
    return None if value is None else str(value)


def list_at(values: Mapping[str, Any], name: str, where: str) -> list[Any]:
    """A list in an object; empty where there is none.

    Raises:
        ImportFormatError: something else stands there.
    """
    value = values.get(name)
    if value is not None and not isinstance(value, list):
        raise ImportFormatError(f"{where}: {name}: expected a list, found {preview(value)}")
    return value or []


def token_ids(value: Any, where: str) -> list[int]:
    """A list of token ids.

    Raises:
        ImportFormatError: anything else.
    """
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise ImportFormatError(f"{where}: expected a list of token ids, found {preview(value)}")
    return value


def pick_reward(
    candidates: Mapping[str, Any],
    row: Row,
    options: ImportOptions,
    report: ImportReport,
    *,
    preferred: Sequence[str] = (),
) -> float | None:
    """The reward among a row's numbers: the one asked for, else the first preferred one, else the
    only one.

    Raises:
        UnknownNameError: the row has not the one asked for.
    """
    if options.reward_key is not None:
        if options.reward_key not in candidates:
            raise UnknownNameError(
                f"reward key ({row.where})", options.reward_key, list(candidates)
            )
        return number(candidates[options.reward_key], f"{row.where}: {options.reward_key}")
    names = [name for name in preferred if name in candidates] or list(candidates)
    if len(names) == 1 or (names and names[0] in preferred):
        return number(candidates[names[0]], f"{row.where}: {names[0]}")
    if names:
        report.note(
            "the rewards are left empty, since there are several to choose from:"
            f" {one_line(', '.join(names), 200)}; name one"
        )
    return None
