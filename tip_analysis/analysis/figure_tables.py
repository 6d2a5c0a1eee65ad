"""The result table behind each figure, made from a run: what `tip.figures.NAME(run)` draws.

Reads a run; writes nothing. Each maker gives the table and what else the figure is told; it raises
`RunError` where the run lacks a stage, and says which command makes it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from tip_analysis.analysis import groups, mask_tables
from tip_analysis.analysis.ablation_tables import (
    arm_accuracies,
    claim_effects,
    differences_from_all,
    final_arms,
    paper_differences_from_all,
    paper_memory,
    relative_memory,
)
from tip_analysis.analysis.benchmarks import benchmarks_of
from tip_analysis.analysis.claims import claims_table
from tip_analysis.analysis.coverage_tables import coverage_curve as coverage_of
from tip_analysis.analysis.densities import density
from tip_analysis.analysis.dynamics import METRICS, dynamics_curves
from tip_analysis.analysis.gradient_tables import (
    DIVERGENCE,
    gradient_profile,
    gradient_statistics,
    logit_profile,
)
from tip_analysis.analysis.gradient_tables import energy_shares as energy_of
from tip_analysis.analysis.groupings import available_groupings
from tip_analysis.analysis.paper_preset import PAPER_RANGES
from tip_analysis.analysis.quadrants import cut_sensitivity as sensitivity_of
from tip_analysis.analysis.run_view import RunView
from tip_analysis.analysis.shown_masks import (
    compared_masks,
    compared_tokens,
    mean_composition,
    overlap_at_one_ratio,
    tokens_with_alignment,
)
from tip_analysis.core.errors import RunError

MEASURES = {
    DIVERGENCE: "mean divergence, nats",
    "grad_norm_sq": "mean ‖g‖²",
    "grad_dot_loss": "mean φ",
}
"""What a quadrant's profile shows, in words."""


@dataclass(frozen=True)
class Drawn:
    """A result table, and what else its figure is told."""

    table: pl.DataFrame
    options: dict[str, Any] = field(default_factory=dict)


def quadrant_shares(view: RunView) -> Drawn:
    """Shares beside the paper's ranges."""
    return Drawn(view.share_table, {"paper_ranges": PAPER_RANGES})


def quadrant_map(view: RunView) -> Drawn:
    """The density of all tokens, with the cuts."""
    return Drawn(density(view.tokens, view.cuts), {**_cuts(view), "shares": view.share_of})


def cut_sensitivity(view: RunView) -> Drawn:
    """Shares over a grid of cuts."""
    return Drawn(sensitivity_of(view.raw, in_use=view.cuts), _cuts(view))


def _cuts(view: RunView) -> dict[str, float | None]:
    return {"entropy_cut": view.cuts.entropy.value, "divergence_cut": view.cuts.divergence.value}


def quadrant_profile(view: RunView) -> Drawn:
    """Means by quadrant; over the logits where no gradients were measured."""
    if not view.losses:
        return Drawn(logit_profile(view, divergence=MEASURES[DIVERGENCE], norm="mean logit ‖g‖"))
    return Drawn(gradient_profile(_gradients(view), MEASURES))


def energy_shares(view: RunView) -> Drawn:
    """Shares of the tokens, of Σ‖g‖² and of Σφ."""
    return Drawn(energy_of(_gradients(view)))


def _gradients(view: RunView) -> dict[str, pl.DataFrame]:
    _require(view, "gradients", "gradients", f"tip-analysis gradients {view.run.path}")
    if not view.losses:
        raise RunError(f"{view.run.path}: no measurement of gradients is preferred; name one")
    return {loss: gradient_statistics(view, loss) for loss in view.losses}


def group_shares(view: RunView) -> Drawn:
    """Quadrants by position, frequency and kind of token."""
    parts = [
        groups.group_effects(
            view.raw, grouping=name, num_resamples=2, taxonomy=view.options.taxonomy
        )
        for name in available_groupings(view.raw)
    ]
    return Drawn(pl.concat(parts))


