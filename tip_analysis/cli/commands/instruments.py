"""Which tokens matter, measured: `rank-rules`, `influence`, `intervene`, `track`, `claims`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from tip_analysis.cli.option_groups import (
    Common,
    CommonOptions,
    EngineOptions,
    Engines,
    Flag,
    ModelOptions,
    Models,
    Names,
    Pairs,
    RunFolder,
    Taxonomy,
    TaxonomyOptions,
)
from tip_analysis.cli.ranges import Few, Ratios, Seed, Seeds, SomeCount, SomeShare
from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import Loss, Preconditioner, Scope, SelectionScope


@dataclass(frozen=True)
class RankRules:
    """Compare selection rules without training: what each keeps of φ, reward and gradient norm at
    equal budget, with ranks that say which rules cannot be told apart."""

    run: RunFolder
    """Run folder with scored tokens and gradients."""
    rules: Names = ()
    """Rules to compare; all by default."""
    ratios: Ratios = (0.1, 0.2, 0.5)
    """Retention ratios in (0, 1]."""
    weightings: Names = ()
    """Weightings to compare with them, such as iw_opd or a rule's score that is not cut."""
    seeds: Seeds = (0,)
    """Seeds of the sampling rules, which are averaged over them."""
    selection_scope: SelectionScope = SelectionScope.ROLLOUT
    """Within what tokens compete."""
    cosines: Flag = False
    """Measure where the gradient of each selection's loss points, too: loads the models, and takes
    a backward and a forward-mode pass a rollout and selection."""
    measurement: Pairs = ()
    """Whose gradients, where several were measured: param_scope=…, method=…, num_probes=…, seed=…;
    by default what the run prefers (its first)."""
    num_resamples: Few = 400
    """Resamples of prompts behind each interval."""
    seed: Seed = 0
    """Seed of the resamples."""
    overwrite: Flag = False
    """Rank again what was ranked already."""
    normalization_scope: Scope = Scope.RUN
    """Whose tokens share one min-max normalization."""
    divergence_clip: SomeShare = None
    """Quantile at which the divergence is clipped before its min-max."""
    models: Models = field(default_factory=ModelOptions)
    common: Common = field(default_factory=CommonOptions)

    def carry_out(self) -> None:
        """Order selection rules by what they keep, and where their gradients point."""
        import polars as pl

        from tip_analysis.analysis.measurements import Preference
        from tip_analysis.analysis.rank_stage import rank_rules
        from tip_analysis.analysis.rank_validity import ranking_validity, validity_sentence
        from tip_analysis.analysis.ranking import league_table
        from tip_analysis.cli.console import console, league_by_ratio, show_table
        from tip_analysis.core.run_folder import open_run

        run = open_run(self.run)
        how: dict[str, Any] = {
            "rules": self.rules,
            "ratios": self.ratios,
            "weightings": self.weightings,
            "seeds": self.seeds,
            "selection_scope": self.selection_scope,
            "measurement": Preference.parse(self.measurement),
            "num_resamples": self.num_resamples,
            "seed": self.seed,
            "normalization_scope": self.normalization_scope,
            "divergence_clip": self.divergence_clip,
            "overwrite": self.overwrite,
        }
        rankings = rank_rules(run, **how)
        if self.cosines:
            from tip_analysis.gradients.selection_gradients import rank_cosines

            found = rank_cosines(run, dtype=self.models.dtype, device=self.models.device, **how)
            rankings = pl.concat([rankings, found])
        for title, table in league_by_ratio(league_table(rankings)):
            show_table(f"{self.run}: {title}", table)
        if run.has("ablations"):
            validity = ranking_validity(rankings, run.ablations().collect())
            if validity.height:
                show_table("rank correlation with trained accuracy, over arms", validity)
            console.print(validity_sentence(validity), soft_wrap=True)


