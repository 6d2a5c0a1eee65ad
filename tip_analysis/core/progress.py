"""Progress of long steps: a bar with tokens per second and the time left, silent where stderr is no
terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tip_analysis.core.terminal import stderr_console


class Advance(Protocol):
    """Reports work done: `advance(items, tokens=n)`."""

    def __call__(self, items: float = 1, *, tokens: int = 0) -> None:
        """Report `items` done, and the tokens in them."""


class _Rate(ProgressColumn):
    """Tokens per second since the start of the task."""

    def render(self, task: Task) -> Text:
        tokens, elapsed = task.fields.get("tokens", 0), task.elapsed or 0.0
        return Text(f"{tokens / elapsed:,.0f} tok/s" if tokens and elapsed else "", style="cyan")


@contextmanager
def track(
    description: str, total: float, *, unit: str = "rollouts", done: int = 0
) -> Iterator[Advance]:
    """Show the progress of `total` items, `done` of which were there before.

    Example:
        with track("scoring", total=len(rollouts)) as advance:
            for batch in batches:
                ...
                advance(len(batch), tokens=num_tokens)
    """
    console = stderr_console()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit, markup=False),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=False, disable=not sys.stderr.isatty()
    ) as progress:
        task = progress.add_task(description, total=total, completed=done, tokens=0)

        def advance(items: float = 1, *, tokens: int = 0) -> None:
            progress.update(
                task, advance=items, tokens=progress.tasks[task].fields["tokens"] + tokens
            )

        yield advance
