"""One run, read for the report: its tables with scores and quadrants, its cuts, counts, texts and
warnings.

Reads a run folder; the texts of tokens that were likely but not sampled come from its vocabulary
table, or, where there is none, from the sampled tokens: other ids then show as `#123`. Tables stay
lazy: only aggregates, and the rows that are shown, are collected.

Intervals of a long run come from a sample of its prompts (`prompt_sample`); values are those of the
whole run.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any
from unicodedata import normalize

import polars as pl

from tip_analysis.analysis.cuts import Cuts
from tip_analysis.analysis.measurements import (
    Measurement,
    Preference,
    choose_measurement,
    measurements_in,
    preferred_measurement,
    with_gradients,
)
from tip_analysis.analysis.prompt_sample import draw_prompts, scaled_intervals
from tip_analysis.analysis.quadrant_tables import quadrant_statistics
from tip_analysis.analysis.quadrants import assign_quadrants, quadrant_shares
from tip_analysis.analysis.rollout_facts import rollout_facts
from tip_analysis.analysis.scores import Normalization, add_scores
from tip_analysis.analysis.screening import screen_tokens
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, Taxonomy
from tip_analysis.core.errors import OptionError, RunError, SchemaError
from tip_analysis.core.names import Loss, PlantedLabel, Quadrant
from tip_analysis.core.run_folder import Run, open_run

Compute = Callable[[pl.LazyFrame, int], pl.DataFrame]
"""(tokens, number of resamples) -> a result table."""

_ENDS = {"low": pl.Float64, "high": pl.Float64}

GRADIENT_SCORES = ("grad_norm", "grad_dot_loss", "reward_alignment")
"""What a reader of single tokens sees of their gradients."""


SCREENED_TOKENS = 2_000_000
"""A run of more tokens is screened for artefacts on its sampled prompts."""


@dataclass(frozen=True)
class ReportOptions:
    """How scores and quadrants are made, and how much is shown."""

    taxonomy: Taxonomy = DEFAULT_TAXONOMY
    """Where the cuts lie, and how scores are normalised."""
    measurement: Preference = field(default_factory=Preference)
    """Which measurement of gradients, where there are several; what is left open is settled by the
    run's own preference."""
    num_strong: int = 6
    """Tokens in each list of the strongest."""
    browser_tokens: int = 12_000
    """Tokens in the browser, over all runs."""
    num_resamples: int = 300
    """Resamples of prompts behind each interval."""
    resampled_tokens: int = 60_000
    """Tokens that intervals are resampled from; of a longer run a sample of prompts is taken, and
    intervals are scaled."""

    def arguments(self) -> str:
        """The options as they are typed."""
        chosen = f" --measurement {self.measurement}" if self.measurement.given else ""
        return f"{self.taxonomy.arguments()}{chosen}"


@dataclass(frozen=True)
class Population:
    """What numbers are over."""

    num_tokens: int
    num_rollouts: int
    num_prompts: int
    num_masked: int
    """Tokens that the student did not write; they take no part."""
    num_infinite_reverse: int
    num_infinite_forward: int


