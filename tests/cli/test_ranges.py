"""Every numeric option of every command, by its declared range: what lies outside is refused in one
line before anything is loaded, what lies inside is taken."""

import itertools
import math
import subprocess
import sys
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import tyro

from tip_analysis.cli import main as cli
from tip_analysis.cli.ranges import Range, check_options, ranges_of, typed_name
from tip_analysis.cli.registry import COMMANDS, Command
from tip_analysis.core.errors import OptionError

NEEDED = {
    "demo": [],
    "rollout": ["run", "--student", "s", "--prompts", "p"],
    "import": ["run", "--from", "native", "--files", "f", "--student", "s"],
    "score": ["run", "--teacher", "t"],
    "gradients": ["run"],
    "select": ["run", "--rules", "q3"],
    "screen": ["run"],
    "rank-rules": ["run"],
    "influence": ["run"],
    "intervene": ["run"],
    "track": ["run", "--arm", "q3:0.1"],
    "claims": ["f.toml"],
    "ablate": ["run", "--dry-run"],
    "evaluate": ["run", "--model", "m", "--prompts", "p"],
    "compare": ["a", "b"],
    "status": ["run"],
    "export": ["run", "--to", "t"],
    "report": ["run"],
}
"""What each command cannot do without; none of it exists."""

NUMERIC = [
    pytest.param(command, option, declared, id=f"{command} {option}")
    for command, kind in COMMANDS.items()
    for option, declared in ranges_of(kind).items()
]
NEVER = [
    "nan",
    "inf",
    "-inf",
    "1e23",
    "9" * 24,
    "many",
    "0x10",
    "",
    "1e400",
    "--",
    "١e",
    "9" * 5000,
]


def outside(declared: Range) -> list[str]:
    step = 1 if declared.whole else 1e-6
    edges = [] if declared.above else [declared.low - step]
    edges += [declared.low] if declared.above else []
    edges += [declared.high] if declared.below else [declared.high + step]
    texts = [str(int(edge)) if declared.whole else repr(edge) for edge in [*edges, -1.0]]
    return [*texts, *NEVER, *(["0.5"] if declared.whole else [])]


def inside(declared: Range) -> list[str]:
    if declared.whole:
        return [str(int(declared.low)), str(int(declared.high))]
    middle = (declared.low + declared.high) / 2
    low = [] if declared.above else [declared.low]
    high = [] if declared.below else [declared.high]
    return [repr(number) for number in [*low, middle, *high]]


def typed(command: str, option: str, value: str) -> list[str]:
    return [command, *NEEDED[command], option, value]


@pytest.mark.parametrize(("command", "option", "declared"), NUMERIC)
def test_what_lies_outside_is_refused_in_one_line(capsys, command, option, declared):
    for value in outside(declared):
        with pytest.raises(SystemExit) as stopped:
            cli.main(typed(command, option, value))
        assert stopped.value.code == 2, value
        if value == "--":  # ends the options for the parser, which has a box of its own
            capsys.readouterr()
            continue
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
        assert line.startswith(f"error: {option}: expected "), (value, line)
        assert len(line) < 250


@pytest.mark.parametrize(("command", "option", "declared"), NUMERIC)
def test_what_lies_inside_is_taken(command, option, declared):
    for value in inside(declared):
        check_options(tyro.cli(Command, args=typed(command, option, value)))


@pytest.mark.parametrize(("command", "kind"), COMMANDS.items())
def test_every_number_has_a_range_that_holds_its_default(command, kind):
    assert command in NEEDED
    for name, _, default in numbers_in(kind):
        declared = ranges_of(kind).get(typed_name(name))
        assert declared is not None, f"{command}: {name} has no range"
        for value in default if isinstance(default, tuple) else (default,):
            assert value is None or declared.problem(value) is None


def numbers_in(kind: type) -> list[tuple[str, Any, Any]]:
    """Fields whose type holds int or float, those of groups included."""
    found = []
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint = hints[field.name]
        group = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if is_dataclass(group):
            found += numbers_in(group)
        elif {int, float} & set(leaves(hint)) or field.name.endswith("_cut"):
            found.append((field.name, hint, field.default))
    return found


def leaves(hint: Any) -> list[Any]:
    parts = get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint)
    return [leaf for part in parts for leaf in leaves(part)] if parts else [hint]


@pytest.mark.parametrize(("command", "option", "declared"), NUMERIC)
def test_help_shows_the_range(command, option, declared, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out.replace("\n", " ")
    assert declared.metavar() in shown


@pytest.mark.parametrize("value", ["q0.5", "q0", "q1", "otsu", "paper", "0", "10000", "1e-3"])
def test_cuts_have_names_and_quantiles_beside_numbers(value):
    check_options(tyro.cli(Command, args=typed("select", "--entropy-cut", value)))


@pytest.mark.parametrize("value", ["q", "q1.1", "qnan", "q-0.1", "Q0.5", "median ", "mode"])
def test_other_cuts_are_refused(value):
    with pytest.raises(OptionError, match="--divergence-cut"):
        check_options(tyro.cli(Command, args=typed("select", "--divergence-cut", value)))


@pytest.mark.parametrize("text", ["a\udcffb", "a\udc80"])
@pytest.mark.parametrize("command", COMMANDS)
def test_text_that_is_not_utf8_is_refused(capsys, command, text):
    if command == "demo":
        arguments = ["demo", "--out", text]
    else:
        arguments = [command, text, *NEEDED[command][1:]]
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "expected text in UTF-8" in error
    assert "\udcff" not in error


def test_ranges_speak_for_themselves():
    share = Range(0, 1, whole=False, above=True)
    assert share.metavar() == "NUMBER(0..1]"
    assert share.words() == "a number above 0 and at most 1"
    assert share.problem(1) is None
    assert share.problem(math.nan) == "expected a number above 0 and at most 1, found nan"
    half_open = Range(2, 5, below=True)
    assert [half_open.problem(value) is None for value in range(1, 7)] == [
        False,
        True,
        True,
        True,
        False,
        False,
    ]
    for low, high in itertools.product((0, 3), (7, 10**9)):
        assert str(low) in Range(low, high).words()


def test_nothing_slow_is_imported_before_a_range_is_checked():
    script = (
        "import sys\nfrom tip_analysis.cli.main import main\n"
        "try:\n    main(['ablate', 'run', '--dry-run', '--steps', '-1'])\n"
        "except SystemExit as end:\n    assert end.code == 2\n"
        "assert not {'torch', 'transformers', 'polars', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
