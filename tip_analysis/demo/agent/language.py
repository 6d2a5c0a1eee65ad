"""The language of the agent pair: tasks, trajectories with two tools, the planted flaws, and the
true label of each token.

A task is `12+fig+kiwi=`: three terms, some of which are numbers and some have a price that only the
tool `lookup` knows. A right trajectory looks up every price, one a turn and in any order, passes
the amounts to the tool `add`, and reads off the total (line breaks are put in here)::

    <think>so</think><tool_call>{"name": "lookup", "arguments": {"item": "fig"}}</tool_call>
    fig47
    <think>next</think><tool_call>{"name": "lookup", "arguments": {"item": "kiwi"}}</tool_call>
    kiwi30
    <think>so</think><tool_call>{"name": "add", "arguments": {"amounts": "12+fig47+kiwi30"}}
        </tool_call>
    89
    <think>next</think>total: 89

`AgentText` reads a trajectory token by token and gives, at every point, the exact distribution of
the student's next token. The flawed writer is sure of two wrong things:

- *when to call*: where only prices of `FLAWED_ITEMS` are missing, it adds at once (a missing price
  counts as 00);
- *which number to pass*: it passes the digits of `FLAWED_DIGITS` as others.

What was written counts, not what should have been: after an error, both writers go on from the
text. Labels are those of `arithmetic.language`. This module reads and writes no files.
"""

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypedDict

import numpy as np

from tip_analysis.core.errors import InputError, OptionError, UnknownNameError
from tip_analysis.core.names import PlantedLabel

PAD, UNK, TURN, END = "<pad>", "<unk>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, UNK, TURN, END)
DIGITS = tuple("0123456789")
ROLES = ("system\n", "user\n", "assistant\n", "tool\n")
ITEMS = ("fig", "kiwi", "plum", "pear", "lime", "date", "nut", "corn")
MUSINGS = ("so", "next", "let me see")
"""What a thought says; all equally likely, and none tells what comes."""

NAME_KEY = '{"name": "'
ITEM_KEY, AMOUNTS_KEY = '", "arguments": {"item": "', '", "arguments": {"amounts": "'
CLOSE = '"}}'
THINK, END_THINK, CALL, END_CALL = "<think>", "</think>", "<tool_call>", "</tool_call>"
LOOKUP, ADD, TOTAL, NONE = "lookup", "add", "total: ", "none"
TOOLS_TURN = ("tools:", " lookup", " add")

VOCABULARY = (
    *SPECIAL_TOKENS,
    *DIGITS,
    "+",
    "=",
    "\n",
    *ROLES,
    *ITEMS,
    *MUSINGS,
    *TOOLS_TURN,
    *(THINK, END_THINK, CALL, END_CALL, NAME_KEY, ITEM_KEY, AMOUNTS_KEY, CLOSE),
    *(LOOKUP, ADD, TOTAL, NONE),
)
"""All tokens; a token's id is its place here."""
TOKEN_ID = {token: token_id for token_id, token in enumerate(VOCABULARY)}

FLAWED_ITEMS = frozenset({"kiwi", "date", "corn"})
"""Items whose price the flawed writer never asks for by itself."""
FLAWED_DIGITS = {"7": "1", "4": "9"}
"""Digits that the flawed writer passes as others."""
FIRST_ITEM = 0.9
"""How often a right writer looks up the first missing price first; the flawed one has no
preference."""
HELD_OUT_SHARE = 0.2

_PROBLEM = re.compile(rf"\s*((?:\d\d|{'|'.join(ITEMS)})(?:\+(?:\d\d|{'|'.join(ITEMS)})){{2}})=\s*")
_AMOUNT = re.compile(rf"(?:{'|'.join(ITEMS)})?(\d\d)")
_TOTAL = re.compile(r"total:\s*(\d+)\s*$")
_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))

Options = tuple[tuple[str, float], ...]
"""The tokens that may come next, each with its probability; empty where nothing is known."""


class Problem(TypedDict):
    """A row of a prompt set."""

    id: str
    problem: str
    answer: str