@dataclass(frozen=True)
class Influence:
    """Measure what a step on one quadrant's tokens (or another group's) does to the loss of the
    others, cross-fitted over prompts."""

    run: RunFolder
    """Run folder with scored tokens; student, teacher and teacher context are those of `score`."""
    grouping: str = "quadrant"
    """What tokens are grouped by: quadrant, correct, first_error, position, relative_position,
    frequency, kind, segment or turn."""
    preconditioner: Preconditioner = Preconditioner.NONE
    """What a step multiplies gradients by: nothing, or Adam's 1/(√v̂ + ε), v̂ the mean squared
    gradient of a step's batch."""
    params: str = "all"
    """Parameters that count: all, body, head, last:N, lora."""
    loss: Loss = Loss.REVERSE_KL
    """Per-token loss."""
    seed: Seed = 0
    """Seed of the two folds of prompts."""
    limit: SomeCount = None
    """Use the first N rollouts only."""
    overwrite: Flag = False
    """Measure again what this configuration has measured."""
    taxonomy: Taxonomy = field(default_factory=TaxonomyOptions)
    models: Models = field(default_factory=ModelOptions)
    common: Common = field(default_factory=CommonOptions)

    def carry_out(self) -> None:
        """Say what a step on one group does to the others."""
        from tip_analysis.analysis.influences import assumption_2, influence_matrix, recorded_norms
        from tip_analysis.analysis.measurements import run_measurement
        from tip_analysis.cli.console import show_note, show_table
        from tip_analysis.core.names import Preconditioner
        from tip_analysis.core.run_folder import open_run
        from tip_analysis.gradients.influencing import influence

        run = open_run(self.run)
        rows = influence(
            run,
            grouping=self.grouping,
            preconditioner=self.preconditioner,
            params=self.params,
            loss=self.loss,
            taxonomy=self.taxonomy.parsed(),
            seed=self.seed,
            limit=self.limit,
            dtype=self.models.dtype,
            device=self.models.device,
            overwrite=self.overwrite,
        )
        matrix = influence_matrix(rows)
        shown = ["influence", "cosine", "cosine_low", "cosine_high", "per_token", "num_tokens"]
        title = (
            f"{self.run}: what a step on the source does to the target's loss (positive: lowers)"
        )
        show_table(title, matrix.select("source", "target", *shown))
        if self.preconditioner is Preconditioner.NONE and run.has("gradients"):
            measured = run_measurement(run, loss=self.loss)
            table = assumption_2(rows, measured.rows(run.gradients()), recorded_norms(run, rows))
            if table["kept"].drop_nulls().len():
                show_table(
                    "what Assumption 2 keeps: products of a token's gradient with itself", table
                )
            else:
                show_note(
                    "note:", "some tokens have no measured norm: see `tip-analysis gradients`"
                )


@dataclass(frozen=True)
class Intervene:
    """Test tokens causally: force the student's token, the teacher's choice or a fresh sample, let
    the student finish, and compare success."""

    run: RunFolder
    """Run folder with graded rollouts and scored tokens."""
    num_tokens: Few = 200
    """Tokens to test, as many from each quadrant."""
    num_continuations: Few = 8
    """Continuations of each of the three choices."""
    max_new_tokens: SomeCount = None
    """Longest response, in tokens; by default that of the run's rollouts."""
    grader: str | None = None
    """math, exact, module:function or file.py:function; by default the run's own."""
    seed: Seed = 0
    """Seed of the draw and of the continuations."""
    overwrite: Flag = False
    """Test again what was tested already."""
    engines: Engines = field(default_factory=EngineOptions)
    taxonomy: Taxonomy = field(default_factory=TaxonomyOptions)
    models: Models = field(default_factory=ModelOptions)
    common: Common = field(default_factory=CommonOptions)

    def carry_out(self) -> None:
        """Say what replacing tokens does to success."""
        from tip_analysis.analysis.interventions import intervention_aucs, intervention_effects
        from tip_analysis.cli.console import show_table
        from tip_analysis.core.run_folder import open_run
        from tip_analysis.scoring.intervening import intervene

        run = open_run(self.run)
        rows = intervene(
            run,
            num_tokens=self.num_tokens,
            num_continuations=self.num_continuations,
            taxonomy=self.taxonomy.parsed(),
            max_new_tokens=self.max_new_tokens,
            grader=self.grader,
            seed=self.seed,
            engine=self.engines.settings(),
            overwrite=self.overwrite,
            **self.models.loading(),
        )
        show_table(
            f"{self.run}: success with another token, minus that with the student's own",
            intervention_effects(rows),
        )
        show_table(
            "which scores find the tokens whose replacement by the teacher's raises success",
            intervention_aucs(rows, run.tokens()),
        )


