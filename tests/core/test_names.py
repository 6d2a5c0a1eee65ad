"""The shared names: text in, member out, and a clear refusal."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

import tip_analysis
from tip_analysis.core import names
from tip_analysis.core.errors import UnknownNameError
from tip_analysis.core.names import Name, Quadrant, Scope, TeacherStoreForm

ENUMERATIONS = [
    kind
    for kind in vars(names).values()
    if isinstance(kind, type) and issubclass(kind, Name) and kind is not Name
]


@pytest.mark.parametrize("kind", ENUMERATIONS)
def test_a_member_is_its_text(kind: type[Name]) -> None:
    for member in kind:
        assert kind(member.value) is member
        assert kind(member) is member
        assert member == member.value
        assert f"{member}" == member.value
        assert json.loads(json.dumps({"name": member})) == {"name": member.value}


def test_a_text_that_names_nothing_is_refused_with_the_valid_names() -> None:
    with pytest.raises(UnknownNameError, match="unknown scope 'rollout'; valid names: run, batch"):
        Scope("rollout")
    with pytest.raises(UnknownNameError, match=r"form 'hiden' \(did you mean 'hidden'"):
        TeacherStoreForm("hiden")


def test_codes_of_quadrants_are_two_low_entropy_plus_low_divergence() -> None:
    expected = {"Q1": 2 * 0 + 0, "Q2": 2 * 0 + 1, "Q3": 2 * 1 + 0, "Q4": 2 * 1 + 1}
    assert {quadrant: quadrant.code for quadrant in Quadrant} == expected


def test_polars_takes_members_as_text() -> None:
    frame = pl.DataFrame({"quadrant": ["Q1", "Q3"]}, schema={"quadrant": pl.Enum(Quadrant)})
    assert frame.filter(pl.col("quadrant") == Quadrant.Q3).height == 1


def test_names_look_in_messages_as_they_are_typed():
    assert f"{Scope.RUN!r}" == "'run'"
    assert [Scope.RUN, Scope.BATCH].__repr__() == "['run', 'batch']"


NAMES_OF_MEMBERS = {
    *("cut_scope", "normalization_scope", "selection_scope"),
    *("loss_normalizer", "loss_aggregation", "schedule", "precision", "mode", "method"),
    *("teacher_context", "finish_reason", "ids_origin", "template_origin", "on_bad_row"),
    *("phase", "engine", "stop_tokens", "teacher_store", "relation"),
}
"""What holds a member of an enumeration, wherever it is a parameter or a field."""
TEXTS_OF_OTHERS = {
    "rollouts/engines/completions.py",  # `method` of an HTTP request
    "training/trl_trainer.py",  # a configuration of TRL's, whose parser takes texts
}


def annotated(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            yield node.arg, node.annotation
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.annotation


def test_no_parameter_or_field_with_a_closed_set_of_names_is_a_mere_text() -> None:
    package = Path(tip_analysis.__file__).parent
    texts = [
        f"{path.relative_to(package)}: {name}: {ast.unparse(annotation)}"
        for path in sorted(package.rglob("*.py"))
        if str(path.relative_to(package)) not in TEXTS_OF_OTHERS
        for name, annotation in annotated(ast.parse(path.read_text("utf-8")))
        if name in NAMES_OF_MEMBERS
        and {"str"} <= set(ast.unparse(annotation).split(" | "))
        and not any(kind.__name__ in ast.unparse(annotation) for kind in ENUMERATIONS)
    ]
    assert texts == []