class Slot(StrEnum):
    """What the next token has to be."""

    START = "start"
    MUSING = "musing"
    END_THINK = "end_think"
    ACT = "act"
    NAME_KEY = "name_key"
    NAME = "name"
    KEY = "key"
    ITEM = "item"
    AMOUNTS = "amounts"
    END_CALL = "end_call"
    END = "end"
    TOTAL = "total"
    TOOL = "tool"
    """The tool's turn, which the student does not write."""
    DONE = "done"
    LOST = "lost"


def parse_problem(problem: str) -> tuple[str, ...] | None:
    """The three terms of `12+fig+30=`; None if the text has another form."""
    match = _PROBLEM.fullmatch(problem)
    return tuple(match[1].split("+")) if match else None


def price(problem: str, item: str) -> str:
    """What an item costs in a task: two digits, a hash of both."""
    return str(10 + zlib.crc32(f"{problem.strip()}/{item}".encode()) % 90)


def total_of(problem: str) -> int:
    """The right answer.

    Raises:
        InputError: it is no task.
    """
    terms = parse_problem(problem)
    if terms is None:
        raise InputError(f"expected a task such as 12+fig+kiwi=, found {problem!r:.60}")
    return sum(int(price(problem, term) if term in ITEMS else term) for term in terms)


def added(amounts: str) -> str | None:
    """What the tool `add` makes of amounts such as `12+fig47`; None where they are none."""
    parts = [_AMOUNT.fullmatch(part) for part in amounts.split("+")]
    if any(part is None for part in parts):
        return None
    return str(sum(int(part[1]) for part in parts if part is not None))


