"""Answers to multiple-choice questions: `(B)`, `B: 12`, `B.` and `\\text{B}` are one choice."""

import re
from typing import NamedTuple

from tip_analysis.rollouts.answers.notation import without_dollars

_WRAPPER = re.compile(r"\\(?:text(?:bf|rm|it|sf)?|math(?:rm|bf|sf|it)|mbox|bf|rm)\s*\{([^{}]*)\}")
_CHOICE = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)\s*(?:is|:)?\s*)?"
    r"(?:\((?P<closed>[A-Za-z])\)|\[(?P<square>[A-Z])\]|(?P<open>[A-Za-z])(?P<mark>[):.])"
    r"|(?P<bare>[A-Za-z]))"
    r"(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)

_LETTER = re.compile(r":?\s*[A-Za-z]")


class Choice(NamedTuple):
    """One option of several."""

    letter: str
    """In upper case where a mark (bracket, colon, full stop) shows that it is a choice."""
    rest: str
    """What the option says, where that is written too."""
    is_marked: bool


def read_choice(text: str) -> Choice | None:
    """The choice that a text is; None for anything else."""
    plain = unwrap(text).strip().strip("*").replace("\\ ", " ").replace("\\,", " ").strip()
    match = _CHOICE.fullmatch(plain)
    if match is None:
        return None
    letter = match["closed"] or match["square"] or match["open"] or match["bare"]
    rest = match["rest"].strip().strip(".").strip()
    is_marked = match["bare"] is None
    if not is_marked:
        return None if rest else Choice(letter, "", is_marked=plain[:-1] != "")
    if match["open"] and match["mark"] in ".:" and (letter.islower() or _LETTER.fullmatch(rest)):
        return None  # `p.m.`, the ratio a:b
    return Choice(letter.upper(), rest.removeprefix(":").strip(), is_marked=True)


def same_choice(gold: Choice, found: Choice) -> bool:
    """Whether two choices have one letter; bare letters may be variables and keep their case."""
    if gold.is_marked or found.is_marked:
        return gold.letter.upper() == found.letter.upper()
    return gold.letter == found.letter


def unwrap(text: str) -> str:
    """A text without the commands that only choose its font."""
    text = without_dollars(text)
    while (plain := _WRAPPER.sub(r"\1", text)) != text:
        text = plain
    return text
