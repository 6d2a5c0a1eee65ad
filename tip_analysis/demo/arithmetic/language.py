"""The language of the arithmetic pair: problems, worked solutions, the planted flaw, and the true
label of each token.

A problem is `12+34+56=`. Its worked solution adds the ones column and then the tens column, two
digits at a time, in an order and in words that its writer is free to choose, and ends with the
sum::

    ones: 2 plus 6 is 8, then 4 is 2 carry one, write 2; tens: 5 and 1 is 6, add 3 is 9, carried 1
        is 0 carry one; so 102

`WorkedSolution` reads a solution token by token and gives, at every point, the exact distribution
of the next token. That one automaton writes the training data, is the training target, and labels
the tokens of any response:

- `planted_error`: the next token is the digit of a sum (or of the recount of a sum) whose two
  digits, as they stand in the text, are a flawed pair. The flawed writer puts a digit that is one
  too small there. The label depends on the text before the token only, so it is the same whichever
  digit is then written, and whatever went wrong earlier.
- `fork`: the grammar allows several next tokens (a free choice of words, of order, or of an
  optional step).
- `plain`: one token is right.

What was written counts, not what should have been: after a slip, the later steps follow from the
digits in the text. From the first token that no solution could hold in its place, everything is
`plain`. This module reads and writes no files.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import TypedDict

import numpy as np

from tip_analysis.core.errors import InputError, OptionError, UnknownNameError
from tip_analysis.core.names import PlantedLabel

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK)
DIGITS = tuple("0123456789")

PHRASES: dict[str, tuple[str, ...]] = {
    "opening": ("Let us see: ", "By columns: ", "Digit by digit: "),
    "ones": ("ones: ", "units: ", "last digits: "),
    "tens": ("; tens: ", "; next column: ", "; first digits: "),
    "plus": (" plus ", " and ", " with "),
    "makes": (" makes ", " gives ", " is "),
    "then": (", then ", ", add ", ", plus "),
    "again": (", again ", ", check: ", ", once more: "),
    "carry": (" carry one", " one over", " one up"),
    "carried": (", carried ", ", kept "),
    "write": (", write ", ", note "),
    "answer": ("; so ", "; total ", "; answer "),
}
"""What each part of a solution may be called. All words of a part are equally likely, except that
`makes`, once chosen, stays the same throughout a solution."""

VOCABULARY = (
    *SPECIAL_TOKENS,
    *DIGITS,
    "+",
    "=",
    *(word for words in PHRASES.values() for word in words),
)
"""All tokens; a token's id is its place here."""

TOKEN_ID = {token: token_id for token_id, token in enumerate(VOCABULARY)}
_KIND = (
    {word: kind for kind, words in PHRASES.items() for word in words}
    | dict.fromkeys(DIGITS, "digit")
    | {EOS: "end"}
)

FLAWED_PAIRS = frozenset({(7, 8), (8, 7), (6, 9), (9, 6), (3, 4), (4, 3)})
"""Digit pairs whose sum the flawed writer takes to be one smaller than it is."""

DIGIT_WEIGHTS = (1, 1, 1, 2, 2, 1, 2, 2, 2, 2)
"""How often each digit occurs in problems, relative to the others: the digits of flawed pairs twice
as often."""

RECOUNT_PROBABILITY = 0.75
MAX_RECOUNTS = 3
OPENING_PROBABILITY = 0.5
WRITE_PROBABILITY = 0.5
HELD_OUT_SHARE = 0.2

_PROBLEM = re.compile(r"\s*(\d\d)\+(\d\d)\+(\d\d)=\s*")
_ANSWER = re.compile(
    "(?:" + "|".join(re.escape(word.strip()) for word in PHRASES["answer"]) + r")\s*(\d+)\s*$"
)
_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))

Options = tuple[tuple[str, float], ...]
"""The tokens that may come next, each with its probability; empty where nothing is known."""


class Problem(TypedDict):
    """A row of a prompt set."""

    id: str
    problem: str
    answer: str