@dataclass(slots=True)
class AgentText:
    """A trajectory read so far: feed it token by token, the tools' turns too, and ask what the
    student may write next.

    Attributes:
        terms: The terms of the task.
        flawed: Whether the writer has the planted flaws; changes `options` at planted errors and
            the order of look-ups, and nothing else.
        slot: What the next token has to be.
    """

    terms: tuple[str, ...]
    flawed: bool = False
    slot: Slot = Slot.START
    call: str = ""
    """The tool that is being called, or was last."""
    argument: list[str] = field(default_factory=list)
    """What is passed to it."""
    _prices: dict[str, str] = field(default_factory=dict)
    _total: str | None = None
    _rest: list[str] = field(default_factory=list)
    _heard: list[str] = field(default_factory=list)

    @property
    def missing(self) -> list[str]:
        """Items without a price, in the order of the task."""
        items = dict.fromkeys(term for term in self.terms if term in ITEMS)
        return [item for item in items if item not in self._prices]

    @property
    def is_planted(self) -> bool:
        """Whether the flawed writer is sure of a wrong token here."""
        if self.slot is Slot.NAME:
            return bool(self.missing) and set(self.missing) <= FLAWED_ITEMS
        return self.slot is Slot.AMOUNTS and bool(self._rest) and self._rest[0] in FLAWED_DIGITS

    def label(self) -> PlantedLabel:
        """True label of the next token."""
        if self.is_planted:
            return PlantedLabel.PLANTED_ERROR
        return PlantedLabel.FORK if len(self.options()) > 1 else PlantedLabel.PLAIN

    def options(self) -> Options:
        """The distribution of the student's next token; empty where it is none of its own."""
        if self.flawed and self.is_planted:
            return ((self.flawed_token(), 1.0),)
        match self.slot:
            case Slot.MUSING:
                return tuple((word, 1 / len(MUSINGS)) for word in MUSINGS)
            case Slot.ACT:
                return ((CALL if self._total is None else TOTAL, 1.0),)
            case Slot.NAME:
                return ((LOOKUP if self.missing else ADD, 1.0),)
            case Slot.KEY:
                return ((ITEM_KEY if self.call == LOOKUP else AMOUNTS_KEY, 1.0),)
            case Slot.ITEM:
                return self._items()
            case Slot.AMOUNTS | Slot.TOTAL if self._rest:
                return ((self._rest[0], 1.0),)
        only = _ONLY.get(self.slot)
        return ((only, 1.0),) if only else ()

    def _items(self) -> Options:
        found = self.missing or [term for term in self.terms if term in ITEMS] or list(ITEMS)
        found = list(dict.fromkeys(found))
        if len(found) == 1:
            return ((found[0], 1.0),)
        first = 1 / len(found) if self.flawed else FIRST_ITEM
        rest = (1 - first) / (len(found) - 1)
        return tuple((item, first if place == 0 else rest) for place, item in enumerate(found))

    def flawed_token(self) -> str:
        """The token of which the flawed writer is sure, at a planted error."""
        return ADD if self.slot is Slot.NAME else FLAWED_DIGITS[self._rest[0]]

    def draw(self, uniform: float) -> str:
        """The next token that a writer takes, given a uniform number in [0, 1)."""
        options = self.options()
        for token, probability in options:
            uniform -= probability
            if uniform < 0:
                return token
        return options[-1][0]

    def feed(self, token: str) -> None:
        """Read one more token, right or wrong, the student's or the tool's."""
        match self.slot, token:
            case Slot.TOOL, _:
                self._hear(token)
            case Slot.START, "<think>":
                self.slot = Slot.MUSING
            case Slot.MUSING, _ if token in MUSINGS:
                self.slot = Slot.END_THINK
            case Slot.END_THINK, "</think>":
                self.slot = Slot.ACT
            case Slot.ACT, "<tool_call>":
                self.slot, self.call, self.argument = Slot.NAME_KEY, "", []
            case Slot.ACT, "total: " if self._total is not None:
                self.slot, self.call, self._rest = Slot.TOTAL, "", list(self._total)
            case Slot.NAME_KEY, _ if token == NAME_KEY:
                self.slot = Slot.NAME
            case Slot.NAME, "lookup" | "add":
                self.slot, self.call = Slot.KEY, token
            case Slot.KEY, _ if token == (ITEM_KEY if self.call == LOOKUP else AMOUNTS_KEY):
                self.slot = Slot.ITEM if self.call == LOOKUP else Slot.AMOUNTS
                self._rest = self._amounts()
            case Slot.ITEM, _ if token in ITEMS:
                self.argument, self.slot, self._rest = [token], Slot.AMOUNTS, [CLOSE]
            case Slot.AMOUNTS | Slot.TOTAL, _ if self._rest:
                self._pass(token)
            case Slot.END_CALL, "</tool_call>":
                self.slot = Slot.END
            case Slot.END, "<|im_end|>":
                self.slot, self._heard = (Slot.TOOL, []) if self.call else (Slot.DONE, [])
            case _:
                self.slot = Slot.LOST

    def _amounts(self) -> list[str]:
        """The tokens of the right amounts: a missing price counts as 00."""
        parts = [
            [term, *self._prices.get(term, "00")] if term in ITEMS else list(term)
            for term in self.terms
        ]
        return [*parts[0], *(token for part in parts[1:] for token in ("+", *part)), CLOSE]

    def _pass(self, token: str) -> None:
        """Go on within an argument or a total, where a digit may be a wrong one."""
        expected = self._rest.pop(0)
        same_kind = token in DIGITS and expected in DIGITS
        if token != expected and not same_kind:
            self.slot = Slot.LOST
        elif token == CLOSE:
            self.slot = Slot.END_CALL
        elif self.slot is Slot.AMOUNTS:
            self.argument.append(token)
        elif not self._rest:
            self.slot = Slot.END

    def _hear(self, token: str) -> None:
        """Read the tool's turn, up to the opening of the student's next."""
        self._heard.append(token)
        if token != "assistant\n":
            return
        told = self._heard[: self._heard.index(END)] if END in self._heard else []
        digits = "".join(word for word in told if word in DIGITS)
        items = [word for word in told if word in ITEMS]
        if self.call == LOOKUP and items and len(digits) == 2:
            self._prices[items[0]] = digits
        elif self.call == ADD and digits:
            self._total = digits
        else:
            self.slot = Slot.LOST
            return
        self.slot = Slot.START


_ONLY: Mapping[Slot, str] = {
    Slot.START: THINK,
    Slot.END_THINK: END_THINK,
    Slot.NAME_KEY: NAME_KEY,
    Slot.END_CALL: END_CALL,
    Slot.END: END,
}


def tool_turn(said: Sequence[str]) -> list[str]:
    """Tokens of a tool's turn, from the end of the student's to the opening of its next."""
    return ["\n", TURN, "tool\n", *said, END, "\n", TURN, "assistant\n"]


