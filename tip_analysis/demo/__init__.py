"""On top: the embedded arithmetic pair, whose errors are planted, through every stage.

In: nothing but the shipped weights. Out: a full run folder and its report in a minute or two.
The pair's language is registered under `tip_analysis.pairs`, so that rooms below can label and
grade it. Read first: `demo_run`, then `arithmetic.language`.
"""

from tip_analysis.core.optional import attach_room

__getattr__, __dir__, __all__ = attach_room(__name__, __file__)
