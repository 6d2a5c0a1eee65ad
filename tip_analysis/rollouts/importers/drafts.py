"""What a format's reader hands over, and the account of what an import could not recover."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tip_analysis.core.errors import ImportFormatError, UnknownNameError
from tip_analysis.core.text import one_line
from tip_analysis.rollouts.prompts import Message, Prompt
from tip_analysis.rollouts.row_files import Row, field_names, preview, type_name

_WRAPPED_NUMBER = re.compile(r"(?:np\.|numpy\.)?[a-z]+\d*\(([^(),]+).*\)")


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
    tools: list[Any] | None = None
    """Tool definitions for the chat template."""
    prompt_key: str | None = None
    """The source's own identifier of the prompt."""
    finish_reason: str | None = None
    """`stop` or `length`, where the source says so."""
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
    failed_requests: int = 0
    """Responses that hold an error instead of text: left out."""
    merged_rows: int = 0
    """Rows that repeat a rollout for another filter."""
    ids_exact: int = 0
    ids_retokenized: int = 0
    round_trip_mismatches: int = 0
    """Retokenised rollouts whose ids do not decode to their text."""
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

    def to_dict(self) -> dict[str, Any]:
        """For `run.json`."""
        return asdict(self) | {"warnings": self.warnings()}

    def warnings(self) -> list[str]:
        """What a reader of any figure made from these rollouts has to know, a sentence each."""
        said = {
            (
                "were encoded again from text: their token ids may differ from those that were "
                "sampled"
            ): self.ids_retokenized,
            "have ids that do not decode to their text": self.round_trip_mismatches,
            (
                "have a prompt without its chat markers: the student never saw it like that; give "
                "the file of prompts, from which they can be restored"
            ): self.prompts_not_restored,
            "have a prompt that was rendered again with the student's chat template": (
                self.template_reapplied
            ),
            "have token ids that decode to another text than stands beside them": (
                self.text_mismatches
            ),
            "have an empty response": self.empty_responses,
        }
        texts = [
            f"{count} of {self.rollouts} rollouts {text}" for text, count in said.items() if count
        ]
        if self.partial_lines:
            texts.append(f"{self.partial_lines} unfinished last line(s) were left out")
        if self.failed_requests:
            texts.append(f"{self.failed_requests} failed request(s) were left out")
        return texts + self.notes


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
    """A number, also one that was written as text: `1.0`, `True`, `np.float64(1.0)`, `tensor(1.)`;
    NaN is None.

    Raises:
        ImportFormatError: no number.
    """
    if isinstance(value, str):
        text = value.strip()
        wrapped = _WRAPPED_NUMBER.fullmatch(text)
        text = wrapped[1] if wrapped else text
        value = {"true": 1.0, "false": 0.0, "none": math.nan, "": math.nan}.get(text.lower(), text)
    try:
        result = math.nan if value is None else float(value)
    except (TypeError, ValueError) as problem:
        raise ImportFormatError(f"{where}: expected a number, found {preview(value)}") from problem
    return None if math.isnan(result) else result


def integer(value: Any, where: str) -> int | None:
    """A whole number, also one that was written as text.

    Raises:
        ImportFormatError: no whole number.
    """
    result = number(value, where)
    if result is not None and not result.is_integer():
        raise ImportFormatError(f"{where}: expected a whole number, found {preview(value)}")
    return None if result is None else int(result)


def text_or_none(value: Any) -> str | None:
    """An answer as text: numbers as written, a list of one as that one, anything deeper as its
    representation."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return None if value is None or value == "None" else str(value)


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
