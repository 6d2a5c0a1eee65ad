"""The only rooms that load or run a model: body, head, hidden states, batches.

In: a model's name (hub id, folder, adapter, GGUF file, built-in). Out: a `LanguageModel`, and the
hidden states that predict a response. `hidden_states` owns the next-token shift; nobody else
subtracts one. Read first: `loading`, then `hidden_states`.
"""

from tip_analysis.core.optional import attach_room

__getattr__, __dir__, __all__ = attach_room(__name__, __file__)
