"""What a run folder holds, for people and programs: `status`, `compare`, `export`, `report`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import Positional, arg

from tip_analysis.cli.option_groups import (
    Common,
    CommonOptions,
    Flag,
    Pairs,
    RunFolder,
    Taxonomy,
    TaxonomyOptions,
)
from tip_analysis.core.names import ExportLayout

if TYPE_CHECKING:
    from tip_analysis.analysis.run_view import ReportOptions


@dataclass(frozen=True)
class Status:
    """Show which stages of a run are done, what they hold, and what can come next."""

    run: RunFolder
    """Run folder."""
    common: Common = field(default_factory=CommonOptions)

    shows_what_is_altered: ClassVar[bool] = True
    """With --verify it names altered shards instead of stopping at the first."""

    def carry_out(self) -> None:
        """Say what is done and what can come next."""
        from tip_analysis.analysis.status import advice, next_steps, stage_table
        from tip_analysis.cli.console import console, show_note, show_table
        from tip_analysis.core.run_folder import open_run

        run = open_run(self.run)
        show_table(str(self.run), stage_table(run))
        altered = run.altered_shards() if self.common.verify else []
        for shard in altered:
            show_note("altered or missing:", shard)
        if self.common.verify and not altered:
            console.print("every shard is as it was written")
        for words in advice(run):
            show_note("note:", words)
        console.print("next: " + "\n      ".join(next_steps(run)), soft_wrap=True, markup=False)


@dataclass(frozen=True)
class Compare:
    """Set two runs side by side: quadrant shares, divergences, and tokens that change their
    quadrant."""

    run_a: Annotated[Positional[Path], arg(metavar="RUN_A")]
    """First run folder."""
    run_b: Annotated[Positional[Path], arg(metavar="RUN_B")]
    """Second run folder."""
    taxonomy: Taxonomy = field(default_factory=TaxonomyOptions)
    common: Common = field(default_factory=CommonOptions)

    def carry_out(self) -> None:
        """Show two runs side by side."""
        from tip_analysis.analysis.comparison import compare_runs
        from tip_analysis.cli.console import show_table

        tables = compare_runs(self.run_a, self.run_b, self.taxonomy.parsed())
        for title, table in tables.items():
            show_table(title, table)


@dataclass(frozen=True)
class Export:
    """Write tokens with their scores, quadrants and masks as flat Parquet files."""

    run: RunFolder
    """Run folder with scored tokens."""
    to: Path
    """Folder to write."""
    taxonomy: Taxonomy = field(default_factory=TaxonomyOptions)
    for_: Annotated[ExportLayout, arg(name="for")] = ExportLayout.PLAIN
    """verl: masks also as its response_mask, by the sample's uid."""
    overwrite: Flag = False
    """Replace what the folder holds."""
    common: Common = field(default_factory=CommonOptions)

    def carry_out(self) -> None:
        """Write flat Parquet files."""
        from tip_analysis.analysis.door import export
        from tip_analysis.cli.console import console

        written = export(
            self.run,
            self.to,
            taxonomy=self.taxonomy.parsed(),
            layout=self.for_,
            overwrite=self.overwrite,
        )
        for path, num_rows in written.items():
            console.print(f"{path}: {num_rows:,} rows", soft_wrap=True)


@dataclass(frozen=True)
class Report:
    """Make one self-contained HTML page from one or more runs."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")]
    """Run folders with scored tokens; several are compared side by side."""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="FILE")] = None
    """Where the page is written; by default reports/NAME.html, NAME being the first run's."""
    figures: Annotated[Path | None, arg(metavar="DIR")] = None
    """Also write the first run's figures there, each as PDF and SVG, for print; the folder must be
    empty, or hold figures of an earlier report only."""
    measurement: Pairs = ()
    """Which gradients, where several were measured: param_scope=…, method=…, num_probes=…, seed=…;
    by default what the run prefers (its first)."""
    taxonomy: Taxonomy = field(default_factory=TaxonomyOptions)
    common: Common = field(default_factory=CommonOptions)

    def carry_out(self) -> None:
        """Write the HTML page."""
        from tip_analysis.analysis.measurements import Preference
        from tip_analysis.cli.console import console
        from tip_analysis.report.build import ReportOptions, write_report

        report_options = ReportOptions(
            self.taxonomy.parsed(), measurement=Preference.parse(self.measurement)
        )
        if self.figures is not None:
            self._write_figures(report_options)
        written = write_report(self.runs, self.output, report_options)
        console.print(f"report: {written}", soft_wrap=True)

    def _write_figures(self, options: "ReportOptions") -> None:
        from tip_analysis.analysis.run_view import open_views
        from tip_analysis.cli.console import console
        from tip_analysis.figures import write_figures

        view = open_views(self.runs, options)[0]
        written = write_figures(view, self.figures or Path())
        console.print(f"figures: {len(written)} files in {self.figures}", soft_wrap=True)
