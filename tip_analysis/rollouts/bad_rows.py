"""Rows of prompt files that cannot be used: the first ends the work, or all are left out, counted
and named."""

import logging
from typing import Any

from tip_analysis.core.errors import InputError
from tip_analysis.core.names import OnBadRow

logger = logging.getLogger(__name__)

MAX_NAMED = 5
"""How many of the rows that were left out are named; all are counted."""


class BadRows:
    """What is done with rows that cannot be used; called with what is wrong with each."""

    def __init__(self, on_bad_row: "OnBadRow | str" = OnBadRow.FAIL) -> None:
        """Let bad rows be handled in one way.

        Args:
            on_bad_row: `fail` raises the first; `skip` counts them.

        Raises:
            UnknownNameError: it is neither.
        """
        self.skips = OnBadRow(on_bad_row) is OnBadRow.SKIP
        self.count = 0
        self.first: InputError | None = None
        self.named: list[str] = []
        """What is wrong with the first `MAX_NAMED`."""
        self._told = 0

    def __call__(self, problem: InputError) -> None:
        """Raise what is wrong with a row, or count the row as left out."""
        if not self.skips:
            raise problem
        self.count += 1
        self.first = self.first or problem
        if len(self.named) < MAX_NAMED:
            self.named.append(str(problem))

    def report(self, source: str) -> None:
        """Warn of what was left out since the last warning."""
        if (new := self.count - self._told) > 0:
            logger.warning("%d row(s) of %s were left out; %s", new, source, self._first_new())
        self._told = self.count

    def _first_new(self) -> str:
        if self._told < len(self.named):
            return f"the first: {self.named[self._told]}"
        return "the first of all: " + self.named[0]

    def record(self) -> dict[str, Any]:
        """The same for `run.json`; nothing where no row was left out."""
        return {"skipped_rows": self.count, "skipped": self.named} if self.count else {}

    def summary(self) -> dict[str, int]:
        """How many, for a stage's summary; nothing where no row was left out."""
        return {"num_skipped_rows": self.count} if self.count else {}


def as_bad_rows(on_bad_row: "BadRows | OnBadRow | str") -> BadRows:
    """Bad rows under a choice; those that are counted already stay what they are."""
    return on_bad_row if isinstance(on_bad_row, BadRows) else BadRows(on_bad_row)
