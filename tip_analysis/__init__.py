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
    from tip_analysis import divergence, gradients
    from tip_analysis.artifacts import Run, create_run, open_run
    from tip_analysis.display import show_quadrants, show_rollout
    from tip_analysis.importance import add_scores
    from tip_analysis.quadrants import assign_quadrants
    from tip_analysis.schema import Quadrant
    from tip_analysis.selection import register_rule, select_tokens

try:
    __version__ = version("tip-analysis")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_MODULES = ("divergence", "gradients")
_HOMES = {
    "Quadrant": "schema",
    "Run": "artifacts",
    "add_scores": "importance",
    "assign_quadrants": "quadrants",
    "create_run": "artifacts",
    "open_run": "artifacts",
    "register_rule": "selection",
    "select_tokens": "selection",
    "show_quadrants": "display",
    "show_rollout": "display",
}

__all__ = [
    "Quadrant",
    "Run",
    "__version__",
    "add_scores",
    "assign_quadrants",
    "create_run",
    "divergence",
    "gradients",
    "open_run",
    "register_rule",
    "select_tokens",
    "show_quadrants",
    "show_rollout",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"tip_analysis.{name}")
    if name in _HOMES:
        return getattr(import_module(f"tip_analysis.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tip_analysis' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
