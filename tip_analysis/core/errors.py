"""The errors that tip_analysis raises on purpose.

Every error says what was expected, what was found, and the fix or the valid names. `InputError` and
its children mean that the input or the options are at fault (exit status 2, one line on stderr);
anything else is a failure of ours. Each is also the standard error that a caller would expect, so
`except ValueError` keeps working.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class TipAnalysisError(Exception):
    """Root of the errors raised on purpose by tip_analysis."""


class InputError(TipAnalysisError, ValueError):
    """Something is wrong with an input or an option: the user can fix it."""


class OptionError(InputError):
    """An option is out of its range, or options contradict each other."""


class UnknownNameError(InputError, LookupError):
    """A name (rule, cut, grader, column …) that is not registered."""

    def __init__(self, kind: str, name: str, valid: Iterable[str]) -> None:
        valid = list(valid)
        self._arguments = (kind, name, valid)
        close = get_close_matches(name, valid, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        super().__init__(f"unknown {kind} {name!r}{hint}; valid names: {', '.join(valid)}")

    def __reduce__(self) -> tuple[type, tuple[str, str, list[str]]]:
        return type(self), self._arguments  # so that it crosses from one process to another


class MissingExtraError(InputError, ImportError):
    """A package is not installed that an extra of tip-analysis brings."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self._arguments = (package, extra, purpose)
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed;"
            f' pip install "tip-analysis[{extra}]" brings it'
        )
        self.package = package
        """The name it is imported under."""
        self.extra = extra
        """The extra that brings it."""

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), self._arguments  # so that it crosses from one process to another


class UnsupportedVersionError(InputError, ImportError):
    """A package is installed in a version that this one was not made for."""


class RuleError(InputError):
    """A rule that a user registered fails; the original error is the cause."""


class SchemaError(InputError):
    """A table does not keep its contract (see `tip_analysis.core.schema`)."""


class PromptFileError(InputError):
    """A file of prompts cannot be used; the message names the line."""


class ImportFormatError(InputError):
    """A file that another tool wrote does not have the shape that its format promises."""


class ModelError(InputError):
    """A model cannot be found or loaded, or is not fit for the task."""


class VocabularyMismatchError(ModelError):
    """Student and teacher do not share one token-to-id map."""


class ContextLengthError(InputError):
    """A sequence is longer than a model's context."""


class LogitsError(InputError, ArithmeticError):
    """Logits hold NaN, +inf, or a row without any finite value."""

    def __init__(self, message: str, *, model: str | None = None, row: int | None = None) -> None:
        super().__init__(message)
        self.model = model
        """`student` or `teacher`."""
        self.row = row
        """Index of the first such row among those that were given."""

    model: str | None = None
    """Whose logits: `student` or `teacher`."""
    row: int | None = None
    """The first such row of the array that was given."""


class EngineError(InputError):
    """An engine or a server does not answer, or answers what it must not."""


class RunError(InputError):
    """A run folder is missing, unreadable, or lacks the stage that is needed first."""


class ConfigurationMismatchError(RunError):
    """A stage was begun with another configuration; the message lists the differences."""


class LockedError(RunError, TimeoutError):
    """Another process is at work on the same thing; the message says which."""


class StorageError(RunError, OSError):
    """Writing failed: no space, no permission. What was there before is intact."""
