"""The agent pair as the rooms below know it: a relative of the arithmetic pair."""

from collections.abc import Mapping, Sequence
from typing import Any

from tip_analysis.core.errors import OptionError
from tip_analysis.core.toy_pairs import ToyPair
from tip_analysis.demo.agent.language import TOKEN_ID, extract_answer, label_tokens, problems

NAME = "arithmetic-agent"
DEFAULT_NUMBER = 128


def _prompts(source: str) -> Sequence[Mapping[str, Any]]:
    """Tasks of `arithmetic-agent:SPLIT:NUMBER`.

    Raises:
        OptionError: the number is none.
    """
    _, _, rest = source.partition(":")
    split, _, number = rest.partition(":")
    if number and not number.isdigit():
        raise OptionError(f"expected {NAME}:SPLIT:NUMBER, found {source!r}")
    return problems(int(number or DEFAULT_NUMBER), split=split or "held_out")


def _environment() -> Any:
    from tip_analysis.demo.agent.environment import AgentEnvironment

    return AgentEnvironment()


AGENT_PAIR = ToyPair(
    NAME, TOKEN_ID, _prompts, label_tokens, extract_answer, environment=_environment
)
