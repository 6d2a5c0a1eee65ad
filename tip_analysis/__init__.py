"""Token-importance diagnostics for on-policy distillation, after TIP (arXiv 2604.14084).

    import tip_analysis as tip

    run = tip.open_run("runs/demo")
    scored = tip.add_scores(run.tokens())
    quadrants = tip.assign_quadrants(scored, entropy_cut="median", divergence_cut="mean")

Stages are functions too: `tip.rollout`, `tip.score`, `tip.measure_gradients`, `tip.select`,
`tip.ablate`, `tip.evaluate`, `tip.write_report`, `tip.export`. Rooms are attributes:
`tip.analysis`, `tip.figures`, `tip.report`, `tip.training`, `tip.divergence` … `dir(tip)` lists all
of them.

Nothing is loaded before it is used: importing the package takes neither torch nor polars. `_HOMES`
says which name lives where.
"""

from __future__ import annotations

import sys
from importlib import import_module

TYPE_CHECKING = False  # as in `typing`, whose import would be most of this one's time
if TYPE_CHECKING:
    from typing import Any

    from tip_analysis import (
        analysis,
        figures,
        gradients,
        models,
        report,
        rollouts,
        scoring,
        training,
    )
    from tip_analysis import logits as divergence
    from tip_analysis.analysis import (
        DEFAULT_GRID,
        PAPER_RANGES,
        Cuts,
        Preference,
        ReportOptions,
        RunView,
        Taxonomy,
        add_scores,
        arm_results,
        arms_of_pairs,
        assign_quadrants,
        assumption_2,
        bootstrap_interval,
        claims_table,
        compare_runs,
        composition,
        correlation_table,
        coverage,
        coverage_curve,
        cut_sensitivity,
        density,
        differences_from_all,
        dynamics_curves,
        export,
        final_arms,
        influence_columns,
        influence_matrix,
        intervention_aucs,
        intervention_effects,
        join_gradients,
        judge_hypotheses,
        league_table,
        overlap,
        paper_differences,
        parse_arms,
        placed_trajectory,
        planted_detection,
        planted_recall,
        prefer_measurement,
        proposition_2,
        q3_survival,
        quadrant_shares,
        quadrant_statistics,
        rank_rules,
        ranking_validity,
        read_hypotheses,
        realised_falls,
        register_rule,
        register_score,
        resolve_cuts,
        rock_tokens,
        rule_names,
        sample_metrics,
        screen,
        select,
        select_tokens,
        strongest_tokens,
        text_around,
        to_masks,
        trajectory_flow,
        weigh_tokens,
        weighting_names,
        widen,
        with_selected,
    )
    from tip_analysis.core import (
        InputError,
        Loss,
        MissingExtraError,
        Quadrant,
        Run,
        StageSummary,
        TipAnalysisError,
        create_run,
        open_run,
    )
    from tip_analysis.demo import example_run, make_small_run, run_demo
    from tip_analysis.gradients import influence, measure_gradients, rank_cosines
    from tip_analysis.models import LanguageModel, load_model, load_tokenizer
    from tip_analysis.report import build_report, write_report
    from tip_analysis.report.notebook import show_quadrants, show_rollout
    from tip_analysis.rollouts import Prompt, import_run, read_prompts, register_grader, rollout
    from tip_analysis.scoring import intervene, score, track
    from tip_analysis.training import TrainingOptions, ablate, evaluate, log_step
    from tip_analysis.training import trl_trainer as trl

    __version__: str

__all__ = [
    "DEFAULT_GRID",
    "PAPER_RANGES",
    "Cuts",
    "InputError",
    "LanguageModel",
    "Loss",
    "MissingExtraError",
    "Preference",
    "Prompt",
    "Quadrant",
    "ReportOptions",
    "Run",
    "RunView",
    "StageSummary",
    "Taxonomy",
    "TipAnalysisError",
    "TrainingOptions",
    "__version__",
    "ablate",
    "add_scores",
    "analysis",
    "arm_results",
    "arms_of_pairs",
    "assign_quadrants",
    "assumption_2",
    "bootstrap_interval",
    "build_report",
    "claims_table",
    "compare_runs",
    "composition",
    "correlation_table",
    "coverage",
    "coverage_curve",
    "create_run",
    "cut_sensitivity",
    "density",
    "differences_from_all",
    "divergence",
    "dynamics_curves",
    "evaluate",
    "example_run",
    "export",
    "figures",
    "final_arms",
    "gradients",
    "import_run",
    "influence",
    "influence_columns",
    "influence_matrix",
    "intervene",
    "intervention_aucs",
    "intervention_effects",
    "join_gradients",
    "judge_hypotheses",
    "league_table",
    "load_model",
    "load_tokenizer",
    "log_step",
    "make_small_run",
    "measure_gradients",
    "models",
    "open_run",
    "overlap",
    "paper_differences",
    "parse_arms",
    "placed_trajectory",
    "planted_detection",
    "planted_recall",
    "prefer_measurement",
    "proposition_2",
    "q3_survival",
    "quadrant_shares",
    "quadrant_statistics",
    "rank_cosines",
    "rank_rules",
    "ranking_validity",
    "read_hypotheses",
    "read_prompts",
    "realised_falls",
    "register_grader",
    "register_rule",
    "register_score",
    "report",
    "resolve_cuts",
    "rock_tokens",
    "rollout",
    "rollouts",
    "rule_names",
    "run_demo",
    "sample_metrics",
    "score",
    "scoring",
    "screen",
    "select",
    "select_tokens",
    "show_quadrants",
    "show_rollout",
    "strongest_tokens",
    "text_around",
    "to_masks",
    "track",
    "training",
    "trajectory_flow",
    "trl",
    "weigh_tokens",
    "weighting_names",
    "widen",
    "with_selected",
    "write_report",
]