class RunView:
    """A run folder with scores and quadrants under given options."""

    def __init__(self, path: str | Path, options: ReportOptions, name: str | None = None) -> None:
        self.run: Run = open_run(path, on_altered="accept")
        self.name = name or Path(path).resolve().name
        self.options = options
        if not self.run.has("tokens"):
            raise RunError(
                f"{path} has no scored tokens yet; `tip-analysis score {path} --teacher MODEL`"
                " makes them"
            )
        self.raw = self.run.tokens()

    @cached_property
    def stages(self) -> dict[str, Any]:
        """The records of `run.json`."""
        return self.run.stages()

    @cached_property
    def normalization(self) -> Normalization:
        """The bounds of ĥ and δ̂."""
        return self.options.taxonomy.normalization(self.raw)

    @cached_property
    def cuts(self) -> Cuts:
        """Both cuts as measured."""
        return self.options.taxonomy.measure(self.raw)

    @cached_property
    def screened(self) -> pl.DataFrame:
        """Artefacts by quadrant and sum (`screening.screen_tokens`); of the sampled prompts where
        the run is too large to look at every token."""
        tokens = self.raw
        if self.gradients is not None:
            squared = pl.col("grad_norm").pow(2).alias("grad_norm_sq")
            tokens = self.with_gradients(tokens).with_columns(squared)
        if self.population.num_tokens > SCREENED_TOKENS:
            tokens = self.sampled(tokens)
        return screen_tokens(
            tokens,
            taxonomy=self.options.taxonomy,
            rules=(),
            num_resamples=self.options.num_resamples,
        )

    @cached_property
    def tokens(self) -> pl.LazyFrame:
        """The token table with scores and `quadrant`."""
        return assign_quadrants(
            add_scores(self.raw, normalization=self.normalization), cuts=self.cuts
        )

    @cached_property
    def rollouts(self) -> pl.DataFrame:
        """What is known of each rollout, without the token lists."""
        return rollout_facts(self.run)

    @cached_property
    def prompt_sample(self) -> pl.DataFrame | None:
        """`prompt_id` of a sample of prompts with about `resampled_tokens` tokens; None where the
        whole run is that small."""
        if self.population.num_tokens <= self.options.resampled_tokens:
            return None
        return draw_prompts(self.raw, self.options.resampled_tokens)

    def sampled(self, tokens: pl.LazyFrame) -> pl.LazyFrame:
        """The rows of the sampled prompts; all rows where there is no need to sample."""
        if self.prompt_sample is None:
            return tokens
        return tokens.join(self.prompt_sample.lazy(), on="prompt_id", how="semi")

    def with_intervals(
        self, tokens: pl.LazyFrame, compute: Compute, *, keys: Sequence[str], names: Sequence[str]
    ) -> pl.DataFrame:
        """A result table of the whole run whose intervals are affordable (see `prompt_sample`).

        Args:
            tokens: what `compute` is given, with `prompt_id`.
            compute: makes the table.
            keys: columns that identify a row.
            names: value columns; each has `NAME_low` and `NAME_high`, or `low` and `high` where the
                name is `value`.
        """
        if self.prompt_sample is None:
            return compute(tokens, self.options.num_resamples)
        whole, part = compute(tokens, 2), compute(self.sampled(tokens), self.options.num_resamples)
        scale = math.sqrt(self.prompt_sample.height / max(1, self.population.num_prompts))
        return scaled_intervals(whole, part, keys=keys, names=names, scale=scale)

    def interval_words(self) -> str:
        """What the intervals of the page are."""
        drawn = (
            ""
            if self.prompt_sample is None
            else f", from {self.prompt_sample.height:,} prompts drawn at random, scaled to all"
        )
        return (
            f"Intervals are 95%, from {self.options.num_resamples} resamples of prompts with all"
            f" their rollouts{drawn}; cuts are measured again in each."
        )

    @cached_property
    def quadrant_means(self) -> pl.DataFrame:
        """`statistics.quadrant_statistics` of the token table."""

        def compute(tokens: pl.LazyFrame, num_resamples: int) -> pl.DataFrame:
            return quadrant_statistics(
                tokens, num_resamples=num_resamples, taxonomy=self.options.taxonomy
            )

        return self.with_intervals(
            self.raw, compute, keys=["quadrant", "statistic"], names=["value"]
        )

    @cached_property
    def measurements(self) -> list[Measurement]:
        """Every measurement of gradients that the run holds, the reverse KL's first."""
        return measurements_in(self.run.gradients()) if self.run.has("gradients") else []

    @cached_property
    def losses(self) -> list[str]:
        """Losses whose gradients are shown, the reverse KL first: those with a measurement that
        fits the options, but for `unsettled` ones.

        Raises:
            SchemaError: gradients were measured, and none fits the options.
        """
        fitting = [one.loss for one in self.measurements if one.fits(self.options.measurement)]
        if self.measurements and not fitting:
            self.measurement()
        return [loss for loss in dict.fromkeys(fitting) if loss not in self.unsettled]

    @cached_property
    def unsettled(self) -> dict[str, str]:
        """Losses other than the reverse KL with several measurements of which the run prefers
        none, and what is to be done about each."""
        reasons = {}
        for loss in {one.loss for one in self.measurements} - {Loss.REVERSE_KL}:
            try:
                self.measurement(loss)
            except SchemaError:
                continue
            except OptionError as error:
                reasons[loss] = str(error)
        return reasons

    def measurement(self, loss: Loss | str = Loss.REVERSE_KL) -> Measurement:
        """The one measurement that every number about gradients of a loss comes from.

        Raises:
            SchemaError: none fits the options.
            OptionError: several do, and the run prefers none of them.
        """
        return choose_measurement(
            self.measurements,
            loss=loss,
            wanted=self.options.measurement,
            preferred=preferred_measurement(self.run),
        )

    def measured(self, loss: Loss | str = Loss.REVERSE_KL) -> pl.LazyFrame:
        """Scored tokens whose gradient of a loss was measured, with `measurement`'s columns."""
        return with_gradients(self.tokens, self.run.gradients(), self.measurement(loss))

    @cached_property
    def gradients(self) -> pl.LazyFrame | None:
        """Norm and alignment of each token's own gradient of the reverse KL (`measurement`); None
        where that was not measured."""
        if Loss.REVERSE_KL not in self.losses:
            return None
        return (
            self.measurement()
            .rows(self.run.gradients())
            .select(
                "rollout_id",
                "position",
                pl.col("grad_norm_sq").sqrt().alias("grad_norm"),
                "grad_dot_loss",
                "reward_alignment",
            )
        )

    def with_gradients(self, tokens: pl.LazyFrame) -> pl.LazyFrame:
        """Tokens with the columns of `gradients`, null where nothing was measured."""
        if self.gradients is None:
            return tokens.with_columns(pl.lit(None, pl.Float64).alias(c) for c in GRADIENT_SCORES)
        return tokens.join(self.gradients, on=["rollout_id", "position"], how="left")

    @cached_property
    def shares(self) -> pl.DataFrame:
        """Tokens, rollouts, prompts and share of each quadrant."""
        return quadrant_shares(self.tokens)

    @cached_property
    def share_of(self) -> dict[str, float]:
        """Share of each quadrant, in [0, 1]."""
        return {
            str(name): share or 0.0
            for name, share in self.shares.select("quadrant", "share").iter_rows()
        }

    @cached_property
    def share_table(self) -> pl.DataFrame:
        """`shares` with their intervals under the run's name, a `QuadrantShareTable`; intervals are
        null where no token has statistics."""
        if self.population.num_tokens:
            ends = self.quadrant_means.filter(pl.col("statistic") == "share")
        else:
            ends = pl.DataFrame(schema={"quadrant": pl.Enum(Quadrant), **_ENDS})
        joined = self.shares.join(ends, on="quadrant", how="left", maintain_order="left")
        return joined.select(
            pl.lit(self.name).alias("run"),
            pl.col("quadrant").cast(pl.String),
            "share",
            pl.col("low").alias("share_low"),
            pl.col("high").alias("share_high"),
        )

    @cached_property
    def population(self) -> Population:
        """Counts of tokens, rollouts and prompts with statistics."""
        written = pl.col("loss_mask")
        counts = self.raw.select(
            num_tokens=written.sum(),
            num_rollouts=pl.col("rollout_id").filter(written).n_unique(),
            num_prompts=pl.col("prompt_id").filter(written).n_unique(),
            num_masked=(~written).sum(),
            num_infinite_reverse=pl.col("reverse_kl").is_infinite().sum(),
            num_infinite_forward=pl.col("forward_kl").is_infinite().sum(),
        ).collect(engine="streaming")
        return Population(**{name: int(value) for name, value in counts.row(0, named=True).items()})

    @cached_property
    def has_planted_labels(self) -> bool:
        """Whether true labels are known (the arithmetic pair)."""
        return bool(
            self.raw.select((pl.col("planted_label") == PlantedLabel.PLANTED_ERROR).any())
            .collect()
            .item()
        )

    def model_names(self) -> tuple[str, str]:
        """Student and teacher, as they were named."""
        config = self.stages.get("score", {}).get("config", {})
        rollout = self.stages.get("rollout", {}).get("config", {})
        return _name_of(config.get("student") or rollout.get("student")), _name_of(
            config.get("teacher")
        )

    def token_texts(self, ids: Iterable[int]) -> dict[int, str]:
        """The text of each token id."""
        wanted = pl.LazyFrame({"token_id": pl.Series(sorted(set(ids)), dtype=pl.Int32)})
        if self.run.has("vocabulary"):
            texts = self.run.vocabulary()
        else:
            texts = (
                self.raw.select("token_id", "token")
                .group_by("token_id")
                .agg(pl.col("token").first())
            )
        found = wanted.join(texts, on="token_id", how="left").collect(engine="streaming")
        return {index: f"#{index}" if text is None else text for index, text in found.iter_rows()}


def open_views(paths: Sequence[str | Path], options: ReportOptions) -> list[RunView]:
    """Open several runs under one set of options; folders of one name are told apart by their
    parents.

    Raises:
        OptionError: no run is named, or one is named twice.
        RunError: there is no run at a path, or it has no scored tokens.
    """
    if not paths:
        raise OptionError("name at least one run folder")
    views = [RunView(path, options) for path in paths]
    for (one, first), (two, second) in combinations(zip(paths, views, strict=True), 2):
        if first.run.path.samefile(second.run.path):  # however they are spelled
            raise OptionError(f"a run folder is named twice: {one} and {two} are one folder")
    for view, name in zip(
        views, _told_apart([Path(path).resolve() for path in paths]), strict=True
    ):
        view.name = name
    return views


def _told_apart(paths: Sequence[Path]) -> list[str]:
    """Names of folders with as many of those above them as tell them apart, for the eye too: names
    that differ by case or Unicode form alone look alike."""
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len({normalize("NFC", name).casefold() for name in names}) == len(names):
            return names
    return [f"{path} ({index})" for index, path in enumerate(paths, 1)]


def _name_of(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("name") or value.get("model") or value.get("id")
    return "unnamed model" if value is None else str(value)
