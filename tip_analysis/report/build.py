"""One self-contained HTML page from one or more run folders. Never imports torch.

Reads run folders; writes the page. Statistics come from the room `analysis`, drawings from
`figures`; this room words findings, lays out sections and embeds a sample of rollouts for the token
browser. Only aggregates and samples go into the page, whatever the size of the run.
"""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tip_analysis.analysis.run_view import ReportOptions, RunView, open_views
from tip_analysis.core.atomic_files import storage_errors, write_atomically
from tip_analysis.core.errors import OptionError, RunError, TipAnalysisError
from tip_analysis.core.provenance import package_version
from tip_analysis.core.run_folder import RunLike, check_place
from tip_analysis.core.text import one_line, visible
from tip_analysis.core.words import listed, plural
from tip_analysis.report import paper
from tip_analysis.report.page import Part, Section, Warnings, render
from tip_analysis.report.sections import (
    ablations,
    artefacts,
    browser,
    dynamics,
    gradients,
    groups,
    influences,
    interventions,
    moving,
    overview,
    provenance,
    ranking,
    selections,
    taxonomy,
    trajectories,
)

__all__ = ["ReportOptions", "build_report", "build_sections", "write_report"]

logger = logging.getLogger(__name__)


def write_report(
    runs: RunLike | Sequence[RunLike],
    output: str | Path | None = None,
    options: ReportOptions | None = None,
) -> Path:
    """Build the report of one run or of several, and write it, whole or not at all.

    Args:
        runs: run folders with scored tokens; several are compared side by side.
        output: where the page goes; by default `reports/NAME.html`, NAME being the first run's.
        options: taxonomy and the like.

    Example:
        tip.write_report("runs/mine", "reports/mine.html")

    Raises:
        RunError: there is no run at a path, or it has no scored tokens.
        OptionError: an option is out of its range, or a file that is no page lies where the page
            is to go.
        StorageError: the page cannot be written.
    """
    paths = [Path(run) for run in ([runs] if isinstance(runs, str | os.PathLike) else runs)]
    output = Path(output) if output else Path("reports") / f"{default_name(paths)}.html"
    _check_output(output)
    html = build_report(paths, options, output=output)

    def write(part: Path) -> None:
        part.write_text(html, "utf-8")

    write_atomically(output, write)
    return output


def _check_output(output: Path) -> None:
    """Refuse to replace anything but a page."""
    check_place(output)
    if output.is_file():
        with storage_errors(output), output.open("rb") as file:
            begins = file.read(15)
        if begins and begins.lower() != b"<!doctype html>":
            raise OptionError(
                f"{output} is no page, and would be lost: name another file, or remove it"
            )


def default_name(paths: Sequence[Path]) -> str:
    """What a report is called that nobody named: as its first run.

    Raises:
        OptionError: no run is named.
    """
    if not paths:
        raise OptionError("name at least one run folder")
    return paths[0].resolve().name


def build_report(
    paths: Sequence[str | Path],
    options: ReportOptions | None = None,
    *,
    output: str | Path = "reports/report.html",
) -> str:
    """The report of the runs at `paths`, as HTML; `output` is only named in the command that the
    page shows.

    Raises:
        SchemaError: a measurement of gradients is asked for by name, and a run has none such.
        OptionError, RunError, Exception: as `build_sections`.
    """
    views = open_views(paths, options or ReportOptions())
    for view in views:
        if view.options.measurement.given:
            _ = view.losses  # what was asked for by name is refused here, not worded by a section
    names = listed([visible(view.name, 60) for view in views])
    student, teacher = views[0].model_names()
    pair = (
        f"{visible(student, 60)} learning from {visible(teacher, 60)};"
        f" {overview.context_words(views[0])}"
    )
    subtitle = (
        pair
        if len(views) == 1
        else f"{plural(len(views), 'run')} side by side; the first is {pair}."
    )
    return render(
        build_sections(views, output),
        title=f"Token importance in {names}",
        subtitle=subtitle,
        sources=names,
        citation=paper.CITATION,
        version=package_version(),
    )


def section_makers(
    views: Sequence[RunView], output: str | Path
) -> list[tuple[str, str, Callable[[], Section]]]:
    """Key, title and maker of each section, in their order; nothing is made yet."""
    trained = any(view.run.has("dynamics") for view in views)
    steps = ("dynamics", "Training over steps", lambda: dynamics.dynamics(views))
    several = [("moves", "What moved between runs", lambda: moving.moving(views))]
    return [
        ("overview", "The finding", lambda: overview.overview(views)),
        ("map", "Quadrant map", lambda: taxonomy.quadrant_map(views)),
        ("browser", "Token browser", lambda: browser.browser(views)),
        *(several if len(views) > 1 else []),
        ("shares", "Shares of the quadrants", lambda: overview.quadrant_shares(views)),
        ("sensitivity", "Sensitivity to the cuts", lambda: taxonomy.sensitivity(views)),
        ("gradients", "Gradient norms and alignment", lambda: gradients.gradients(views)),
        ("selection", "Selection rules", lambda: selections.selections(views)),
        ("ranking", "Rules ranked without training", lambda: ranking.ranking(views)),
        ("influence", "Influence of groups on each other", lambda: influences.influences(views)),
        ("effects", "Position, frequency and kind of token", lambda: groups.group_effects(views)),
        ("artefacts", "Artefacts", lambda: artefacts.artefacts(views)),
        ("interventions", "The causal test of tokens", lambda: interventions.interventions(views)),
        ("ablations", "Ablations and the paper’s claims", lambda: ablations.ablations(views)),
        *([steps] if trained else []),
        ("trajectories", "Importance through training", lambda: trajectories.trajectories(views)),
        ("strongest", "Strongest tokens", lambda: taxonomy.strong_tokens(views)),
        ("provenance", "Provenance", lambda: provenance.provenance(views, str(output))),
    ]


def build_sections(views: Sequence[RunView], output: str | Path) -> list[Section]:
    """All sections in their order; in place of one that cannot be made stands why.

    Raises:
        OptionError, RunError: an option or a run folder is at fault, which no section is to hide.
        Exception: no section can be made; the first section's error.
    """
    makers = section_makers(views, output)
    sections, faults = [], []
    for key, title, make in makers:
        try:
            sections.append(make())
        except (OptionError, RunError):
            raise
        except Exception as error:  # whatever it is, it is this section's
            logger.warning("section %r of the report cannot be made: %s", title, _reason(error))
            faults.append(error)
            sections.append(_without(key, title, error))
    if len(faults) >= len(makers) - 1:  # provenance alone is no report
        raise faults[0]
    return sections


def _without(key: str, title: str, error: Exception) -> Section:
    """What stands in place of a section that cannot be made."""
    fault = Warnings([f"This section cannot be made: {_reason(error)}"])
    return Section(key, title, [Part("", [fault])])


def _reason(error: Exception) -> str:
    said = one_line(str(error), 400)
    if isinstance(error, TipAnalysisError):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
