"""Sampling rollouts: batched decoding whose every random choice belongs to one rollout and one
position.

The token at a position is the inverse of the student's cumulative distribution at a uniform number
that is a pure function of (seed, rollout id, position). A rollout therefore does not depend on
which others share its batch, a resumed run continues as an uninterrupted one would, and two models
sampled with one seed see common random numbers.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tip_analysis.core.errors import LogitsError, OptionError
from tip_analysis.core.names import FinishReason
from tip_analysis.core.progress import Advance
from tip_analysis.models.abilities import abilities
from tip_analysis.models.batching import TokenBudget
from tip_analysis.models.hidden_states import Continuation
from tip_analysis.models.loading import LanguageModel, overflow_hint

GREEDY_BELOW = 1e-30
"""Temperatures at which float32 logits would overflow: the limit of sampling is the most likely
token."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Statistics of the scorer are those of temperature 1 whatever is set
    here."""

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise OptionError(f"--max-new-tokens must be at least 1, found {self.max_new_tokens}")
        if not self.temperature >= 0.0:
            raise OptionError(f"--temperature must be 0 (greedy) or more, found {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise OptionError(f"--top-p must lie in (0, 1], found {self.top_p}")
        if self.top_k < 0:
            raise OptionError(f"--top-k must be 0 (off) or more, found {self.top_k}")


@dataclass(frozen=True)
class Generation:
    """One sampled response: token ids (end of sequence included), ln P of each at temperature 1,
    and why it ended."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


def sample_sequences(
    model: LanguageModel,
    sequences: Sequence[Sequence[int]],
    names: Sequence[str],
    sampling: Sampling,
    budget: TokenBudget,
    advance: Advance | None = None,
    limits: Sequence[int] | None = None,
) -> list[Generation]:
    """One continuation for each sequence, in batches that the budget allows, in their order.

    Args:
        model: the model that writes.
        sequences: token ids of what it is shown; one entry for each continuation.
        names: of the continuations; each one's random numbers belong to it.
        sampling: temperature, nucleus, length limit and seed.
        budget: tokens a batch, room for continuations included.
        advance: told of progress, in continuations.
        limits: longest continuation of each, where they differ.
    """
    longest = [sampling.max_new_tokens] * len(sequences) if limits is None else limits

    def work(rows: list[int]) -> list[Generation]:
        shown = [sequences[row] for row in rows]
        of_rows = [longest[row] for row in rows]
        return generate(model, shown, [names[row] for row in rows], sampling, of_rows)

    lengths = [len(sequence) + limit for sequence, limit in zip(sequences, longest, strict=True)]
    made: dict[int, Generation] = {}
    for rows, batch in budget.run(lengths, work):
        made |= zip(rows, batch, strict=True)
        if advance is not None:
            advance(len(rows), tokens=sum(len(generation.token_ids) for generation in batch))
    return [made[row] for row in range(len(sequences))]


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    rollout_ids: Sequence[str],
    sampling: Sampling,
    limits: Sequence[int] | None = None,
) -> list[Generation]:
    """Sample one response for each prompt, as one batch; equal prompts share their first pass.

    Args:
        model: the student.
        prompts: token ids of each prompt.
        rollout_ids: one name for each, to which its random numbers belong.
        sampling: temperature, nucleus, length limit and seed.
        limits: length limit of each, where they differ.
    """
    device = model.device
    longest = [sampling.max_new_tokens] * len(prompts) if limits is None else limits
    noise = torch.from_numpy(
        np.stack([uniforms(sampling.seed, name, max(longest)) for name in rollout_ids])
    ).to(device)
    writing = _Writing(model, prompts, rollout_ids, noise, sampling, longest)
    waiting = list(range(len(prompts)))
    while waiting:
        waiting = [row for rows in writing.together(waiting) for row in writing.write(rows)]
    return writing.generations()


