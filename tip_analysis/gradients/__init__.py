"""Part one, dump: the norm of each token's own gradient, and where it points (Proposition 1).

In: scored rollouts and both models. Out: `gradients/*.parquet`, one row per token, loss, scope,
method and seed (`core.schema.GradientTable`). One backward pass for the loss, forward-mode passes
for the tokens. Read first: `measuring`, then `forward_mode`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
