"""Options that take one of a closed set of names: the names of `core.names`, in help as in use."""

import contextlib
import io
from dataclasses import is_dataclass
from enum import Enum
from typing import Any, get_args, get_type_hints

import pytest

from tip_analysis.cli import main as cli
from tip_analysis.cli.registry import COMMANDS
from tip_analysis.core.names import Loss, Mode, Precision, ScoringPhase, StopTokens

NEEDED = {
    "import": ["run", "--from", "native", "--files", "f", "--student", "s"],
    "score": ["run", "--teacher", "t"],
    "gradients": ["run"],
    "select": ["run", "--rules", "q3"],
    "ablate": ["run"],
    "demo": [],
    "rollout": ["run", "--student", "s", "--prompts", "p"],
    "evaluate": ["run", "--model", "m", "--prompts", "p"],
    "status": ["run"],
    "screen": ["run"],
    "rank-rules": ["run"],
    "influence": ["run"],
    "intervene": ["run"],
    "track": ["run", "--arm", "q3:0.1"],
    "claims": ["f.toml"],
    "compare": ["a", "b"],
    "export": ["run", "--to", "t"],
    "report": ["run"],
}
"""What each command cannot do without."""


def members(hint: Any) -> list[Enum]:
    """The members that a type admits, alone, in a tuple, in a Literal or beside None."""
    if isinstance(hint, Enum):
        return [hint]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return list(hint)
    return [member for part in get_args(hint) for member in members(part)]


def groups(kind: type) -> list[type]:
    hints = get_type_hints(kind).values()
    return [kind, *filter(is_dataclass, hints)]


CHOICES = [
    pytest.param(command, group, field, admitted, id=f"{command} {field}")
    for command, kind in COMMANDS.items()
    for group in groups(kind)
    for field, hint in get_type_hints(group).items()
    if (admitted := members(hint))
]


def help_of(command: str) -> str:
    written = io.StringIO()
    with contextlib.redirect_stdout(written), pytest.raises(SystemExit):
        cli._parse([command, "--help"])
    return written.getvalue()


def test_every_enumeration_among_the_options_is_found() -> None:
    found = {field for _, _, field, _ in (param.values for param in CHOICES)}
    assert found >= {"phase", "method", "loss", "mode", "schedule", "on_bad_row", "cut_scope"}
    assert {command for command, *_ in (param.values for param in CHOICES)} <= set(NEEDED)


@pytest.mark.parametrize(("command", "group", "field", "admitted"), CHOICES)
def test_what_help_shows_is_what_is_taken(
    command: str, group: type, field: str, admitted: list[Enum]
) -> None:
    option = f"--{field.rstrip('_').replace('_', '-')}"
    shown = help_of(command).split(f" {option} ", maxsplit=1)[1].split("}", maxsplit=1)[0]
    values = {str(member.value) for member in admitted}
    assert set(shown.split("{", maxsplit=1)[1].split(",")) - {"None"} == values
    for member in admitted:
        parsed = cli._parse([command, *NEEDED[command], option, str(member.value)])
        holder = next(part for part in (parsed, *vars(parsed).values()) if isinstance(part, group))
        taken = getattr(holder, field)
        assert (taken[0] if isinstance(taken, tuple) else taken) is member


@pytest.mark.parametrize(
    ("command", "option", "text"),
    [
        ("score", "--stop-tokens", StopTokens.MERGED.name),
        ("score", "--phase", f"{ScoringPhase.BOTH} "),
        ("gradients", "--loss", "kl"),
        ("ablate", "--mode", Mode.OFFLINE.value.upper()),
        ("ablate", "--loss", Loss.NEGATIVE_LOGPROB.value),
        ("ablate", "--precision", Precision.FLOAT64.value),
        ("report", "--cut-scope", "rollout"),
    ],
)
def test_any_other_text_is_refused_with_the_names(
    command: str, option: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli._parse([command, *NEEDED[command], option, text])
    assert ended.value.code == 2
    assert option in capsys.readouterr().err
