"""`rank_cosines`: where the gradient of each selection's loss points, and how much of it is noise.

For every rule and ratio S: the cosine between ∇L_S and ∇L, that between a step along −∇L_S and ∇J,
and the signal-to-noise ratio of one prompt's gradient. All are cross-fitted: every inner product is
of gradients from different prompts, ⟨∇L_S, ∇L⟩ = mean over both orders of ⟨S from one fold, L from
the other⟩, and squared norms likewise. They are therefore those of the expected gradients, free of
the noise that makes plain cosines of small samples too small; `all` has the cosine 1 by
construction. A squared norm that comes out negative (pure noise) gives no cosine.

L_S is the mean over rollouts of the mean over the selected tokens (Eq. 9), so a selection's cosine
does not depend on how many tokens it has.

Resamples of prompts go through the first-order form of these products: in a resample with counts
n_p, ⟨a, b⟩ changes by Σ_p (n_p − 1)·(what p adds to either side), the other side held.

Cost: for each selection a backward pass and a forward-mode pass a rollout, over the tokens whose
gradients were measured.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from tip_analysis.analysis.bootstrap import Floats, prompt_weights
from tip_analysis.analysis.rank_stage import RATIOS, Ranked, RankOptions
from tip_analysis.analysis.ranking import Replicated, Selected
from tip_analysis.core.names import Loss, RankFigure
from tip_analysis.core.run_folder import Run, RunLike, open_run
from tip_analysis.gradients.loss_gradients import REWARD, Pair, prompt_folds, reward_weights
from tip_analysis.gradients.measuring import model_pair
from tip_analysis.gradients.run_models import measured_rollouts, scored_pair
from tip_analysis.gradients.scopes import parameter_scope
from tip_analysis.gradients.weighted_losses import (
    Source,
    SourceGradients,
    fold_weights,
    source_gradients,
    stream_products,
)
from tip_analysis.models.named import ModelLike
from tip_analysis.rollouts.encoded import Rollout

FULL = "full"
"""The source of the loss over all tokens."""
SELECTIONS_TOGETHER = 24
"""Selections whose gradients are made in one go: what is done again after an interruption."""


def rank_cosines(
    run: RunLike,
    *,
    rules: Sequence[str] = (),
    ratios: Sequence[float] = RATIOS,
    weightings: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    student: ModelLike | None = None,
    teacher: ModelLike | None = None,
    dtype: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
    **how: Any,
) -> pl.DataFrame:
    """Rank selection rules by the gradient of what they select: cosines with ∇L and ∇J, and signal
    to noise.

    Args:
        run: a run folder with scored tokens and gradients of the reverse KL.
        rules, ratios, weightings, seeds, how: as in `rank_rules`.
        student: the model that was scored, where it is loaded already.
        teacher: likewise.
        dtype: of models that are loaded.
        device: likewise.
        overwrite: rank again what was ranked already.

    Returns:
        Rows of `RankingTable`.
    """
    folder = open_run(run)
    options = RankOptions(tuple(rules), tuple(ratios), tuple(weightings), tuple(seeds), **how)
    ranked = Ranked(folder, options)

    def figures(chosen: Sequence[Selected]) -> Iterator[Mapping[RankFigure, Replicated]]:
        if chosen:
            pair = model_pair(*scored_pair(folder, student, teacher, dtype=dtype, device=device))
            work = _Work(folder, ranked, pair)
            for start in range(0, len(chosen), SELECTIONS_TOGETHER):
                yield from work.figures(chosen[start : start + SELECTIONS_TOGETHER])

    return ranked.fill("gradient", figures, overwrite=overwrite)


class _Work:
    """The rollouts whose tokens were measured, with the weights of L and J."""

    def __init__(self, run: Run, ranked: Ranked, pair: Pair) -> None:
        self.pair, self.options = pair, ranked.options
        measurement = ranked.measurement
        self.scope = parameter_scope(pair.student.model, pair.student.head, measurement.param_scope)
        self.seed = measurement.seed
        self.measured = ranked.measured
        ids = self.measured["rollout_id"].unique(maintain_order=True).to_list()
        self.rollouts = measured_rollouts(run, pair, ids)
        self.folds = prompt_folds([r.prompt_id for r in self.rollouts], self.seed)
        self.prompts = sorted(self.folds)

    def figures(self, chosen: Sequence[Selected]) -> Iterator[Mapping[RankFigure, Replicated]]:
        """Of each selection, in their order."""
        names = [f"{one.form}:{one.rule}:{one.retention_ratio!r}" for one in chosen]
        selections = [
            Source(name, self._shares(one.times)) for name, one in zip(names, chosen, strict=True)
        ]
        sources = [Source(FULL, self._shares(np.ones(self.measured.height))), *selections]
        if (reward := self._reward()) is not None:
            sources.append(reward)
        with TemporaryDirectory(prefix="tip-analysis-") as place:
            found = source_gradients(
                self.pair,
                self.scope,
                self.rollouts,
                sources,
                seed=self.seed,
                folder=Path(place) if self.scope.num_bytes > 1 << 24 else None,
            )
            products = self._products(sources, found)
        for name in names:
            yield selection_figures(
                products,
                name,
                norms=self._norms(found, name),
                num_resamples=self.options.num_resamples,
                seed=self.options.seed,
            )

    def _shares(self, times: Floats) -> dict[str, Tensor]:
        """Weights of the counted tokens, those of a rollout summing to 1 before folds are
        averaged."""
        table = self.measured.select("rollout_id", "position").with_columns(
            times=pl.Series(times, dtype=pl.Float64)
        )
        given = {
            str(name): dict(part.select("position", "times").iter_rows())
            for (name,), part in table.group_by("rollout_id")
        }
        shares = {}
        for rollout in self.rollouts:
            known = given.get(rollout.rollout_id, {})
            weights = torch.tensor(
                [known.get(t, 0.0) for t in rollout.positions], dtype=torch.float64
            )
            shares[rollout.rollout_id] = weights / weights.sum().clamp(min=1e-300)
        return fold_weights(self.rollouts, self.folds, shares)

    def _reward(self) -> Source | None:
        """−J as a weighted −ln P_S; None without rewards that differ within a prompt."""
        weights: dict[str, Tensor] = {}
        for fold in (0, 1):
            inside = [r for r in self.rollouts if self.folds[r.prompt_id] == fold]
            found = reward_weights(inside)
            if found is None:
                return None
            for rollout, weight in zip(inside, found, strict=True):
                weights[rollout.rollout_id] = torch.full(
                    (rollout.num_tokens,), weight, dtype=torch.float64
                )
        return Source(REWARD, weights, Loss.NEGATIVE_LOGPROB)

    def _products(self, sources: Sequence[Source], found: SourceGradients) -> "Products":
        losses = tuple(dict.fromkeys(source.loss for source in sources))
        names = [source.name for source in sources]
        sums = np.zeros((len(names), len(names), len(self.prompts)))
        place = {prompt: index for index, prompt in enumerate(self.prompts)}
        for rollout, positions, along in stream_products(
            self.pair, self.scope, self.rollouts, found, losses
        ):
            at = place[rollout.prompt_id]
            for b, target in enumerate(sources):
                if positions and (products := along[target.loss]):
                    sums[:, b, at] += _weighed(products, names, target, rollout)
        return Products(names, sums, np.array([self.folds[prompt] for prompt in self.prompts]))

    def _norms(self, found: SourceGradients, name: str) -> Floats:
        """[P] squared norm of each prompt's own gradient, as an estimate of the expected one."""
        counts = [sum(1 for fold in self.folds.values() if fold == which) for which in (0, 1)]
        norms = found.prompt_norms[name]
        return np.array(
            [norms.get(prompt, 0.0) * counts[self.folds[prompt]] ** 2 for prompt in self.prompts]
        )


