"""Pairs of models whose language is known, so that tokens have true labels: how the rooms below
`demo` ask for it.

A pair is registered as an entry point of the group `tip_analysis.pairs` whose object is a
`ToyPair`; the embedded ones are registered in the same way as a user's would be.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

ENTRY_POINT_GROUP = "tip_analysis.pairs"


@dataclass(frozen=True)
class ToyPair:
    """What must be known of a pair of models to make its prompts, label its tokens and grade its
    answers."""

    name: str
    """Stands before the colon in a source of prompts, as in `arithmetic:train:1024`."""
    vocabulary: Mapping[str, int]
    """Token to id; a model with just this vocabulary speaks the language."""
    prompts: Callable[[str], Sequence[Mapping[str, Any]]]
    """Rows with `id`, `problem` and `answer` of a source such as `arithmetic:train:1024`."""
    label_tokens: Callable[[str, Sequence[str]], Sequence[str]]
    """(problem, response tokens) -> the true label of each token."""
    extract_answer: Callable[[str], str | None]
    """The integer that ends a response, or None."""
    environment: Callable[[], Any] | None = None
    """Makes the environment that the pair acts in, which has the pair's name; None for a pair of
    single turns."""
    relatives: "tuple[ToyPair, ...]" = ()
    """Pairs that are registered along with it."""


@cache
def toy_pairs() -> dict[str, ToyPair]:
    """The registered pairs by name."""
    pairs: list[ToyPair] = [entry.load() for entry in entry_points(group=ENTRY_POINT_GROUP)]
    return {one.name: one for pair in pairs for one in (pair, *pair.relatives)}


def pair_with_vocabulary(vocabulary: Mapping[str, int]) -> ToyPair | None:
    """The pair whose models have this token-to-id map, if any."""
    return next((pair for pair in toy_pairs().values() if pair.vocabulary == vocabulary), None)
