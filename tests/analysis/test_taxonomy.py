"""The taxonomy's options: one object, keywords as sugar, nothing measured twice."""

import dataclasses

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from strategies import frame, token_frames

from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, Taxonomy, resolve_cuts
from tip_analysis.cli.option_groups import TaxonomyOptions
from tip_analysis.core.errors import OptionError, UnknownNameError
from tip_analysis.core.names import Scope

CUTS = ["median", "mean", "otsu", "q0.8", 0.3, "0.125"]


@settings(deadline=None, max_examples=40)
@given(
    token_frames(), st.sampled_from(CUTS), st.sampled_from(CUTS), st.sampled_from(["run", "batch"])
)
def test_keywords_and_a_measured_taxonomy_say_the_same(tokens, entropy, divergence, scope) -> None:
    taxonomy = Taxonomy(entropy, divergence, scope)
    keywords = {"entropy_cut": entropy, "divergence_cut": divergence, "cut_scope": scope}
    assert resolve_cuts(tokens, **keywords) == taxonomy.measure(tokens)
    handed_on = assign_quadrants(tokens, cuts=taxonomy.measure(tokens)).collect()
    assert_frame_equal(handed_on, assign_quadrants(tokens, **keywords).collect())


@settings(deadline=None, max_examples=30)
@given(token_frames(), st.sampled_from(["run", "batch"]), st.sampled_from([None, 0.9]))
def test_its_normalization_is_that_of_the_keywords(tokens, scope, clip) -> None:
    taxonomy = Taxonomy(normalization_scope=scope, divergence_clip=clip)
    found = add_scores(tokens, normalization=taxonomy.normalization(tokens)).collect()
    wanted = add_scores(tokens, normalization_scope=scope, divergence_clip=clip).collect()
    assert_frame_equal(found, wanted)


def test_the_command_line_has_the_same_options_and_defaults() -> None:
    assert Taxonomy(**dataclasses.asdict(TaxonomyOptions())) == DEFAULT_TAXONOMY
    assert [field.name for field in dataclasses.fields(TaxonomyOptions)] == [
        field.name for field in dataclasses.fields(Taxonomy)
    ]


def test_changed_takes_some_cuts_and_keeps_the_rest() -> None:
    taxonomy = Taxonomy("otsu", 0.5, "batch", divergence_clip=0.9)
    assert taxonomy.changed() is taxonomy
    assert taxonomy.changed(divergence_cut="mean") == Taxonomy(
        "otsu", "mean", "batch", divergence_clip=0.9
    )
    with pytest.raises(TypeError, match="entrpy_cut"):
        taxonomy.changed(entrpy_cut=0.1)  # pyright: ignore[reportCallIssue]


def test_arguments_are_what_the_command_line_takes() -> None:
    assert Taxonomy("q0.8", 0.5, "batch", "run", 0.98).arguments() == (
        "--entropy-cut q0.8 --divergence-cut 0.5 --normalization-scope run --divergence-clip 0.98"
        " --cut-scope batch"
    )


def test_what_is_not_valid_is_refused_before_any_table_is_read() -> None:
    assert Taxonomy(cut_scope="batch").cut_scope is Scope.BATCH
    with pytest.raises(UnknownNameError, match="unknown scope 'rollout'"):
        Taxonomy(normalization_scope="rollout")
    with pytest.raises(OptionError, match="entropy cut must be"):
        Taxonomy(entropy_cut="medium")
    with pytest.raises(OptionError, match="chooses both cuts together"):
        Taxonomy("paper", "otsu")
    with pytest.raises(OptionError, match="divergence_clip"):
        Taxonomy(divergence_clip=1.5)


def test_cuts_are_measured_on_what_the_student_wrote() -> None:
    tokens = frame([0.0, 1.0, 5.0], [0.0, 1.0, 9.0])
    masked = tokens.with_columns(loss_mask=pl.col("student_entropy") < 5.0)
    cuts = DEFAULT_TAXONOMY.measure(masked)
    assert (cuts.entropy.value, cuts.divergence.value) == (0.5, 0.5)