_ROOMS = {
    "divergence": "logits",
    "analysis": "analysis",
    "figures": "figures",
    "gradients": "gradients",
    "models": "models",
    "report": "report",
    "rollouts": "rollouts",
    "scoring": "scoring",
    "training": "training",
    "trl": "trl",
}
_HOMES = {
    "Cuts": "analysis",
    "DEFAULT_GRID": "analysis",
    "PAPER_RANGES": "analysis",
    "Preference": "analysis",
    "ReportOptions": "analysis",
    "RunView": "analysis",
    "Taxonomy": "analysis",
    "add_scores": "analysis",
    "arm_results": "analysis",
    "assign_quadrants": "analysis",
    "weighting_names": "analysis",
    "weigh_tokens": "analysis",
    "sample_metrics": "analysis",
    "dynamics_curves": "analysis",
    "arms_of_pairs": "analysis",
    "bootstrap_interval": "analysis",
    "claims_table": "analysis",
    "compare_runs": "analysis",
    "composition": "analysis",
    "correlation_table": "analysis",
    "coverage": "analysis",
    "coverage_curve": "analysis",
    "cut_sensitivity": "analysis",
    "density": "analysis",
    "differences_from_all": "analysis",
    "export": "analysis",
    "final_arms": "analysis",
    "influence_columns": "analysis",
    "influence_matrix": "analysis",
    "join_gradients": "analysis",
    "league_table": "analysis",
    "overlap": "analysis",
    "paper_differences": "analysis",
    "parse_arms": "analysis",
    "planted_detection": "analysis",
    "planted_recall": "analysis",
    "prefer_measurement": "analysis",
    "proposition_2": "analysis",
    "quadrant_shares": "analysis",
    "quadrant_statistics": "analysis",
    "rank_rules": "analysis",
    "ranking_validity": "analysis",
    "register_rule": "analysis",
    "register_score": "analysis",
    "resolve_cuts": "analysis",
    "rule_names": "analysis",
    "screen": "analysis",
    "select": "analysis",
    "select_tokens": "analysis",
    "strongest_tokens": "analysis",
    "text_around": "analysis",
    "to_masks": "analysis",
    "widen": "analysis",
    "InputError": "core",
    "Loss": "core",
    "MissingExtraError": "core",
    "Quadrant": "core",
    "Run": "core",
    "StageSummary": "core",
    "TipAnalysisError": "core",
    "create_run": "core",
    "open_run": "core",
    "example_run": "demo",
    "make_small_run": "demo",
    "run_demo": "demo",
    "influence": "gradients",
    "measure_gradients": "gradients",
    "rank_cosines": "gradients",
    "LanguageModel": "models",
    "load_model": "models",
    "load_tokenizer": "models",
    "build_report": "report",
    "write_report": "report",
    "show_quadrants": "report.notebook",
    "show_rollout": "report.notebook",
    "Prompt": "rollouts",
    "import_run": "rollouts",
    "read_prompts": "rollouts",
    "register_grader": "rollouts",
    "rollout": "rollouts",
    "score": "scoring",
    "TrainingOptions": "training",
    "ablate": "training",
    "evaluate": "training",
    "log_step": "training",
    "intervention_aucs": "analysis",
    "intervention_effects": "analysis",
    "judge_hypotheses": "analysis",
    "placed_trajectory": "analysis",
    "q3_survival": "analysis",
    "trajectory_flow": "analysis",
    "read_hypotheses": "analysis",
    "realised_falls": "analysis",
    "rock_tokens": "analysis",
    "with_selected": "analysis",
    "assumption_2": "analysis",
    "intervene": "scoring",
    "track": "scoring",
}
"""The room that each name lives in. Type checkers read the imports above, a running program this; a
test holds the two together."""


class _Alias(type(sys)):
    """A module of the package's under another name, imported when one of its names is used."""

    def __init__(self, alias: str, home: str) -> None:
        super().__init__(f"tip_analysis.{alias}")
        self._home = home

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # the import system asks for these, and needs no answer
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        from tip_analysis.core.optional import extras_named

        with extras_named(f"{self.__name__}.{name}"):
            return getattr(import_module(f"tip_analysis.{self._home}"), name)


sys.modules["tip_analysis.trl"] = _Alias("trl", "training.trl_trainer")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("tip_analysis.core.provenance").package_version()
    if name in _ROOMS:
        return import_module(f"tip_analysis.{_ROOMS[name]}")
    if name in _HOMES:
        from tip_analysis.core.optional import extras_named

        with extras_named(f"tip.{name}"):
            return getattr(import_module(f"tip_analysis.{_HOMES[name]}"), name)
    raise AttributeError(
        f"module 'tip_analysis' has no attribute {name!r}; it has {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return __all__