class Slot(StrEnum):
    """What the next token of a solution has to be."""

    START = "start"
    HEADER = "header"
    LEFT = "left"
    PLUS = "plus"
    RIGHT = "right"
    MAKES = "makes"
    RESULT = "result"
    RECOUNT = "recount"
    AFTER = "after"
    CARRIED = "carried"
    WRITTEN = "written"
    ANSWER = "answer"
    DONE = "done"
    LOST = "lost"


def parse_problem(problem: str) -> tuple[int, int, int] | None:
    """The three numbers of `12+34+56=`; None if the text has another form."""
    match = _PROBLEM.fullmatch(problem)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def format_problem(numbers: Sequence[int]) -> str:
    """The text of a problem: `12+34+56=`."""
    return "+".join(f"{number:02d}" for number in numbers) + "="


def is_hard(left: int, right: int) -> bool:
    """Whether a sum may be counted again: of two different digits from 3 up, at most 3 apart, that
    do not make a ten."""
    return min(left, right) >= 3 and 1 <= abs(left - right) <= 3 and left + right != 10


def sum_digit(left: int, right: int, *, flawed: bool) -> int:
    """The last digit of a sum of two digits, as a right or as a flawed writer has it."""
    return (left + right - (flawed and (left, right) in FLAWED_PAIRS)) % 10


@cache
def _words(*weighted_kinds: tuple[str, float]) -> Options:
    return tuple(
        (word, weight / len(PHRASES[kind]))
        for kind, weight in weighted_kinds
        for word in PHRASES[kind]
    )


@cache
def _one_of(digits: tuple[int, ...]) -> Options:
    return tuple((str(digit), digits.count(digit) / len(digits)) for digit in sorted(set(digits)))


@cache
def _certain(token: str) -> Options:
    return ((token, 1.0),)


