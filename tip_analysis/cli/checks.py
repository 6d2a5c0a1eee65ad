"""Options and files are checked here, before anything slow is imported: a typing error costs no
minute of loading, and nothing is written before it is found.

A check belongs to an option's name, whichever command has it. What can only be judged with the
model or the run at hand is checked where it is used.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from tip_analysis.cli.ranges import check_options
from tip_analysis.core.errors import OptionError, UnknownNameError


def check_command(command: Any) -> None:
    """Check what can be checked of a parsed command without a model.

    Raises:
        InputError: the first thing that is wrong.
    """
    check_options(command)
    if hasattr(command, "engines"):
        _engine(command.engines)
    plans_only = getattr(command, "dry_run", False)
    for name, value in _given(command):
        if plans_only and name in ("student", "teacher"):
            continue  # no model is loaded
        if value is not None and name in CHECKS:
            CHECKS[name](value)


def _given(command: Any) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for field in fields(command):
        value = getattr(command, field.name)
        pairs += _given(value) if is_dataclass(value) else [(field.name, value)]
    return pairs


def _model(name: str) -> None:
    from tip_analysis.models.locating import check_model

    check_model(name)


def _teacher(name: str) -> None:
    from tip_analysis.rollouts.engines.settings import is_address, split_url

    if is_address(name):
        split_url(name, "--teacher")
    else:
        _model(name)


def _prompts(source: str | Sequence[str]) -> None:
    from tip_analysis.training.ablation.problem_sets import check_prompts

    for one in [source] if isinstance(source, str) else source:
        check_prompts(one)


def _files(paths: Sequence[Path]) -> None:
    from tip_analysis.core.errors import ImportFormatError
    from tip_analysis.rollouts.row_files import check_file

    for path in paths:
        if not path.is_dir():
            check_file(path, error=ImportFormatError)


def _format(name: str) -> None:
    from tip_analysis.rollouts.importers.formats import FORMATS

    if name not in FORMATS:
        raise UnknownNameError("format", name, FORMATS)


def _template(template: str) -> None:
    from tip_analysis.rollouts.rendering import resolve_template

    resolve_template(template)


def _switches(pairs: Sequence[str]) -> None:
    from tip_analysis.cli.option_values import parse_switches

    parse_switches(pairs)


def _part(text: str) -> None:
    from tip_analysis.cli.option_values import parse_part

    parse_part(text)


def _grader(name: str) -> None:
    from tip_analysis.rollouts.grading import resolve_grader

    resolve_grader(name)


def _engine(options: Any) -> None:
    options.settings().require()


def _rules(entries: Sequence[str]) -> None:
    from tip_analysis.analysis.arms import split_entry
    from tip_analysis.analysis.rules import rule

    for entry in entries:
        rule(split_entry(entry)[0])


def _arm(text: str) -> None:
    from tip_analysis.analysis.arms import Arm

    Arm.parse(text)


def _grouping(name: str) -> None:
    from tip_analysis.analysis.groupings import GROUPINGS

    if name != "quadrant" and name not in GROUPINGS:
        raise UnknownNameError("grouping", name, ["quadrant", *GROUPINGS])


def _preset(name: str) -> None:
    from tip_analysis.training.ablation.presets import PRESETS

    if name not in PRESETS:
        raise UnknownNameError("preset", name, PRESETS)


def _params(name: str) -> None:
    if name in ("all", "body", "head", "lora"):
        return
    if not re.fullmatch(r"last:[1-9][0-9]{0,5}", name):
        raise UnknownNameError("parameter scope", name, ["all", "body", "head", "last:N", "lora"])


def _dtype(name: str) -> None:
    from tip_analysis.models.locating import DTYPE_NAMES

    if name not in ("auto", *DTYPE_NAMES):
        raise UnknownNameError("dtype", name, ["auto", *DTYPE_NAMES])


def _device(name: str) -> None:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", name):
        raise OptionError(f"--device {name!r}: expected auto, cpu, cuda, cuda:N or mps")


def _runs(paths: Sequence[Path]) -> None:
    if not paths:
        raise OptionError("expected at least one run folder, as in `tip-analysis report runs/demo`")


CHECKS: dict[str, Callable[[Any], None]] = {
    "arm": _arm,
    "device": _device,
    "dtype": _dtype,
    "evaluation_prompts": _prompts,
    "files": _files,
    "from_": _format,
    "grader": _grader,
    "grouping": _grouping,
    "model": _model,
    "params": _params,
    "preset": _preset,
    "prompts": _prompts,
    "rules": _rules,
    "runs": _runs,
    "shard": _part,
    "student": _model,
    "teacher": _teacher,
    "template": _template,
    "chat_template_kwargs": _switches,
}
"""By the field's name in `options`."""