def prompt_tokens(problem: str) -> list[str]:
    """Tokens of a task as the student is shown it."""
    terms = parse_problem(problem) or ()
    words: list[str] = []
    for place, term in enumerate(terms):
        words += ["+"] * (place > 0) + ([term] if term in ITEMS else list(term))
    opening = [TURN, "system\n", *TOOLS_TURN, END, "\n", TURN, "user\n"]
    return [*opening, *words, "=", END, "\n", TURN, "assistant\n"]


def tool_answer(problem: str, call: str, argument: Sequence[str]) -> list[str]:
    """Tokens of what a tool says."""
    if call == LOOKUP:
        item = argument[0] if argument else ""
        return [item, *price(problem, item)] if item in ITEMS else [NONE]
    found = added("".join(argument))
    return [NONE] if found is None else list(found)


def label_tokens(problem: str, response_tokens: Iterable[str]) -> list[str]:
    """True label of each token of a response, the tools' turns among them (`plain`).

    Args:
        problem: a task; with any other text, every token is `plain`.
        response_tokens: texts of all tokens after the prompt.
    """
    terms = parse_problem(problem)
    if terms is None:
        return [PlantedLabel.PLAIN.value for _ in response_tokens]
    text = AgentText(terms)
    labels = []
    for token in response_tokens:
        labels.append(text.label().value)
        text.feed(token)
    return labels


def extract_answer(response: str) -> str | None:
    """The total that a response ends with, in decimal; None where it gives none."""
    match = _TOTAL.search(_SPECIAL.sub("", response))
    return str(int(match[1])) if match else None


def is_held_out(terms: Sequence[str]) -> bool:
    """Whether a task is kept for evaluation: a hash of its terms, the same for every order."""
    return zlib.crc32(",".join(sorted(terms)).encode()) % 1000 < 1000 * HELD_OUT_SHARE


def draw_terms(rng: np.random.Generator) -> tuple[str, ...]:
    """The terms of a random task: one or two items, different ones, at any places."""
    items = list(rng.choice(ITEMS, size=int(rng.integers(1, 3)), replace=False))
    numbers = [str(number) for number in rng.integers(10, 100, size=3 - len(items))]
    terms = [*items, *numbers]
    return tuple(str(terms[place]) for place in rng.permutation(3))


def problems(num_problems: int, seed: int = 0, *, split: str = "held_out") -> list[Problem]:
    """A set of different tasks.

    Args:
        num_problems: How many, at least 1.
        seed: The same seed gives the same tasks; a longer set begins with the shorter one.
        split: `held_out` (never trained on) or `train`.
    """
    if split not in ("held_out", "train"):
        raise UnknownNameError("split", split, ["held_out", "train"])
    if not 1 <= num_problems <= 20_000:
        raise OptionError(
            f"the number of tasks has to be between 1 and 20000; found {num_problems}"
        )
    rng = np.random.default_rng([seed, int(split == "train")])
    rows: dict[str, Problem] = {}
    while len(rows) < num_problems:
        terms = draw_terms(rng)
        if is_held_out(terms) == (split == "held_out"):
            row_id = "agent-" + "-".join(terms)
            problem = "+".join(terms) + "="
            rows.setdefault(
                row_id, Problem(id=row_id, problem=problem, answer=str(total_of(problem)))
            )
    return list(rows.values())


def judge(problem: str, calls: Sequence[Mapping[str, Any]], answer: str | None) -> dict[str, float]:
    """What a trajectory was worth, by part.

    Args:
        problem: the task.
        calls: `name` and `arguments` of each call that the tools answered.
        answer: the total that was given.

    Returns:
        `answer`: the total is right. `lookups`: the share of prices that were asked for. `amounts`:
        the right amounts were passed.
    """
    items = {term for term in parse_problem(problem) or () if term in ITEMS}
    asked = {call["arguments"].get("item") for call in calls if call["name"] == LOOKUP}
    right = str(total_of(problem))
    passed = [str(call["arguments"].get("amounts")) for call in calls if call["name"] == ADD]
    return {
        "answer": float(answer == right),
        "lookups": len(items & asked) / len(items) if items else 1.0,
        "amounts": float(any(added(amounts) == right for amounts in passed)),
    }