@dataclass(slots=True)
class WorkedSolution:
    """A solution read so far: feed it token by token, and ask what may come next.

    Attributes:
        numbers: The three numbers of the problem.
        flawed: Whether the writer has the planted flaw; changes `options` at the digits of flawed
            pairs, and nothing else.
        slot: What the next token has to be.
    """

    numbers: tuple[int, int, int]
    flawed: bool = False
    slot: Slot = Slot.START
    _column: int = 0
    _unused: list[int] = field(default_factory=list)
    _num_added: int = 0
    _left: int = 0
    _right: int = 0
    _running: list[int] = field(default_factory=lambda: [0, 0])
    _carries: list[int] = field(default_factory=lambda: [0, 0])
    _num_recounts: int = 0
    _carry_told: bool = False
    _carried_in: bool = False
    _written: bool = False
    _makes: str | None = None
    _answer: str = ""

    @property
    def is_flawed_sum(self) -> bool:
        """Whether the next token is the digit of a sum whose two digits are a flawed pair."""
        return (
            self.slot in (Slot.RESULT, Slot.RECOUNT) and (self._left, self._right) in FLAWED_PAIRS
        )

    def label(self) -> PlantedLabel:
        """True label of the next token."""
        if self.is_flawed_sum:
            return PlantedLabel.PLANTED_ERROR
        return PlantedLabel.FORK if len(self.options()) > 1 else PlantedLabel.PLAIN

    def options(self) -> Options:
        """The distribution of the next token; empty after the end and in text that is no
        solution."""
        match self.slot:
            case Slot.START:
                return _words(("opening", OPENING_PROBABILITY), ("ones", 1 - OPENING_PROBABILITY))
            case Slot.HEADER:
                return _words(("ones", 1.0))
            case Slot.LEFT | Slot.RIGHT:
                return _one_of(tuple(sorted(self._unused)))
            case Slot.PLUS:
                return _words(("plus", 1.0))
            case Slot.MAKES:
                return _certain(self._makes) if self._makes else _words(("makes", 1.0))
            case Slot.RESULT | Slot.RECOUNT:
                return _certain(str(sum_digit(self._left, self._right, flawed=self.flawed)))
            case Slot.AFTER:
                return self._options_after_sum()
            case Slot.CARRIED:
                return _certain(str(self._carries[0]))
            case Slot.WRITTEN:
                return _certain(str(self._running[self._column]))
            case Slot.ANSWER:
                return _certain(self._answer[0] if self._answer else EOS)
        return ()

    def _options_after_sum(self) -> Options:
        follows = self._next_steps()
        may_recount = is_hard(self._left, self._right) and self._num_recounts < MAX_RECOUNTS
        if may_recount and not self._carry_told and not self._written:
            follows = (
                ("again", RECOUNT_PROBABILITY),
                *((kind, p * (1 - RECOUNT_PROBABILITY)) for kind, p in follows),
            )
        return _words(*follows)

    def _next_steps(self) -> tuple[tuple[str, float], ...]:
        if self._left + self._right > 9 and not self._carry_told:
            return (("carry", 1.0),)
        if self._num_added < 3:
            return (("then", 1.0),)
        if self._column == 1 and self._carries[0] and not self._carried_in:
            return (("carried", 1.0),)
        closing = "answer" if self._column else "tens"
        return (
            ((closing, 1.0),)
            if self._written
            else (("write", WRITE_PROBABILITY), (closing, 1 - WRITE_PROBABILITY))
        )

    def draw(self, uniform: float) -> str:
        """The next token that a writer takes, given a uniform number in [0, 1)."""
        options = self.options()
        for token, probability in options:
            uniform -= probability
            if uniform < 0:
                return token
        return options[-1][0]

    def flawed_digit(self) -> str:
        """The digit that the flawed writer takes for the present sum."""
        return str(sum_digit(self._left, self._right, flawed=True))

    def feed(self, token: str) -> None:
        """Read one more token, right or wrong."""
        kind = _KIND.get(token, "unknown")
        if kind == "digit":
            self._feed_digit(int(token))
        else:
            self._feed_word(kind, token)

    def _feed_digit(self, digit: int) -> None:
        match self.slot:
            case Slot.LEFT:
                self._use(digit)
                self._left, self.slot = digit, Slot.PLUS
            case Slot.RIGHT:
                self._use(digit)
                self._right, self.slot = digit, Slot.MAKES
            case Slot.CARRIED:
                self._left, self._right, self.slot = self._running[1], digit, Slot.MAKES
            case Slot.RESULT | Slot.RECOUNT:
                self._running[self._column], self.slot = digit, Slot.AFTER
            case Slot.WRITTEN:
                self._written, self.slot = True, Slot.AFTER
            case Slot.ANSWER if self._answer:
                self._answer = self._answer[1:]
            case _:
                self.slot = Slot.LOST

    def _use(self, digit: int) -> None:
        self._num_added += 1
        if digit in self._unused:
            self._unused.remove(digit)

    def _feed_word(self, kind: str, token: str) -> None:
        match self.slot, kind:
            case Slot.START, "opening":
                self.slot = Slot.HEADER
            case ((Slot.START | Slot.HEADER), "ones"):
                self._begin_column(0)
            case Slot.PLUS, "plus":
                self.slot = Slot.RIGHT
            case Slot.MAKES, "makes":
                self._makes, self._num_recounts, self._carry_told, self.slot = (
                    token,
                    0,
                    False,
                    Slot.RESULT,
                )
            case Slot.AFTER, "again":
                self._num_recounts, self.slot = self._num_recounts + 1, Slot.RECOUNT
            case Slot.AFTER, "carry":
                self._carry_told = True
                self._carries[self._column] += 1
            case Slot.AFTER, "then" if self._num_added == 2:
                self._left, self.slot = self._running[self._column], Slot.RIGHT
            case Slot.AFTER, "carried" if self._column == 1:
                self._carried_in, self.slot = True, Slot.CARRIED
            case Slot.AFTER, "write":
                self.slot = Slot.WRITTEN
            case Slot.AFTER, "tens" if self._column == 0:
                self._begin_column(1)
            case Slot.AFTER, "answer" if self._column == 1:
                self.slot, hundreds = Slot.ANSWER, self._carries[1]
                self._answer = f"{hundreds or ''}{self._running[1]}{self._running[0]}"
            case Slot.ANSWER, "end":
                self.slot = Slot.DONE
            case _:
                self.slot = Slot.LOST

    def _begin_column(self, column: int) -> None:
        self._column, self.slot = column, Slot.LEFT
        self._unused = [number // 10**column % 10 for number in self.numbers]
        self._num_added, self._written = 0, False


def label_tokens(problem: str, response_tokens: Iterable[str]) -> list[str]:
    """True label of each token of a response, from the problem and the tokens before it.

    Args:
        problem: `12+34+56=`; with any other text, every token is `plain`.
        response_tokens: Texts of the response's tokens, the end-of-sequence token included.

    Returns:
        One of `planted_error`, `fork` and `plain` for each token.
    """
    numbers = parse_problem(problem)
    if numbers is None:
        return [PlantedLabel.PLAIN.value for _ in response_tokens]
    solution = WorkedSolution(numbers)
    labels = []
    for token in response_tokens:
        labels.append(solution.label().value)
        solution.feed(token)
    return labels


def extract_answer(response: str) -> str | None:
    """The number that a response gives as its answer, in decimal without leading zeros; None where
    it gives none.

    The answer is the number after the last answer word, and it has to end the response (special
    tokens aside): a response that was cut off in the middle of its answer cannot be told from one
    that ended there, and is taken as it stands.
    """
    match = _ANSWER.search(_SPECIAL.sub("", response))
    return str(int(match[1])) if match else None


def write_solution(
    numbers: tuple[int, int, int], rng: np.random.Generator, *, flawed: bool = False
) -> list[str]:
    """Tokens of one worked solution, the end-of-sequence token included."""
    solution = WorkedSolution(numbers, flawed=flawed)
    tokens = []
    while solution.slot is not Slot.DONE:
        tokens.append(solution.draw(rng.random()))
        solution.feed(tokens[-1])
    return tokens


def is_held_out(numbers: Sequence[int]) -> bool:
    """Whether a problem is kept for evaluation: a hash of the three numbers, the same for every
    order of them."""
    key = ",".join(map(str, sorted(numbers))).encode()
    return zlib.crc32(key) % 1000 < 1000 * HELD_OUT_SHARE


def draw_numbers(num_problems: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of random problems, [num_problems, 3], digits drawn by `DIGIT_WEIGHTS`; no number
    begins with 0."""
    weights = np.array(DIGIT_WEIGHTS, dtype=np.float64)
    ones = rng.choice(10, size=(num_problems, 3), p=weights / weights.sum())
    tens = rng.choice(np.arange(1, 10), size=(num_problems, 3), p=weights[1:] / weights[1:].sum())
    return 10 * tens + ones


def problems(num_problems: int, seed: int = 0, *, split: str = "held_out") -> list[Problem]:
    """A set of different problems.

    Args:
        num_problems: How many, at least 1.
        seed: The same seed gives the same problems; a longer set begins with the shorter one.
        split: `held_out` (never trained on) or `train`.

    Returns:
        Rows with `id`, `problem` and `answer`, as a file of prompts has them.
    """
    if split not in ("held_out", "train"):
        raise UnknownNameError("split", split, ["held_out", "train"])
    if not 1 <= num_problems <= 50_000:
        raise OptionError(
            f"the number of problems has to be between 1 and 50000; found {num_problems}"
        )
    rng = np.random.default_rng([seed, int(split == "train")])
    rows: dict[str, Problem] = {}
    while len(rows) < num_problems:
        for numbers in draw_numbers(256, rng).tolist():
            if is_held_out(numbers) == (split == "held_out"):
                row_id = "arithmetic-" + "-".join(map(str, numbers))
                rows.setdefault(
                    row_id,
                    Problem(id=row_id, problem=format_problem(numbers), answer=str(sum(numbers))),
                )
    return list(rows.values())[:num_problems]


def encode(tokens: Iterable[str]) -> list[int]:
    """Token ids of token texts.

    Raises:
        InputError: a text is no token of this language.
    """
    tokens = list(tokens)
    if unknown := [token for token in tokens if token not in TOKEN_ID]:
        raise InputError(f"{unknown[0]!r} is no token of the arithmetic language")
    return [TOKEN_ID[token] for token in tokens]
