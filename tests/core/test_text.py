"""Texts from anywhere as they are shown."""

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from tip_analysis.core.terminal import PlainConsole
from tip_analysis.core.text import first_line, one_line, visible, without_controls

HOSTILE = [
    "\x1b[31m",
    "\u202eabc",
    "[/b]",
    "[bold]x",
    ":smile:",
    "\x07",
    "\x9b2J",
    "a\udcffb",
    "\u2066",
]


def is_safe(text: str) -> bool:
    """No control, format, surrogate or line separator beside joiners, line feeds and tabs."""
    allowed = "\n\t\u200c\u200d"
    return all(
        mark in allowed or unicodedata.category(mark) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        for mark in text
    )


@given(st.text())
def test_nothing_shown_controls_a_terminal(text):
    assert is_safe(without_controls(text))
    line = one_line(text)
    assert is_safe(line)
    assert "\n" not in line
    assert len(line) <= 600
    assert "\n" not in visible(text)


@given(st.text(st.characters(categories=["L", "N", "P", "S"])))
def test_ordinary_text_stays_as_it_is(text):
    assert without_controls(text) == text


def shown(*renderables, **options) -> str:
    stream = io.StringIO()
    PlainConsole(file=stream, width=200, **options).print(*renderables)
    return stream.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("terminal", [False, True])
def test_a_console_shows_texts_as_they_are(text, terminal):
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    for out in (shown(text), shown(table), shown(text, text)):
        assert without_controls(text) in out
    if not terminal:
        assert is_safe(shown(table))


def test_styles_of_our_own_still_work():
    assert "\x1b[1m" in shown("[red]x", style="bold", force_terminal=True, color_system="standard")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  \n indented\nmore"), "indented"),
        (ValueError(""), "ValueError"),
        (KeyError("name"), "'name'"),
    ],
)
def test_the_first_line_that_says_something(error: Exception, line: str) -> None:
    assert first_line(error) == line
