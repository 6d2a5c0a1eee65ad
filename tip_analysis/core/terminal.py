"""A terminal's output for texts from anywhere: names come from files, and files from strangers."""

from typing import IO, Any, cast

from rich.console import Console
from rich.text import Text

from tip_analysis.core.streams import Output, Remarks
from tip_analysis.core.text import without_controls


class PlainConsole(Console):
    """A console that shows texts as they are: markup and emoji codes mean nothing, control
    characters are spelled out. Styles are `rich.text.Text`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Text as it stands, its control characters spelled out."""
        return super().render_str(without_controls(text), **options)


def stdout_console(**options: Any) -> PlainConsole:
    """For what a command has to say."""
    return PlainConsole(file=cast(IO[str], Output()), **options)


def stderr_console() -> PlainConsole:
    """For progress and the like: in a notebook too it goes to stderr, never among a cell's
    outputs."""
    return PlainConsole(file=cast(IO[str], Remarks()), force_jupyter=False)