@dataclass(frozen=True)
class Track:
    """Score the run's own contexts with the student at each kept step of an arm (`ablate
    --keep-every`): which tokens change their quadrant, which never learn."""

    run: RunFolder
    """Run folder with scored tokens and with the arm."""
    arm: str
    """The arm: q3:0.1, all."""
    seed: Seed = 0
    """Seed of the arm."""
    limit: SomeCount = None
    """Use the first N rollouts only."""
    overwrite: Flag = False
    """Score again what was scored already."""
    taxonomy: Taxonomy = field(default_factory=TaxonomyOptions)
    models: Models = field(default_factory=ModelOptions)
    common: Common = field(default_factory=CommonOptions)

    def carry_out(self) -> None:
        """Say what became of the run's tokens from step to step of an arm."""
        from tip_analysis.analysis.trajectories import (
            placed_trajectory,
            q3_survival,
            realised_falls,
            rock_tokens,
            trajectory_flow,
            with_facts,
        )
        from tip_analysis.cli.console import show_table
        from tip_analysis.core.run_folder import open_run
        from tip_analysis.scoring.tracking import track

        run = open_run(self.run)
        rows = track(
            run,
            arm=self.arm,
            seed=self.seed,
            limit=self.limit,
            overwrite=self.overwrite,
            **self.models.loading(),
        )
        placed = with_facts(placed_trajectory(rows, self.taxonomy.parsed()), run.tokens())
        flow = trajectory_flow(placed)
        last = flow.filter(step_to=flow["step_to"].max()).pivot(
            on="quadrant_to", index="quadrant_from", values="num_tokens"
        )
        show_table(f"{self.run}: {self.arm}, quadrants at the last two kept steps", last)
        show_table(
            "share of the tokens in Q3 at the first step that still are", q3_survival(placed)
        )
        show_table("rock tokens: above the divergence cut at every kept step", rock_tokens(placed))
        show_table(
            "rank correlation of scores before training with the realised fall of the reverse KL",
            realised_falls(placed, run.tokens()),
        )


@dataclass(frozen=True)
class Claims:
    """Judge hypotheses that were written down before the run: which arms or groups, which figure,
    direction and margin."""

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """TOML file with the hypotheses."""
    run: Path | None = None
    """Run folder that they are tested on; by default the one that FILE names."""
    seed: Seed = 0
    """Seed of the resamples of prompts."""
    num_resamples: Few = 5000
    """Resamples of prompts behind each interval."""
    taxonomy: Taxonomy = field(default_factory=TaxonomyOptions)
    common: Common = field(default_factory=CommonOptions)

    def carry_out(self) -> None:
        """Judge the hypotheses of a file."""
        from tip_analysis.analysis.hypotheses import judge_hypotheses
        from tip_analysis.analysis.registrations import read_hypotheses
        from tip_analysis.cli.console import show_table

        registered = read_hypotheses(self.file)
        run = self.run or registered.run
        if run is None:
            raise OptionError(f"{self.file}: name a run folder with --run, or as `run` in the file")
        table = judge_hypotheses(
            run,
            registered,
            taxonomy=self.taxonomy.parsed(),
            num_resamples=self.num_resamples,
            seed=self.seed,
        )
        title = (
            f"{self.file}: {table.height} claims together at confidence"
            f" {registered.confidence:g} ({registered.correction} correction)"
        )
        show_table(title, table)
