"""How a run, its quadrants and its rollouts look where code is read: in a notebook or in a
terminal. Never imports torch.

`show_rollout` is the report's token browser for one rollout: the same colours and underlines, the
same numbers, the same way of making any token visible. What is returned here shows itself:
`_repr_html_` for notebooks (no script, no link, nothing fetched), `__rich__` for `rich.print`.
`Run` and `Cuts` show themselves through `run_html` and `cuts_html`.

Token texts are shown, never run: each goes through `text.visible` (controls and direction marks
spelled out) and is then escaped for HTML, or handed to rich as plain text.
"""

from tip_analysis.core.optional import attach_room

__getattr__, __dir__, __all__ = attach_room(__name__, __file__)
