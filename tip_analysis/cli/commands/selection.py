"""Which tokens are selected, and which only look important: `select`, `screen`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from tip_analysis.cli.option_groups import (
    Common,
    CommonOptions,
    Flag,
    Names,
    Pairs,
    RunFolder,
    Taxonomy,
    TaxonomyOptions,
)
from tip_analysis.cli.ranges import Ratios, Seed, Seeds
from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import SelectionScope

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Select:
    """Select tokens by one or more rules, and write the masks."""

    run: Annotated[Positional[Path | None], arg(metavar="RUN")] = None
    """Run folder with scored tokens."""
    rules: Names = ()
    """Rules to select by; --list shows them."""
    ratios: Ratios = (0.1, 0.2, 0.5)
    """Retention ratios in (0, 1]."""
    seeds: Seeds = (0,)
    """Seeds of the sampling rules."""
    selection_scope: SelectionScope = SelectionScope.ROLLOUT
    """Within what tokens compete."""
    measurement: Pairs = ()
    """Whose gradients gradient_oracle selects by, where several were measured: param_scope=…,
    method=…, num_probes=…, seed=…; by default what the run prefers (its first)."""
    list: Flag = False
    """Show every rule with what it does, and stop."""
    overwrite: Flag = False
    """Make masks again that are there already."""
    taxonomy: Taxonomy = field(default_factory=TaxonomyOptions)
    common: Common = field(default_factory=CommonOptions)

    def carry_out(self) -> None:
        """Write masks, or list the rules."""
        from tip_analysis.analysis.rules import rule_names
        from tip_analysis.cli.console import show_table

        if self.list:
            _list_rules()
            return
        if self.run is None:
            raise OptionError("select needs a run folder, or --list")
        if not self.rules:
            raise OptionError(f"select needs --rules, among {', '.join(rule_names())}")
        from tip_analysis.analysis.door import select
        from tip_analysis.analysis.measurements import Preference
        from tip_analysis.analysis.quadrants import assign_quadrants
        from tip_analysis.core.run_folder import open_run

        run, taxonomy = open_run(self.run), self.taxonomy.parsed()
        masks = select(
            run,
            rules=self.rules,
            ratios=self.ratios,
            selection_scope=self.selection_scope,
            seeds=self.seeds,
            normalization_scope=taxonomy.normalization_scope,
            divergence_clip=taxonomy.divergence_clip,
            measurement=Preference.parse(self.measurement),
            overwrite=self.overwrite,
            entropy_cut=taxonomy.entropy_cut,
            divergence_cut=taxonomy.divergence_cut,
            cut_scope=taxonomy.cut_scope,
        )
        placed = assign_quadrants(run.tokens(), cuts=taxonomy.measure(run.tokens()))
        title = f"{self.run}: shares of the quadrants in each selection"
        show_table(title, _shares(masks, placed))


def _shares(masks: "pl.DataFrame", placed: "pl.LazyFrame") -> "pl.DataFrame":
    """One row for each mask: what it is made of, and how many tokens it has."""
    import polars as pl

    from tip_analysis.analysis.mask_tables import composition

    made_of, keys = composition(masks, placed), ["rule", "retention_ratio", "seed"]
    shares = made_of.pivot(on="quadrant", index=keys, values="share", maintain_order=True)
    totals = made_of.group_by(keys, maintain_order=True).agg(tokens=pl.col("num_tokens").sum())
    return shares.rename({"retention_ratio": "ratio"}).hstack(totals.select("tokens"))


def _list_rules() -> None:
    from rich.table import Table

    from tip_analysis.analysis.rules import rule, rule_names
    from tip_analysis.cli.console import console

    table = Table("rule", "samples", "what it selects", box=None, header_style="bold")
    for name in rule_names():
        table.add_row(name, "yes" if rule(name).has_seed else "", rule(name).description)
    console.print(table)


@dataclass(frozen=True)
class Screen:
    """Find tokens that only look important: stop tokens, special tokens, outliers and other
    artefacts, and how much of each quadrant, sum and mask they are."""

    run: RunFolder
    """Run folder with scored tokens."""
    rules: Names = ("entropy", "divergence", "soft_or", "q3")
    """Rules whose masks are screened."""
    ratios: Ratios = (0.1, 0.2, 0.5)
    """Retention ratios in (0, 1]."""
    seed: Seed = 0
    """Seed of the intervals, and of rules that sample."""
    overwrite: Flag = False
    """Screen again what was screened already."""
    taxonomy: Taxonomy = field(default_factory=TaxonomyOptions)
    common: Common = field(default_factory=CommonOptions)

    def carry_out(self) -> None:
        """Say how much of each part of a run is artefact."""
        from tip_analysis.analysis.screening import ANY, num_artefacts, screen, warnings_of
        from tip_analysis.cli.console import console, show_note, show_table

        table = screen(
            self.run,
            taxonomy=self.taxonomy.parsed(),
            rules=self.rules,
            ratios=self.ratios,
            seed=self.seed,
            overwrite=self.overwrite,
        )
        hidden = ["entropy_cut", "divergence_cut"]
        show_table(f"{self.run}: artefacts", table.filter(artefact=ANY).drop(*hidden, "artefact"))
        console.print(f"{num_artefacts(table):,} tokens are artefacts", soft_wrap=True)
        for warning in warnings_of(table):
            show_note("note:", warning)
