"""`rank_rules`: a run's selection rules ranked without training, into its `rankings/`.

One record and shard for each rule and ratio, as for masks: what is there is kept, and more rules
add to it. The figures here are sums over tokens and need no model; `gradients.rank_cosines` adds
those that need the gradient of each selection's loss.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from tip_analysis.analysis.masks import Candidates, candidates
from tip_analysis.analysis.measurements import Measurement, Preference
from tip_analysis.analysis.ranking import (
    GRADIENT_FIGURES,
    NUM_RESAMPLES,
    Replicated,
    Selected,
    kept_figures,
    ranking_rows,
    selections_of,
    weighting_of_tokens,
)
from tip_analysis.analysis.retention import exact_ratio
from tip_analysis.analysis.rules import rule, rule_names
from tip_analysis.analysis.weightings import weighting_of
from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import RankFigure, Scope, SelectionScope, TokenUse
from tip_analysis.core.progress import track
from tip_analysis.core.run_folder import Run, RunLike, Stage, open_run
from tip_analysis.core.table_files import read

RATIOS = (0.1, 0.2, 0.5)


@dataclass(frozen=True)
class RankOptions:
    """How rules are ranked."""

    rules: tuple[str, ...] = ()
    """Names of rules; all that there are, where none is named."""
    ratios: tuple[float, ...] = RATIOS
    """ρ in (0, 1]."""
    weightings: tuple[str, ...] = ()
    """Names of weightings, which have no ratio."""
    seeds: tuple[int, ...] = (0,)
    """Of rules that sample, which are averaged over them."""
    selection_scope: SelectionScope | str = SelectionScope.ROLLOUT
    normalization_scope: Scope | str = Scope.RUN
    divergence_clip: float | None = None
    measurement: Preference | None = None
    """Whose gradients; by default what the run prefers."""
    num_resamples: int = NUM_RESAMPLES
    seed: int = 0
    """Of the resamples."""

    def __post_init__(self) -> None:
        for name in self.rules:
            rule(name)
        for name in self.weightings:
            weighting_of(name)
        for ratio in self.ratios:
            exact_ratio(ratio)
        if not self.ratios or not self.seeds:
            raise OptionError("name at least one ratio and one seed")
        if self.num_resamples < 2:
            raise OptionError(f"num_resamples must be at least 2; found {self.num_resamples}")

    def wanted(self) -> list["Wanted"]:
        """What is ranked, each once: rules at their ratios (one, at ρ = 1, for a rule that keeps
        all), then weightings."""
        selections = [
            (TokenUse.SELECTION, name, rule(name).retention(ratio))
            for name in self.rules or rule_names()
            for ratio in self.ratios
        ]
        weightings = [(TokenUse.WEIGHTING, name, 1.0) for name in self.weightings]
        return list(dict.fromkeys([*selections, *weightings]))


Wanted = tuple[TokenUse, str, float]
"""How tokens count, by which rule or weighting, at which ρ."""


def rank_rules(
    run: RunLike,
    *,
    rules: Sequence[str] = (),
    ratios: Sequence[float] = RATIOS,
    weightings: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    overwrite: bool = False,
    **how: Any,
) -> pl.DataFrame:
    """Rank selection rules without training, by what each keeps of Σφ, Σφ⁺, reward and ΣM.

    Args:
        run: a run folder with scored tokens and gradients of the reverse KL; the tokens are those
            whose gradients were measured.
        rules: names of rules; all by default.
        ratios: ρ in (0, 1].
        weightings: names of weightings, which have no ratio.
        seeds: of rules that sample.
        overwrite: rank again what was ranked already.
        how: further fields of `RankOptions`.

    Returns:
        Rows of `RankingTable`; `league_table` puts them in order.

    Raises:
        RunError: no gradients were measured.
        UnknownNameError, OptionError: a rule or option is not valid.

    Example:
        tip.league_table(tip.rank_rules("runs/mine", rules=["q3", "soft_or"]))
    """
    options = RankOptions(tuple(rules), tuple(ratios), tuple(weightings), tuple(seeds), **how)
    ranked = Ranked(open_run(run), options)

    def figures(chosen: Selected) -> dict[RankFigure, Replicated]:
        return kept_figures(
            ranked.measured, chosen.times, num_resamples=options.num_resamples, seed=options.seed
        )

    return ranked.fill("kept", lambda chosen: map(figures, chosen), overwrite=overwrite)


Figures = Callable[[Sequence[Selected]], Any]
"""Selections -> an iterator over the figures of each."""


class Ranked:
    """The rules of a run under given options, and where their rows go."""

    def __init__(self, run: Run, options: RankOptions) -> None:
        self.run = run
        self.options = options
        self.among: Candidates = candidates(
            run,
            needs_gradients=True,
            measurement=options.measurement,
            normalization_scope=options.normalization_scope,
            divergence_clip=options.divergence_clip,
        )
        self.measured = self.among.scored.filter("loss_mask").collect()

    @property
    def measurement(self) -> Measurement:
        """Whose gradients."""
        assert self.among.measurement is not None  # `needs_gradients` asks for one
        return self.among.measurement

    def fill(self, kind: str, figures: Figures, *, overwrite: bool = False) -> pl.DataFrame:
        """Make what is missing of one kind of figure, and give all rows that were asked for.

        Args:
            kind: `kept` or `gradient`.
            figures: makes the figures of some selections, one after another.
            overwrite: make all of them again.
        """
        stages = {one: self._begin(one, kind, overwrite) for one in self.options.wanted()}
        missing = [key for key, stage in stages.items() if not stage.is_whole(0)]
        chosen = self._selected(missing)
        with track(
            "ranking", len(stages), done=len(stages) - len(missing), unit="masks"
        ) as advance:
            for one, found in zip(chosen, figures(chosen), strict=True):
                key = one.form, one.rule, one.retention_ratio
                stages[key].write(0, self._rows(one, found))
                advance()
        return pl.concat([_finished(stage) for stage in stages.values()])

    def _selected(self, wanted: Sequence[Wanted]) -> list[Selected]:
        ratios: dict[str, list[float]] = {}
        for form, name, ratio in wanted:
            if form is TokenUse.SELECTION:
                ratios.setdefault(name, []).append(ratio)
        weighed = [name for form, name, _ in wanted if form is TokenUse.WEIGHTING]
        selections = [
            one
            for name, those in ratios.items()
            for one in selections_of(
                self.measured,
                name,
                those,
                selection_scope=self.options.selection_scope,
                seeds=self.options.seeds,
            )
        ]
        return [*selections, *(weighting_of_tokens(self.measured, name) for name in weighed)]

    def _rows(self, chosen: Selected, figures: Mapping[RankFigure, Replicated]) -> pl.DataFrame:
        return ranking_rows(
            chosen,
            figures,
            selection_scope=self.options.selection_scope,
            setting=self.measurement.setting.given,
            num_tokens=self.measured.height,
            num_prompts=self.measured["prompt_id"].n_unique(),
        )

    def _begin(self, wanted: Wanted, kind: str, overwrite: bool) -> Stage:
        options = self.options
        form, name, ratio = wanted
        sampled = form is TokenUse.SELECTION and rule(name).sampled
        key = {
            "rule": name,
            "token_use": form,
            "retention_ratio": ratio,
            "selection_scope": SelectionScope(options.selection_scope),
            "figures": kind,
            **self.measurement.setting.given,
        }
        config = {
            "normalization_scope": Scope(options.normalization_scope),
            "divergence_clip": options.divergence_clip,
            "mask_seeds": list(options.seeds) if sampled else [0],
            "num_resamples": options.num_resamples,
            "resample_seed": options.seed,
            "measurement": asdict(self.measurement),
        }
        return self.run.begin(
            "rank", key=key, config=key | config, inputs=self.among.inputs, overwrite=overwrite
        )


def _finished(stage: Stage) -> pl.DataFrame:
    rows = read(stage.path(0))
    stage.finish(num_rows=rows.height)
    return rows


def run_rankings(run: Run) -> pl.DataFrame:
    """The rankings of a run under one selection scope and measurement: those with most rows."""
    table = run.table("rankings").collect()
    keys = ["selection_scope", "param_scope", "method", "num_probes", "seed"]
    most = table.group_by(keys, maintain_order=True).len().sort("len", descending=True).head(1)
    return table.join(most.drop("len"), on=keys, how="semi", maintain_order="left")


def has_gradient_figures(rankings: pl.DataFrame) -> bool:
    """Whether cosines were measured too."""
    return rankings["figure"].cast(pl.String).is_in([*map(str, GRADIENT_FIGURES)]).any()
