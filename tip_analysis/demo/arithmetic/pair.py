"""The arithmetic pair as the rooms below know it: registered as the entry point `arithmetic` of
`tip_analysis.pairs`."""

from collections.abc import Mapping, Sequence
from typing import Any

from tip_analysis.core.errors import OptionError
from tip_analysis.core.toy_pairs import ToyPair
from tip_analysis.demo.agent.pair import AGENT_PAIR
from tip_analysis.demo.arithmetic.language import TOKEN_ID, extract_answer, label_tokens, problems

DEFAULT_NUMBER = 128


def _prompts(source: str) -> Sequence[Mapping[str, Any]]:
    """Problems of `arithmetic:SPLIT:NUMBER`.

    Raises:
        OptionError: the number is none.
    """
    _, _, rest = source.partition(":")
    split, _, number = rest.partition(":")
    if number and not number.isdigit():
        raise OptionError(f"expected arithmetic:SPLIT:NUMBER, found {source!r}")
    return problems(int(number or DEFAULT_NUMBER), split=split or "held_out")


PAIR = ToyPair(
    "arithmetic", TOKEN_ID, _prompts, label_tokens, extract_answer, relatives=(AGENT_PAIR,)
)
