"""Part one, dump: the norm of each token's own gradient, and where it points (Proposition 1).

In: scored rollouts and both models. Out: `gradients/*.parquet`, one row per token, loss, scope,
method and seed (`core.schema.GradientTable`). One backward pass for the loss, forward-mode passes
for the tokens. Read first: `measuring`, then `forward_mode`.
"""

from tip_analysis.core.optional import attach_room

__getattr__, __dir__, __all__ = attach_room(__name__, __file__)
