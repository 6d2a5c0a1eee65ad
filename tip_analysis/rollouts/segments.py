"""Turns and segments of what a student wrote: which turn a token belongs to, and whether it is
thought, tool call or answer.

Segments are found in the text of each turn, by the tags that models write around thoughts and tool
calls (or, for a call without tags, by its JSON). A token belongs to the segment in which its text
begins.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import polars as pl

from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.names import CallPart, Segment
from tip_analysis.core.schema import TokenTable
from tip_analysis.rollouts.answers.reading import THOUGHT_TAGS, opened_thought

_TAGGED_CALLS = re.compile(
    r"<tool_call>.*?(?:</tool_call>|\Z)"
    r"|<function_call>.*?(?:</function_call>|\Z)"
    r"|<function=[^>\s]+>.*?(?:</function>|\Z)"
    r"|<｜tool▁calls▁begin｜>.*?(?:<｜tool▁calls▁end｜>|\Z)"
    r"|<\|tool_calls_section_begin\|>.*?(?:<\|tool_calls_section_end\|>|\Z)"
    r"|(?:\[TOOL_CALLS\]|<\|python_tag\|>|<\|tool_call\|>).*\Z",
    re.DOTALL,
)
"""Calls as Qwen, Hermes, DeepSeek, Kimi, Mistral, Llama 3 and Granite write them."""
_BARE_CALL = re.compile(
    r"\s*\[?\s*\{\s*\"(?:type\"\s*:\s*\"function\"\s*,\s*\")?name\"\s*:\s*\"[^\"]*\"\s*,\s*"
    r"\"(?:arguments|parameters)\"\s*:.*",
    re.DOTALL,
)
"""A turn that is nothing but a call, as Llama 3 writes one."""
_NAME = re.compile(r"\"name\"\s*:\s*\"(?P<json>[^\"]*)\"|<function=(?P<tag>[^>\s]+)>")
_ARGUMENT_KEY = re.compile(r"\"(?:arguments|parameters)\"\s*:\s*|(?=<parameter=)")
_PARAMETERS = re.compile(r"<parameter=.*?(?:</parameter>|\Z)(?:\s*(?=<parameter=))?", re.DOTALL)
_SEGMENTS, _PARTS = tuple(Segment), tuple(CallPart)


class Span(NamedTuple):
    """Characters [start, end) of a text."""

    start: int
    end: int


def turn_starts(loss_mask: Sequence[bool]) -> list[int]:
    """Positions at which runs of tokens begin that the student wrote: its turns, where something
    stands between them."""
    written = np.asarray(loss_mask, dtype=bool)
    before = np.concatenate([[False], written[:-1]]) if len(written) else written
    return np.flatnonzero(written & ~before).tolist()


def turns_of(length: int, starts: Sequence[int]) -> np.ndarray:
    """[length] int32: the turn of each position, from 0; what comes before the first turn belongs
    to it."""
    turns = np.searchsorted(np.asarray(starts, dtype=np.int64), np.arange(length), side="right") - 1
    return turns.clip(min=0).astype(np.int32)


def thought_spans(text: str) -> list[Span]:
    """Where thoughts stand in a turn, their tags included; one that is only closed begins with the
    turn, one that is not closed ends with it."""
    spans: list[Span] = []
    for opening, closing in THOUGHT_TAGS:
        at = 0
        while True:
            begin, end = text.find(opening, at), text.find(closing, at)
            if begin < 0 and end < 0:
                break
            if begin < 0 or 0 <= end < begin:
                begin = at if at == 0 else end
            end = text.find(closing, begin)
            at = len(text) if end < 0 else end + len(closing)
            spans.append(Span(begin, at))
    return sorted(spans)


def call_spans(text: str, thoughts: Iterable[Span] = ()) -> list[Span]:
    """Where tool calls stand in a turn outside its thoughts, their tags included."""
    bare = list(text)
    for start, end in thoughts:
        bare[start:end] = " " * (end - start)
    rest = "".join(bare)
    spans = [Span(*found.span()) for found in _TAGGED_CALLS.finditer(rest)]
    if not spans and (whole := _BARE_CALL.fullmatch(rest)):
        start = len(rest) - len(rest.lstrip())
        spans = [Span(start, whole.end())]
    return spans


def argument_spans(call: str) -> list[Span]:
    """Where the arguments stand in the text of tool calls."""
    spans: list[Span] = []
    for key in _ARGUMENT_KEY.finditer(call):
        start = key.end()
        if spans and start < spans[-1].end:
            continue
        parameters = _PARAMETERS.match(call, start)
        end = parameters.end() if parameters else _value_end(call, start)
        spans.append(Span(start, end))
    return spans


def _value_end(text: str, start: int) -> int:
    """Behind the JSON value that begins at `start`; the end of the text where it is not closed."""
    depth, in_string, escaped = 0, False, False
    for place in range(start, len(text)):
        character = text[place]
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_string = True
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
        elif character == "," and depth == 0:
            return place
        if depth < 0:
            return place
        if depth == 0 and not in_string and character in '}]"':
            return place + 1
    return len(text)


def _name_spans(call: str, arguments: Sequence[Span]) -> Iterator[Span]:
    for found in _NAME.finditer(call):
        if not any(start <= found.start() < end for start, end in arguments):
            yield Span(*found.span("json" if found["json"] is not None else "tag"))


def _codes(text: str) -> tuple[np.ndarray, np.ndarray]:
    """[C] uint8 twice: segment of each character; part of a call (0 is none, i + 1 the i-th)."""
    segments = np.full(len(text), _SEGMENTS.index(Segment.ANSWER), dtype=np.uint8)
    parts = np.zeros(len(text), dtype=np.uint8)
    thoughts = thought_spans(text)
    calls = call_spans(text, thoughts)
    for kind, spans in ((Segment.THINK, thoughts), (Segment.TOOL_CALL, calls)):
        for start, end in spans:
            segments[start:end] = _SEGMENTS.index(kind)
    for start, end in calls:
        call = text[start:end]
        arguments = argument_spans(call)
        parts[start:end] = 1 + _PARTS.index(CallPart.SYNTAX)
        for kind, spans in (
            (CallPart.NAME, _name_spans(call, arguments)),
            (CallPart.ARGUMENT, arguments),
        ):
            for begin, stop in spans:
                parts[start + begin : start + stop] = 1 + _PARTS.index(kind)
    _blank_out(text, segments)
    return segments, parts


def _blank_out(text: str, segments: np.ndarray) -> None:
    """An answer that is nothing but space, between or around the rest, is none."""
    answer = _SEGMENTS.index(Segment.ANSWER)
    edges = np.flatnonzero(np.diff(segments, prepend=255, append=255))
    for start, end in pairwise(edges):
        if segments[start] == answer and not text[start:end].strip():
            segments[start:end] = _SEGMENTS.index(Segment.OTHER)


def segment_turn(
    texts: Sequence[str], special: Sequence[bool], *, opened: str = ""
) -> list[tuple[Segment, CallPart | None]]:
    """Segment and part of a call of each token of one turn.

    Args:
        texts: text of each token.
        special: whether it is a special token: those outside thoughts and calls are `other`.
        opened: the tag of a thought that the chat template has opened before the turn.
    """
    shown = ["" if is_special else text for text, is_special in zip(texts, special, strict=True)]
    tagged = _is_tag(texts)
    shown = [text if tag else bare for text, bare, tag in zip(texts, shown, tagged, strict=True)]
    whole = opened + "".join(shown)
    segments, parts = _codes(whole)
    offsets = len(opened) + np.concatenate([[0], np.cumsum([len(text) for text in shown])])
    found: list[tuple[Segment, CallPart | None]] = []
    for place, bare, is_special in zip(offsets[:-1], shown, special, strict=True):
        if not bare:
            found.append((Segment.OTHER if is_special or not found else found[-1][0], None))
            continue
        part = int(parts[place])
        found.append((_SEGMENTS[segments[place]], _PARTS[part - 1] if part else None))
    return found


def _is_tag(texts: Sequence[str]) -> list[bool]:
    """Which tokens are tags of thoughts or calls, special or not."""
    known = {tag for tags in THOUGHT_TAGS for tag in tags} | _CALL_TAGS
    return [text.strip() in known for text in texts]


_CALL_TAGS = {
    "<tool_call>", "</tool_call>", "<function_call>", "</function_call>", "</function>",
    "[TOOL_CALLS]", "<|python_tag|>", "<|tool_call|>", "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>",
}  # fmt: skip


def label_segments(
    tokens: pl.DataFrame, rollouts: pl.DataFrame, *, special_ids: Collection[int]
) -> pl.DataFrame:
    """Fill in `turn`, `segment` and `call_part`.

    Args:
        tokens: rows of the token table, rollout by rollout in order of position.
        rollouts: the rollouts that they come from, in the same order.
        special_ids: the tokenizer's special tokens.
    """
    dtypes = polars_schema(TokenTable)
    is_special = tokens["token_id"].is_in(list(special_ids)).to_list()
    texts, at = tokens["token"].to_list(), 0
    turns: list[np.ndarray] = []
    labels: list[tuple[Segment | None, CallPart | None]] = []
    rows = rollouts.select("prompt_text", "loss_mask", "turn_starts")
    for prompt_text, mask, given in rows.iter_rows():
        turns.append(turns_of(len(mask), turn_starts(mask) if given is None else given))
        here = slice(at, at + len(mask))
        labels += _rollout_labels(texts[here], is_special[here], mask, turns[-1], prompt_text)
        at += len(mask)
    columns = {
        "turn": np.concatenate(turns) if turns else [],
        "segment": [None if one is None else str(one) for one, _ in labels],
        "call_part": [None if part is None else str(part) for _, part in labels],
    }
    return tokens.with_columns(
        pl.Series(name, values, dtype=dtypes[name]) for name, values in columns.items()
    )


def _rollout_labels(
    texts: Sequence[str],
    special: Sequence[bool],
    mask: Sequence[bool],
    turns: np.ndarray,
    prompt_text: str,
) -> list[tuple[Segment | None, CallPart | None]]:
    """Labels of all tokens of one rollout; those that the student did not write have none."""
    labels: list[tuple[Segment | None, CallPart | None]] = [(None, None)] * len(mask)
    written, before = np.asarray(mask, dtype=bool), prompt_text
    for turn in np.unique(turns):
        places = np.flatnonzero(written & (turns == turn)).tolist()
        found = segment_turn(
            [texts[place] for place in places],
            [special[place] for place in places],
            opened=opened_thought(before),
        )
        for place, label in zip(places, found, strict=True):
            labels[place] = label
        before = "".join(
            texts[place] for place in np.flatnonzero(~written & (turns == turn)).tolist()
        )
    return labels
