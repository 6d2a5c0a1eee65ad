"""What a loaded model, an unloaded one and one behind a server have in common: all but weights."""

from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase


class TokenModel(Protocol):
    """All of a model but its weights; `LanguageModel` has it too."""

    @property
    def name(self) -> str:
        """As users name it."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        ...

    @property
    def vocab_size(self) -> int:
        """Rows of the output head, padding rows included."""
        ...

    @property
    def context_length(self) -> int | None:
        """The longest sequence that it accepts, where its config says so."""
        ...

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end a rollout."""
        ...

    def describe(self) -> dict[str, Any]:
        """What `run.json` records of it."""
        ...