def composition(view: RunView) -> Drawn:
    """What each recorded selection is made of."""
    made = mask_tables.composition(_masks(view), compared_tokens(view))
    return Drawn(mean_composition(made))


def overlap(view: RunView) -> Drawn:
    """How far the recorded selections agree at one ρ."""
    pairs = overlap_at_one_ratio(_masks(view))
    if pairs is None:
        raise RunError(f"{view.run.path}: no two rules have masks at one ρ, so none overlap")
    return Drawn(pairs[1])


def coverage_curve(view: RunView) -> Drawn:
    """How much of Σφ, or of Σ reverse KL where no gradients were measured, each rule keeps."""
    masks, tokens = _masks(view), tokens_with_alignment(view)
    has_phi = "grad_dot_loss" in tokens.collect_schema().names()
    column = "grad_dot_loss" if has_phi else "reverse_kl"
    table = coverage_of(
        masks, tokens, columns=[column], num_resamples=min(200, view.options.num_resamples)
    )
    return Drawn(table, {"label": "Σφ" if has_phi else "Σ reverse KL"})


def _masks(view: RunView) -> pl.DataFrame:
    _require(view, "masks", "masks", f"tip-analysis select {view.run.path} --rules …")
    return compared_masks(view)


def accuracy_by_ratio(view: RunView) -> Drawn:
    """Accuracy of each arm, on the first benchmark."""
    arms, first = _arms(view)
    drawn = arm_accuracies(view.run.ablations().collect()).filter(benchmark=first)
    return Drawn(drawn, {"metric": f"mean@{arms['num_samples'][0]}"})


def difference_from_all(view: RunView) -> Drawn:
    """Accuracy minus that of training on all tokens, on the first benchmark."""
    arms, first = _arms(view)
    ours = differences_from_all(arms)
    if ours.is_empty():
        raise RunError(f"{view.run.path}: no arm `all` to compare with; ablate with --rules all …")
    theirs = paper_differences_from_all(ours).filter(benchmark=first)
    return Drawn(ours.filter(benchmark=first), {"paper": theirs})


def claims(view: RunView) -> Drawn:
    """The paper's claims on this run."""
    return Drawn(claim_effects(claims_table(_arms(view)[0])))


def memory_by_ratio(view: RunView) -> Drawn:
    """Peak memory of training over that of ρ = 1."""
    return Drawn(relative_memory(_arms(view)[0]), {"paper": paper_memory()})


def training_curves(view: RunView) -> Drawn:
    """What students wrote over the steps of their training."""
    command = f"tip-analysis ablate {view.run.path} --rules … --dynamics-every 1"
    _require(view, "dynamics", "record of training steps", command)
    return Drawn(dynamics_curves(view.run.dynamics().collect()), {"words": METRICS})


def _arms(view: RunView) -> tuple[pl.DataFrame, str]:
    """Arms that were trained to their end, and the first benchmark."""
    command = f"tip-analysis ablate {view.run.path} --rules …"
    _require(view, "ablations", "ablations", command)
    arms = final_arms(view.run.ablations().collect())
    if arms.is_empty():
        raise RunError(f"{view.run.path}: no arm was trained to its end; `{command}` goes on")
    return arms, benchmarks_of(arms)[0]


def _require(view: RunView, table: str, what: str, command: str) -> None:
    if not view.run.has(table):
        raise RunError(f"{view.run.path} has no {what} yet; `{command}` makes them")


MAKERS: dict[str, Callable[[RunView], Drawn]] = {
    make.__name__: make
    for make in (
        quadrant_shares,
        quadrant_map,
        cut_sensitivity,
        quadrant_profile,
        energy_shares,
        group_shares,
        composition,
        overlap,
        coverage_curve,
        accuracy_by_ratio,
        difference_from_all,
        claims,
        memory_by_ratio,
        training_curves,
    )
}
"""The figures that one run can fill, by name."""
