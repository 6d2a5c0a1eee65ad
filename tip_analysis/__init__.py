"""Token-importance diagnostics for on-policy distillation, after TIP (arXiv 2604.14084).

    import tip_analysis as tip

    run = tip.open_run("runs/demo")
    scored = tip.add_scores(run.tokens())
    quadrants = tip.assign_quadrants(scored, entropy_cut="median", divergence_cut="mean")

Nothing is loaded before it is used: importing the package takes neither torch nor polars.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tip_analysis import analysis, figures, gradients, report, training
    from tip_analysis import logits as divergence
    from tip_analysis.analysis import add_scores, assign_quadrants, register_rule, select_tokens
    from tip_analysis.core import Quadrant, Run, create_run, open_run
    from tip_analysis.report.notebook import show_quadrants, show_rollout

try:
    __version__ = version("tip-analysis")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_ROOMS = {
    "analysis": "analysis",
    "divergence": "logits",
    "figures": "figures",
    "gradients": "gradients",
    "report": "report",
    "training": "training",
}
_HOMES = {
    "Quadrant": "core",
    "Run": "core",
    "add_scores": "analysis",
    "assign_quadrants": "analysis",
    "create_run": "core",
    "open_run": "core",
    "register_rule": "analysis",
    "select_tokens": "analysis",
    "show_quadrants": "report.notebook",
    "show_rollout": "report.notebook",
}

__all__ = [
    "Quadrant",
    "Run",
    "__version__",
    "add_scores",
    "analysis",
    "assign_quadrants",
    "create_run",
    "divergence",
    "figures",
    "gradients",
    "open_run",
    "register_rule",
    "report",
    "select_tokens",
    "show_quadrants",
    "show_rollout",
    "training",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"tip_analysis.{_ROOMS[name]}")
    if name in _HOMES:
        return getattr(import_module(f"tip_analysis.{_HOMES[name]}"), name)
    raise AttributeError(
        f"module 'tip_analysis' has no attribute {name!r}; it has {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return __all__
