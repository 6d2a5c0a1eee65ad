"""A run with three measurements of gradients (two scopes, two methods) shows one everywhere:
browser, gradient section, Proposition 2, the oracle's mask, notebooks and `join_gradients`."""

import re
from pathlib import Path

import polars as pl
import pytest
from synthetic import Tables, make_tables, make_three_measurements, write_measurement, write_run

from tip_analysis.analysis.masks import write_masks
from tip_analysis.analysis.measurements import (
    Measurement,
    Preference,
    join_gradients,
    prefer_measurement,
)
from tip_analysis.analysis.run_view import ReportOptions, RunView
from tip_analysis.core.errors import OptionError, SchemaError
from tip_analysis.core.run_folder import open_run
from tip_analysis.report.build import build_report
from tip_analysis.report.notebook import show_rollout
from tip_analysis.report.page import Table
from tip_analysis.report.sections import browser, gradients, selections

SETTINGS = (
    Preference("all", "probe", 32, 0),
    Preference("head", "probe", 32, 0),
    Preference("all", "exact", 0, 0),
)
PLACE = ["rollout_id", "position"]


@pytest.fixture(scope="module")
def tables() -> Tables:
    return make_tables(num_prompts=6, rollouts_per_prompt=2, mean_length=20)


@pytest.fixture(scope="module")
def measured(tables) -> list[pl.DataFrame]:
    return make_three_measurements(tables)


@pytest.fixture
def path(tables, measured, tmp_path) -> Path:
    bare = Tables(
        tables.rollouts, tables.tokens, tables.gradients.clear(), tables.masks, tables.vocabulary
    )
    path = write_run(tmp_path / "run", bare)
    for frame in measured:
        write_measurement(path, frame)
    return path


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch):
    for module in (gradients, selections):
        monkeypatch.setattr(module, "picture", lambda *_, **__: None)


def quickly(**options: object) -> ReportOptions:
    return ReportOptions(num_resamples=20, **options)  # pyright: ignore[reportArgumentType]


def table_of(parts, start: str) -> Table:
    blocks = [block for part in parts for block in part.blocks if isinstance(block, Table)]
    return next(block for block in blocks if block.caption.startswith(start))


@pytest.mark.parametrize("chosen", range(3))
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "as an option"])
def test_every_reader_shows_the_chosen_measurement(path, measured, chosen, recorded) -> None:
    setting, frame = SETTINGS[chosen], measured[chosen]
    run = open_run(path)
    options = quickly() if recorded else quickly(measurement=setting)
    if recorded:
        prefer_measurement(run, setting)
    write_masks(
        run,
        rules=["gradient_oracle"],
        retention_ratios=[0.5],
        measurement=None if recorded else setting,
    )
    view = RunView(path, options)
    tokens = view.tokens.collect()
    phi = frame.select(*PLACE, "grad_dot_loss", "grad_norm_sq")
    truth = tokens.join(phi, on=PLACE, maintain_order="left")
    in_q3 = truth.filter(pl.col("quadrant") == "Q3")

    given = {} if recorded else setting.given
    joined = join_gradients(run.tokens(), run, **given).collect()
    assert joined["grad_dot_loss"].to_list() == truth["grad_dot_loss"].to_list()

    section = gradients.gradients([view])
    row = table_of(section.parts, "Gradients of the reverse KL").rows[2]
    for cell, column in ((row[2], "grad_norm_sq"), (row[3], "grad_dot_loss")):
        expected = in_q3[column].sum() / truth[column].sum()
        assert cell.value == f"{100 * expected:.1f}%".replace("-", "−")

    missed = table_of(selections.selections([view]).parts, "What each selection takes")
    masks = run.masks().collect()
    for cells in missed.rows:
        mask = masks.filter(rule=cells[0], retention_ratio=float(str(cells[1])))
        kept = in_q3.join(mask, on=PLACE, how="semi")["grad_dot_loss"].sum()
        share = 1 - kept / in_q3["grad_dot_loss"].sum()
        assert cells[-1] == f"{100 * share:.1f}%".replace("-", "−").replace("−0.0%", "0.0%")

    oracle = masks.filter(rule="gradient_oracle")
    for (name,), part in oracle.group_by("rollout_id"):
        best = truth.filter(rollout_id=name).sort("grad_dot_loss", descending=True)
        assert set(part["position"]) == set(best.head(part.height)["position"])

    payload = browser.browser([view]).extra["payload"]["runs"][0]
    for rollout in payload["rollouts"]:
        part = truth.filter(rollout_id=rollout["id"]).sort("position")
        expected = [float(f"{value:.4g}") for value in part["grad_dot_loss"]]
        assert rollout["s"]["grad_dot_loss"] == expected

    shown = show_rollout(run, measurement=None if recorded else setting)
    words = Measurement("reverse_kl", *setting.given.values()).setting_words()
    assert words in shown.heading()
    first = truth.filter(rollout_id=shown.rollout_id).sort("position").row(0, named=True)
    alignment = re.search(r"alignment φ (\S+)", "\n".join(shown.tokens[0].details))
    assert alignment is not None
    assert float(alignment[1].replace("−", "-")) == pytest.approx(first["grad_dot_loss"], rel=6e-3)

    page_words = str(section) + str(selections.selections([view])) + str(browser.browser([view]))
    assert page_words.count(words) >= 5
    assert f"reverse_kl over {words}" not in page_words, "the others are listed, not the shown one"


def test_without_a_preference_every_reader_refuses(path) -> None:
    view = RunView(path, quickly())
    for read in (
        lambda: join_gradients(view.tokens, view.run),
        lambda: gradients.gradients([view]),
        lambda: selections.selections([view]),
        lambda: browser.browser([view]),
        lambda: show_rollout(path),
        lambda: write_masks(view.run, rules=["gradient_oracle"], retention_ratios=[0.5]),
        lambda: build_report([path]),
    ):
        with pytest.raises(OptionError, match="3 measurements of gradients fit"):
            read()
    with pytest.raises(SchemaError, match="param_scope=lora"):
        build_report([path], quickly(measurement=Preference(param_scope="lora")))


def test_another_loss_that_is_not_settled_is_named_and_left_out(path, measured) -> None:
    prefer_measurement(open_run(path), SETTINGS[0])
    for seed in (1, 2):
        other = measured[0].with_columns(
            loss=pl.lit("jsd", measured[0].schema["loss"]), seed=pl.lit(seed, pl.Int64)
        )
        write_measurement(path, other)
    view = RunView(path, quickly())
    assert view.losses == ["reverse_kl"]
    shown = str(gradients.gradients([view]))
    assert "2 measurements of gradients fit" in shown
    assert "loss=jsd param_scope=all method=probe num_probes=32 seed=2" in shown


def test_a_mask_of_another_measurement_is_told_apart(path) -> None:
    prefer_measurement(open_run(path), SETTINGS[0])
    write_masks(open_run(path), rules=["gradient_oracle"], retention_ratios=[0.5])
    same, other = (
        str(selections.selections([RunView(path, quickly(measurement=setting))]))
        for setting in SETTINGS[:2]
    )
    assert "gradient_oracle selected by φ of the reverse KL (all parameters" in same
    assert "another measurement’s" not in same
    assert "another measurement’s" in other
