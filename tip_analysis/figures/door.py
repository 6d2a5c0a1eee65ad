"""Figures from a run or from a result table: `figures.quadrant_map(run)`, `figures.claims(table)`.

The modules beside this one take result tables only. Here a run in place of the table is first made
into that table, and into whatever else the figure is told, by `analysis.figure_tables`.
"""

from collections.abc import Callable
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import Any, Concatenate

import polars as pl
from matplotlib.figure import Figure

from tip_analysis.analysis.figure_tables import MAKERS
from tip_analysis.analysis.moves import aligned_tokens
from tip_analysis.analysis.moves import quadrant_flow as flow_of
from tip_analysis.analysis.run_view import ReportOptions, RunView
from tip_analysis.core.atomic_files import replacing
from tip_analysis.core.errors import OptionError, RunError, SchemaError
from tip_analysis.core.run_folder import Run
from tip_analysis.figures import ablations, dynamics, gradients, groups, moves, selection, taxonomy
from tip_analysis.figures.style import CREATOR, save_figure

Source = pl.DataFrame | RunView | Run | str | PathLike[str]
"""A result table, or a run: opened, or by its folder."""


def from_run(draw: Callable[..., Figure]) -> Callable[Concatenate[Source, ...], Figure]:
    """The figure that also takes a run."""

    @wraps(draw)
    def drawn(source: Source, *arguments: Any, **options: Any) -> Figure:
        if isinstance(source, pl.DataFrame):
            return draw(source, *arguments, **options)
        made = MAKERS[draw.__name__](_view(source))
        return draw(made.table, *arguments, **{**made.options, **options})

    return drawn


def _view(source: RunView | Run | str | PathLike[str]) -> RunView:
    if isinstance(source, RunView):
        return source
    return RunView(source.path if isinstance(source, Run) else Path(source), ReportOptions())


quadrant_shares = from_run(taxonomy.quadrant_shares)
quadrant_map = from_run(taxonomy.quadrant_map)
cut_sensitivity = from_run(taxonomy.cut_sensitivity)
quadrant_profile = from_run(gradients.quadrant_profile)
energy_shares = from_run(gradients.energy_shares)
group_shares = from_run(groups.group_shares)
composition = from_run(selection.composition)
overlap = from_run(selection.overlap)
coverage_curve = from_run(selection.coverage_curve)
accuracy_by_ratio = from_run(ablations.accuracy_by_ratio)
difference_from_all = from_run(ablations.difference_from_all)
claims = from_run(ablations.claims)
memory_by_ratio = from_run(ablations.memory_by_ratio)
training_curves = from_run(dynamics.training_curves)

FIGURES: dict[str, Callable[Concatenate[Source, ...], Figure]] = {
    figure.__name__: figure
    for figure in (
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
"""The figures of one run, by name."""


def quadrant_flow(source: Source, other: Source | None = None, **options: Any) -> Figure:
    """Where the tokens of each quadrant of one run are in another run of the same rollouts.

    Args:
        source: a `QuadrantFlowTable`, or a run.
        other: the other run.
        options: of `moves.quadrant_flow`.

    Raises:
        OptionError: a run is given alone.
        SchemaError: the runs hold other tokens at the same places.
    """
    if isinstance(source, pl.DataFrame):
        return moves.quadrant_flow(source, **options)
    if other is None or isinstance(other, pl.DataFrame):
        raise OptionError("expected two runs, found one: quadrant_flow(run_a, run_b)")
    a, b = _view(source), _view(other)
    table = flow_of(aligned_tokens(a.tokens, b.tokens), num_resamples=a.options.num_resamples)
    return moves.quadrant_flow(table, **{"names": (a.name, b.name), **options})


SUFFIXES = (".pdf", ".svg")


def write_figures(source: Source, folder: str | Path) -> list[Path]:
    """Write every figure that a run can fill as PDF and SVG; what the run lacks is left out.

    Args:
        source: a run.
        folder: made if need be; what an earlier call wrote there is replaced, file by file.

    Raises:
        OptionError: the folder holds a file that is not one of these figures, or the path is a
            file.
        RunError: no figure can be made; the first one's reason.
        StorageError: a file cannot be written; those that were there are intact.
    """
    if isinstance(source, pl.DataFrame):
        raise OptionError("expected a run, found a table: draw it with its own function")
    view, folder = _view(source), Path(folder)
    _refuse_foreign(folder)
    drawn, missing = {}, []
    for name, figure in FIGURES.items():
        try:
            drawn[name] = figure(view)
        except (RunError, SchemaError) as error:
            missing.append(error)
    if not drawn:
        raise missing[0]
    paths = [folder / f"{name}{suffix}" for name in drawn for suffix in SUFFIXES]
    for path in paths:
        _write(drawn[path.stem], path)
    return paths


def _write(figure: Figure, path: Path) -> None:
    """Whole or not at all, beside its place first."""
    with replacing(path) as part:
        save_figure(figure, part, suffix=path.suffix)


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"expected a folder for figures, found the file {folder}")
    held = sorted(folder.iterdir()) if folder.is_dir() else []
    foreign = [path.name for path in held if not _is_ours(path)]
    if foreign:
        raise OptionError(
            f"expected an empty folder or one of figures, found {', '.join(foreign[:3])} in"
            f" {folder}; name another folder"
        )


def _is_ours(path: Path) -> bool:
    """A file of one of these names that carries our mark, or the part of one."""
    if path.name.startswith(".") and path.suffix == ".part":
        return True
    named = path.stem in FIGURES and path.suffix in SUFFIXES
    return named and path.is_file() and CREATOR.encode() in path.read_bytes()
