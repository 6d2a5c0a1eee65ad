"""A terminal's output for texts from anywhere: names come from files, and files from strangers."""

import contextlib
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from tip_analysis.core.text import without_controls


class PlainConsole(Console):
    """A console that shows texts as they are: markup and emoji codes mean nothing, control
    characters are spelled out. Styles are `rich.text.Text`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Text as it stands, its control characters spelled out."""
        return super().render_str(without_controls(text), **options)

    def on_broken_pipe(self) -> None:
        """Whoever read our output is gone, which the command line ends with."""
        self.quiet = True
        raise BrokenPipeError


class _Stderr:
    """`sys.stderr` as it is at the time; that it cannot be written to stops nobody."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def stderr_console() -> PlainConsole:
    """For progress and the like."""
    return PlainConsole(file=_Stderr())