class _Writing:
    """Responses that are being written."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        names: Sequence[str],
        noise: Tensor,
        sampling: Sampling,
        limits: Sequence[int],
    ) -> None:
        self.model, self.prompts, self.names = model, prompts, names
        self.noise, self.sampling = noise, sampling
        self.limits = torch.tensor(limits, device=noise.device)
        self.stop = torch.tensor(sorted(model.stop_token_ids), device=noise.device)
        self.no_tokens = model.rows_without_token
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.stopped: set[int] = set()

    def together(self, rows: Sequence[int]) -> list[list[int]]:
        """Rows that one batch may hold."""
        body = abilities(self.model.model)
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in rows:
            length = len(self.prompts[row]) + len(self.tokens[row])
            groups.setdefault(body.together(length), []).append(row)
        return list(groups.values())

    def write(self, begun: Sequence[int]) -> list[int]:
        """Write some rows on as one batch; returns those that another batch must go on with."""
        sequences = [[*self.prompts[row], *self.tokens[row]] for row in begun]
        body = abilities(self.model.model)
        limit = body.goes_on_until(max(map(len, sequences)))
        continuation = Continuation(self.model.model, sequences)
        device = self.noise.device
        rows = torch.tensor(begun, device=device)  # the rollouts that are still being written
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
        written = torch.tensor([len(self.tokens[row]) for row in begun], device=device)
        hidden, leaving = continuation.hidden, []
        while True:
            chosen = self._draw(hidden, rows, written)
            written, lengths = written + 1, lengths + 1
            ended = torch.isin(chosen, self.stop)
            self.stopped.update(rows[ended].tolist())
            going_on = ~ended & (written < self.limits[rows])
            if limit is not None:
                leaving += rows[going_on & (lengths > limit)].tolist()
                going_on &= lengths <= limit
            alive = going_on.nonzero()[:, 0]
            if not len(alive):
                return leaving
            if len(alive) < len(rows):
                rows, chosen, written, lengths = (
                    each[alive] for each in (rows, chosen, written, lengths)
                )
            hidden = continuation.step(alive, chosen)

    def _draw(self, hidden: Tensor, rows: Tensor, written: Tensor) -> Tensor:
        """One token more for each row [n]."""
        logits = self.model.head(hidden).float()
        allowed = logits
        if self.no_tokens is not None:
            allowed = logits.index_fill(1, self.no_tokens.to(logits.device), float("-inf"))
        chosen = draw(allowed, self.noise[rows, written], self.sampling)
        logprobs = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        for row, token, logprob in zip(
            rows.tolist(), chosen.tolist(), logprobs.tolist(), strict=True
        ):
            if math.isnan(logprob):
                self._refuse(row)
            self.tokens[row].append(token)
            self.logprobs[row].append(logprob)
        return chosen

    def _refuse(self, row: int) -> None:
        raise LogitsError(
            f"rollout {self.names[row]!r}, position {len(self.tokens[row])}: {self.model.name}"
            f" answers NaN or +inf{overflow_hint(self.model)}",
            model="student",
        )

    def generations(self) -> list[Generation]:
        """What was written."""
        return [
            Generation(
                self.tokens[row],
                self.logprobs[row],
                FinishReason.STOP if row in self.stopped else FinishReason.LENGTH,
            )
            for row in range(len(self.prompts))
        ]


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Token ids [N] at the quantiles `uniform` [N] of the sampling distribution over logits [N, V].

    The cumulative sum is in float64: in float32 it would be wrong by as much as the rarest tokens'
    probabilities.
    """
    if sampling.temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        smallest_kept = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    probs = logits.softmax(-1)
    if sampling.top_p < 1.0:
        probs = _nucleus(probs, sampling.top_p)
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    target = uniform.to(torch.float64)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)
    last = (
        (probs > 0).to(torch.uint8).cumsum(-1).argmax(-1, keepdim=True)
    )  # guards u·total = total after rounding
    return torch.minimum(index, last)[:, 0]


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Zero everything outside the smallest set of most likely tokens whose mass reaches `top_p`."""
    ordered, order = probs.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probs).scatter(1, order, ordered.masked_fill(before >= top_p, 0.0))


def uniforms(seed: int, rollout_id: str, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) that belong to (seed, rollout_id): float64, from Philox, the same
    on every machine."""
    digest = hashlib.sha256(f"{seed}\x00{rollout_id}".encode()).digest()
    words = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")).random_raw(count)
    return (words >> np.uint64(11)) * 2.0**-53
