"""The engine `hf`: this package's own sampler on a loaded model (`rollouts.sampling`)."""

from collections.abc import Sequence
from dataclasses import dataclass
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
        """One continuation for each request, in their order."""
        return sample_sequences(
            self.author,
            [request.token_ids for request in requests],
            [request.name for request in requests],
            sampling,
            self.budget,
            advance,
            [request.limit(sampling) for request in requests],
        )

    def update(self, student: LanguageModel) -> None:
        """Write with this model from now on."""
        self.author = student

    def close(self) -> None:
        """Nothing is held but the model."""
