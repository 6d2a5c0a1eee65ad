"""How objects show themselves in a notebook: what draws them stands above them, and is loaded only
where somebody looks."""

from typing import Any


def notebook_html(shown: Any) -> str:
    """What `_repr_html_` of a run or of cuts answers."""
    from tip_analysis.report.notebook.runs import html_of

    return html_of(shown)
