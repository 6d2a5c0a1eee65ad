"""The page of commands, from the docstrings of `tip_analysis.cli.commands`: what `--help` says."""

import argparse
import re
import warnings
from collections.abc import Iterator

import tyro

from tip_analysis.cli.main import DESCRIPTION
from tip_analysis.cli.registry import Command

HEAD = """# Commands

`tip-analysis COMMAND …` is the same as `python -m tip_analysis COMMAND …`. Every command has
`--help` with the text below. Lists are separated by spaces. Exit status: 0 done; 2 for anything
wrong with input or options, with one line on stderr; 1 for a failure of ours.

"""


def commands_page() -> str:
    """Every command with its arguments, in the order of `--help`."""
    parts = [HEAD, f"{DESCRIPTION}\n"]
    for name, parser in _commands().items():
        parts.append(f"## {name}\n\n{parser.description}\n\n{_table(parser)}\n")
    return "\n".join(parts)


def _commands() -> dict[str, argparse.ArgumentParser]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(Command, prog="tip-analysis")
    [commands] = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    return commands


def _table(parser: argparse.ArgumentParser) -> str:
    lines = ["| argument | takes | default | meaning |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *_rows(parser)])


def _rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if "--help" in action.option_strings:
            continue
        text = " ".join(str(action.help or "").split())
        meaning, default = _split_default(text)
        name = ", ".join(action.option_strings) or str(action.metavar)
        takes = f"`{action.metavar}`" if action.metavar and action.option_strings else ""
        yield f"| {_cell(f'`{name}`')} | {_cell(takes)} | {_cell(default)} | {_cell(meaning)} |"


def _split_default(text: str) -> tuple[str, str]:
    """A help text without the bracket that ends it, and what the bracket says."""
    found = re.fullmatch(r"(?s)(.*?)\s*\((required|default: (.*?))\)", text)
    if not found:
        return text, ""
    if found[2] == "required":
        return found[1], "required"
    return found[1], f"`{found[3]}`" if found[3] not in ("", "None", "False") else ""


def _cell(text: str) -> str:
    return text.replace("{None}|", "").replace("|", " or ")
