"""A report of which a part cannot be made is a report: the part's place says why."""

import re
from dataclasses import replace
from functools import partial

import polars as pl
import pytest
from synthetic import make_tables, write_run

from tip_analysis.analysis.run_view import ReportOptions
from tip_analysis.core.errors import OptionError, SchemaError
from tip_analysis.report import build
from tip_analysis.report.build import build_report

OPTIONS = ReportOptions(num_resamples=10)
KEYS = [key for key, _, _ in build.section_makers([], "")]
"""Every section of the report."""


@pytest.fixture(autouse=True, scope="module")
def _no_drawing():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tip_analysis.report.page.inline_svg", lambda *_arguments, **_options: "")
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    tables = make_tables(num_prompts=3, rollouts_per_prompt=2, mean_length=6)
    return write_run(tmp_path_factory.mktemp("runs") / "small", tables)


def break_sections(monkeypatch, errors: dict[str, Exception]) -> None:
    """Have the makers of these sections raise."""
    make = build.section_makers

    def raise_it(error: Exception):
        raise error

    def broken(views, output):
        return [
            (key, title, partial(raise_it, errors[key]) if key in errors else maker)
            for key, title, maker in make(views, output)
        ]

    monkeypatch.setattr(build, "section_makers", broken)


def section_of(page: str, key: str) -> str:
    (found,) = re.findall(rf'<section id="{key}".*?</section>', page, flags=re.DOTALL)
    return re.sub(r"table-\d+", "table", found)  # tables are numbered through the page


@pytest.fixture(scope="module")
def whole(run) -> str:
    return build_report([run], OPTIONS)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyError("grad<b>\nnorm"), "KeyError: &#39;grad&lt;b&gt;\\nnorm&#39;"),
        (SchemaError("too few tokens:\n found 0\x1b[0m"), "too few tokens: found 0⟨1B⟩[0m"),
    ],
)
def test_a_section_that_fails_says_why_in_its_place(run, monkeypatch, key, error, says, whole):
    with monkeypatch.context() as patched:
        break_sections(patched, {key: error})
        page = build_report([run], OPTIONS)
    assert f"This section cannot be made: {says}" in section_of(page, key)
    title = re.search(r"<h2[^>]*>([^<]*)", section_of(whole, key))
    assert title is not None
    assert title[0] in section_of(page, key)  # the same heading as ever
    for other in {*KEYS} - {key, "browser", "provenance"}:
        assert section_of(page, other) == section_of(whole, other)


def test_options_and_whole_failures_are_not_hidden(run, monkeypatch):
    with monkeypatch.context() as patched:
        break_sections(patched, {"map": OptionError("no such cut")})
        with pytest.raises(OptionError, match="no such cut"):
            build_report([run], OPTIONS)
    break_sections(monkeypatch, {key: ValueError(key) for key in KEYS if key != "provenance"})
    with pytest.raises(ValueError, match="overview"):
        build_report([run], OPTIONS)


def test_gradients_of_one_prompt_have_a_size_and_no_direction(tmp_path):
    tables = make_tables(num_prompts=3, rollouts_per_prompt=4, mean_length=8)
    rollouts = tables.rollouts["rollout_id"][:4].to_list()
    alignment = ("grad_dot_loss", "reward_alignment")
    measured = tables.gradients.filter(pl.col("rollout_id").is_in(rollouts)).with_columns(
        pl.lit(None).cast(tables.gradients.schema[name]).alias(name) for name in alignment
    )
    run = write_run(tmp_path / "run", replace(tables, gradients=measured))
    shown = section_of(build_report([run], OPTIONS), "gradients")
    assert "cannot be made" not in shown
    assert "have no known direction: φ takes ∇L from other prompts" in shown
    assert "Rank correlations over" in shown
    assert ">φ/M<" not in shown


def test_gradients_of_two_tokens_have_no_correlations(tmp_path):
    tables = make_tables(num_prompts=2, rollouts_per_prompt=2, mean_length=8)
    keys = tables.gradients.select("rollout_id", "position").unique(maintain_order=True)[:2]
    measured = tables.gradients.join(keys, on=["rollout_id", "position"], how="semi")
    run = write_run(tmp_path / "run", replace(tables, gradients=measured))
    shown = section_of(build_report([run], OPTIONS), "gradients")
    assert "Rank correlations cannot be made" in shown
    assert "carries most of the gradient" in shown