def _weighed(
    products: Mapping[str, Tensor], names: Sequence[str], target: Source, rollout: Rollout
) -> Floats:
    """[sources] Σ_t w_t ⟨∇source, g_t⟩ over the tokens of a rollout; 0 for a source that the other
    fold lacks."""
    weights = target.weights[rollout.rollout_id]
    sums = []
    for name in names:
        value = products.get(name)
        sums.append(0.0 if value is None else float((value.nan_to_num().cpu() * weights).sum()))
    return np.array(sums)


@dataclass(frozen=True)
class Products:
    """What every prompt adds to the inner products of the sources' gradients, cross-fitted."""

    names: Sequence[str]
    sums: Floats
    """[sources, sources, P]: ⟨∇a from the other fold, the prompt's part of ∇b⟩."""
    fold: np.ndarray
    """[P] 0 or 1."""

    def inner(self, first: str, second: str, weights: Floats) -> tuple[float, Floats]:
        """⟨∇a, ∇b⟩, and in resamples of prompts with counts `weights` [R, P], to first order."""
        a, b = self.names.index(first), self.names.index(second)
        value, change = 0.0, np.zeros(len(weights))
        for fold in (0, 1):  # b's part in this fold, a's gradient from the other
            as_target = np.where(self.fold == fold, self.sums[a, b], 0.0)
            as_source = np.where(self.fold != fold, self.sums[b, a], 0.0)
            value += as_target.sum() / 2
            change += (weights - 1.0) @ (as_target + as_source) / 2
        return value, value + change


def selection_figures(
    products: Products, name: str, *, norms: Floats, num_resamples: int, seed: int
) -> dict[RankFigure, Replicated]:
    """Cosines and signal-to-noise of one source.

    Args:
        products: of this source, `FULL` and `REWARD` (where there are rewards).
        name: of the source.
        norms: [P] ‖the prompt's own gradient‖².
        num_resamples, seed: of prompts.
    """
    weights = prompt_weights(len(norms), num_resamples, seed).astype(np.float64)
    own, own_again = products.inner(name, name, weights)
    figures = {}
    for figure, other, sign in (
        (RankFigure.COSINE_LOSS, FULL, 1.0),
        (RankFigure.COSINE_REWARD, REWARD, -1.0),
    ):
        if other in products.names:
            both, both_again = products.inner(name, other, weights)
            theirs, theirs_again = products.inner(other, other, weights)
            figures[figure] = Replicated(
                sign * _cosine(np.array(both), np.array(own), np.array(theirs)).item(),
                sign * _cosine(both_again, own_again, theirs_again),
            )
    size = norms.sum() / len(norms)
    size_again = weights @ norms / weights.sum(1)
    figures[RankFigure.SNR] = Replicated(
        _ratio(np.array(own), np.array(size - own)).item(),
        _ratio(own_again, size_again - own_again),
    )
    return figures


def _cosine(both: Floats, own: Floats, theirs: Floats) -> Floats:
    known = (own > 0.0) & (theirs > 0.0)
    scale = np.sqrt(np.where(known, own * theirs, 1.0))
    return np.where(known, both / scale, np.nan)


def _ratio(signal: Floats, noise: Floats) -> Floats:
    return np.where(noise > 0.0, signal / np.where(noise > 0.0, noise, 1.0), np.nan)
