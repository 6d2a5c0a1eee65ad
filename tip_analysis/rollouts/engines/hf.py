"""The engine `hf`: this package's own sampler on a loaded model (`rollouts.sampling`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from tip_analysis.core.names import SamplingEngine
from tip_analysis.core.progress import Advance
from tip_analysis.models.batching import TokenBudget
from tip_analysis.models.loading import LanguageModel
from tip_analysis.rollouts.engines.engine import Request
from tip_analysis.rollouts.sampling import Generation, Sampling, sample_sequences


@dataclass
class HFEngine:
    """A rollout depends on its prefix, its name and the seed; not on its batch."""

    author: LanguageModel
    budget: TokenBudget
    """Tokens a batch, room for continuations included."""

    kind = SamplingEngine.HF
    rollouts_per_shard = 64

    def identity(self) -> dict[str, Any]:
        """Nothing beside model and sampling: records made before there were engines stay valid."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Where it runs, and in batches of what size."""
        return {"device": str(self.author.device), "token_budget": self.budget.tokens}

    def expect(self, longest: int) -> None:
        """Nothing is set up in advance."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, advance: Advance | None = None
    ) -> list[Generation]:
        """One continuation for each request, in their order; batches are of one length limit."""
        made: dict[int, Generation] = {}
        order = sorted(range(len(requests)), key=lambda row: requests[row].limit(sampling))
        for limit, group in groupby(order, key=lambda row: requests[row].limit(sampling)):
            rows = list(group)
            written = sample_sequences(
                self.author,
                [requests[row].token_ids for row in rows],
                [requests[row].name for row in rows],
                replace(sampling, max_new_tokens=limit),
                self.budget,
                advance,
            )
            made |= zip(rows, written, strict=True)
        return [made[row] for row in range(len(requests))]

    def update(self, student: LanguageModel) -> None:
        """Write with this model from now on."""
        self.author = student

    def close(self) -> None:
        """Nothing is held but the model."""
