"""The shared names: text in, member out, and a clear refusal."""

import json

import polars as pl
import pytest

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
