"""What a reader does with the page, in a real browser with pointer and keys: five tasks, each under
20 seconds, and every number held to a plain count of the run's tables."""

import csv
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from browser_window import INSTALLED, Window, open_window
from synthetic import Tables, make_hostile_tables, make_large_tokens, make_tables, write_run

from tip_analysis.analysis.taxonomy import Taxonomy
from tip_analysis.report.build import ReportOptions, write_report

if not INSTALLED:
    pytest.skip("Chromium or its driver is not installed", allow_module_level=True)

pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

TASK_SECONDS = 20
CUTS = {"entropy_cut": "0.3", "divergence_cut": "0.5"}


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def window(tmp_path_factory, downloads) -> Iterator[Window]:
    with open_window(tmp_path_factory.mktemp("profile"), downloads) as window:
        yield window


@pytest.fixture(scope="module")
def tables() -> Tables:
    return make_tables()


@pytest.fixture(scope="module")
def page(tables, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    run = write_run(folder / "small", tables)
    return write_report([run], folder / "small.html", ReportOptions(Taxonomy(**CUTS)))


@pytest.fixture
def task(window) -> Iterator[None]:
    """A reader's task: done in time, without a message on the console or a request."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < TASK_SECONDS
    assert window.errors() == []
    assert window.requests() == []


def _quadrants(tokens: pl.DataFrame, entropy_cut: float, divergence_cut: float) -> np.ndarray:
    """By the definition: strictly above is high."""
    h, d = (tokens[name].cast(pl.Float64).to_numpy() for name in ("student_entropy", "reverse_kl"))
    high = d > divergence_cut
    return np.where(h > entropy_cut, np.where(high, "Q1", "Q2"), np.where(high, "Q3", "Q4"))


def _q3_score(tokens: pl.DataFrame) -> np.ndarray:
    """forward KL × (1 − ĥ), ĥ clipped at its 0.98 quantile and scaled to [0, 1]."""
    h = tokens["student_entropy_norm"].cast(pl.Float64).to_numpy()
    clipped = np.minimum(h, np.quantile(h, 0.98))
    unit = (clipped - h.min()) / (clipped.max() - h.min())
    return tokens["forward_kl"].cast(pl.Float64).to_numpy() * (1 - unit)


def test_find_the_strongest_confident_and_wrong_number(window, page, tables, task):
    window.open(page)
    window.choose("#x-kind", "number")
    first = window.rows()[0]
    tokens = tables.tokens.with_columns(
        quadrant=pl.Series(_quadrants(tables.tokens, 0.3, 0.5)),
        score=pl.Series(_q3_score(tables.tokens)),
    )
    numbers = tokens.filter(quadrant="Q3").filter(pl.col("token").str.contains(r"^ ?[0-9]+$"))
    best = numbers.sort("score", descending=True).row(0, named=True)
    assert (
        window.run("return document.querySelector('#x-table tbody mark').textContent")
        == (best["token"])
    )
    assert first[2] == "Q3"
    window.click("#x-table tbody a")
    window.wait("return location.hash.includes('token=')")
    place, panel = window.selected()
    assert place == best["position"]
    assert f"position {best['position']} · id {best['token_id']}" in panel


def test_move_the_entropy_cut_and_read_the_share_of_q3(window, page, tables, task):
    window.open(page)
    window.write("#x-entropy-nats", "0.5")
    shares = {
        name: (_quadrants(tables.tokens, 0.5, 0.5) == name).mean() for name in ("Q1", "Q2", "Q3")
    }
    assert window.text("x-share-3") == f"{100 * shares['Q3']:.1f}%"
    assert window.text("x-share-1") == f"{100 * shares['Q1']:.1f}%"
    assert window.text("x-exact") == "Exact, over all tokens."
    assert "entropy=0.5" in window.run("return location.hash")
    number = (_quadrants(tables.tokens, 0.5, 0.5) == "Q3").sum()
    assert window.text("x-status").startswith(f"{number:,} token")


def test_list_all_q3_tokens_of_rewarded_rollouts(window, page, tables, task):
    window.open(page)
    window.choose("#x-reward", "rewarded (> ½)")
    rewarded = tables.rollouts.filter(pl.col("reward") > 0.5)["rollout_id"].to_list()
    inside = (_quadrants(tables.tokens, 0.3, 0.5) == "Q3") & tables.tokens["rollout_id"].is_in(
        rewarded
    ).to_numpy()
    assert window.text("x-status") == f"{inside.sum():,} tokens fit."
    while window.run("return !document.getElementById('x-more').hidden"):
        window.click("#x-more")
    rows = window.rows()
    assert len(rows) == inside.sum()
    assert {row[5] for row in rows} == {"1"}


def test_send_somebody_a_link_to_one_token(window, page, tables, task):
    window.open(page)
    window.click("#explorer .chip.Q1")
    window.write("#x-search", "7")
    link = window.run("return document.querySelector('#x-table tbody a').href")
    window.click("#x-link")
    view = window.run("return document.getElementById('x-address').value")
    assert "text=7" in view
    window.open(page, fragment=link[link.index("#") :])
    place, panel = window.selected()
    run, rollout, position = link.split("token=")[1].split("/")
    assert (run, place) == ("0", int(position))
    token = tables.tokens.filter(
        rollout_id=rollout.replace("%2F", "/"), position=int(position)
    ).row(0, named=True)
    assert f"id {token['token_id']}" in panel
    window.open(page, fragment=view[view.index("#") :])
    assert window.run("return document.getElementById('x-search').value") == "7"
    marks = window.run(
        "return [...document.querySelectorAll('#x-table tbody mark')].map((e) => e.textContent)"
    )
    assert marks
    assert all("7" in text for text in marks)


def test_sliders_answer_to_keys_and_stop_at_exact_shares(window, page, tables):
    from selenium.webdriver.common.keys import Keys

    window.open(page)
    window.run("document.getElementById('x-divergence').focus()")
    window.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    cut = float(window.run("return document.getElementById('x-divergence-nats').value"))
    assert cut > 0.5
    share = (_quadrants(tables.tokens, 0.3, cut) == "Q3").mean()
    assert window.text("x-share-3") == f"{100 * share:.1f}%"
    words = window.run(
        "return document.getElementById('x-divergence').getAttribute('aria-valuetext')"
    )
    assert words.endswith(" nats")
    window.click("#x-reset")
    assert window.text("x-exact") == "At the report’s own cuts."
    assert window.errors() == []


def test_a_region_of_the_map_lists_its_tokens(window, page, tables):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    window.open(page)
    canvas = window.driver.find_element("css selector", "#x-canvas")
    window.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", canvas)
    moves = ActionChains(window.driver).move_to_element_with_offset(canvas, -80, -100)
    moves.click_and_hold().move_by_offset(60, 60).release().perform()
    box = window.run("return new URLSearchParams(location.hash.slice(1)).get('box')")
    left, right, low, high = (float(value.replace("Infinity", "inf")) for value in box.split(","))
    h, d = (
        tables.tokens[name].cast(pl.Float64).to_numpy()
        for name in ("student_entropy", "reverse_kl")
    )
    inside = ((h > left) | (left == 0)) & (h <= right) & ((d > low) | (low == 0)) & (d <= high)
    assert f"{inside.sum():,} tokens of the run" in window.text("x-region")
    assert window.text("x-status").startswith(f"{inside.sum():,} token")
    window.click("#x-clear")
    assert window.text("x-region") == ""
    window.run("document.getElementById('x-map').focus()")
    window.press(Keys.ARROW_RIGHT)
    assert "entropy" in window.text("x-hint")
    from_keys = ActionChains(window.driver).key_down(Keys.SHIFT)
    from_keys.send_keys(Keys.ARROW_LEFT, Keys.ARROW_UP).key_up(Keys.SHIFT).perform()
    window.press(Keys.ENTER)
    assert "Region: entropy" in window.text("x-region")
    window.press(Keys.ESCAPE)
    assert window.text("x-region") == ""
    assert window.errors() == []


def test_the_file_of_values_holds_every_token_that_fits(window, page, tables, downloads):
    window.open(page)
    window.click("#x-csv")
    path = downloads / "tokens.csv"
    until = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    rows = list(csv.DictReader(path.read_text("utf-8").splitlines()))
    in_q3 = tables.tokens.filter(pl.Series(_quadrants(tables.tokens, 0.3, 0.5) == "Q3"))
    assert len(rows) == in_q3.height
    wanted = {(row["rollout_id"], row["position"]): row for row in in_q3.iter_rows(named=True)}
    for row in rows:
        token = wanted[json.loads(row["rollout_id"]), int(row["position"])]
        assert json.loads(row["token"]) == token["token"].replace("\n", "↵")
        assert np.float32(row["forward_kl"]) == np.float32(token["forward_kl"])
        assert row["planted_label"] == token["planted_label"]


def test_filters_by_rule_and_label_equal_a_plain_count(window, page, tables):
    window.open(page)
    for chip in ("Q1", "Q2", "Q4"):
        window.click(f"#explorer .chip.{chip}")
    rule = tables.masks["rule"][0]
    ratio = tables.masks.filter(rule=rule)["retention_ratio"].max()
    window.choose("#x-rule", f"{rule} at ρ = {ratio:g}")
    kept = tables.masks.filter(rule=rule).select("rollout_id", "position").unique()
    assert window.text("x-status") == f"{kept.height:,} tokens fit."
    window.choose("#x-planted_label", "planted error")
    both = kept.join(
        tables.tokens.filter(planted_label="planted_error"), on=["rollout_id", "position"]
    )
    assert window.text("x-status").split()[0] == f"{both.height:,}"
    window.click("#x-table [data-column=reverse_kl]")
    values = [float(row[8]) for row in window.rows()]
    assert values == sorted(values, reverse=True)


def test_search_jumps_to_hits(window, page, tables):
    from selenium.webdriver.common.keys import Keys

    window.open(page)
    window.press("/")
    assert window.run("return document.activeElement.id") == "b-search"
    window.press(*"carry")
    counted = re.fullmatch(r"(\d+) hits?", window.text("b-hits"))
    assert counted is not None
    assert int(counted[1]) >= tables.tokens.filter(token=" carry").height
    seen = set()
    for _ in range(3):
        window.press(Keys.ENTER)
        place, panel = window.selected()
        assert panel.startswith("␣carry")
        seen.add((window.run("return document.getElementById('b-rollout').value"), place))
    assert len(seen) == 3
    assert re.fullmatch(r"hit \d+ of \d+", window.text("b-hits"))
    window.press(Keys.ESCAPE)
    assert window.text("b-hits") == ""


def test_a_question_mark_lists_the_keys(window, page):
    from selenium.webdriver.common.keys import Keys

    window.open(page)
    window.press("?")
    assert window.run("return document.getElementById('keys').open")
    window.press(Keys.ESCAPE)
    assert not window.run("return document.getElementById('keys').open")


def test_headers_open_the_glossary(window, page):
    window.open(page)
    assert window.run("return document.querySelectorAll('a.word').length") > 10
    dead = window.run(
        "return [...document.querySelectorAll('a.word')].filter((a) =>"
        " !document.querySelector(a.getAttribute('href'))).length"
    )
    assert dead == 0
    window.run("document.querySelector('a.word').click()")
    window.wait("return document.querySelector('#glossary details').open")


@pytest.mark.parametrize(
    "fragment",
    [
        "#entropy=nonsense&divergence=0.5",
        "#entropy=1e999&divergence=-1",
        "#run=7&kind=%E0%A4%A",
        "#rule=no%20such:0.5&sort=-nothing&box=1,2,3",
        "#token=0/x&quadrant=Q9&reward=maybe",
    ],
)
def test_a_broken_address_opens_the_page_as_it_is(window, page, fragment):
    window.open(page, fragment=fragment)
    assert window.rows()
    assert window.errors() == []


def test_hostile_texts_stay_texts(window, tmp_path):
    run = write_run(tmp_path / "hostile", make_hostile_tables())
    path = write_report([run], tmp_path / "hostile.html")
    window.open(path, fragment="#quadrant=Q1,Q2,Q3,Q4&kind=%3Cscript%3E&text=%3Cscript%3E")
    assert len(window.rows()) > 0
    window.open(path, fragment="#quadrant=Q1,Q2,Q3,Q4")
    for _ in range(4):
        window.run("document.getElementById('x-more').click()")
    inert = "return document.querySelectorAll('#explorer script, #explorer img, #x-table b').length"
    assert window.run(inert) == 0
    assert window.run("return window.hacked") is None
    assert window.errors() == []
    assert window.requests() == []


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, pl.DataFrame]:
    """A run of more tokens than a page carries."""
    folder = tmp_path_factory.mktemp("large")
    tables = make_large_tokens(200_000)
    run = write_run(folder / "large", tables)
    options = ReportOptions(Taxonomy(**CUTS), num_resamples=20)
    return write_report([run], folder / "large.html", options), tables.tokens


def test_shares_of_a_large_run_are_exact_where_sliders_stop(window, large):
    path, tokens = large
    window.open(path)
    assert " of 200," in window.text("x-carried") or "tokens are in this page" in window.text(
        "x-carried"
    )
    for cut in ("0.5", "1.2", "0.05"):
        window.write("#x-entropy-nats", cut)
        share = (_quadrants(tokens, float(cut), 0.5) == "Q3").mean()
        assert window.text("x-share-3") == f"{100 * share:.1f}%"
        assert window.text("x-exact") == "Exact, over all tokens."
    window.write("#x-entropy-nats", "0.5123")
    shown = float(window.text("x-share-3").strip("≈ %")) / 100
    off = float(re.search(r"at most ([\d.]+) points", window.text("x-exact"))[1]) / 100
    true = (_quadrants(tokens, 0.5123, 0.5) == "Q3").mean()
    assert abs(shown - true) <= off + 0.0006


def test_the_strongest_tokens_of_a_large_run_are_in_the_page(window, large):
    path, tokens = large
    window.open(path)
    window.choose("#x-kind", "number")
    scored = tokens.with_columns(
        quadrant=pl.Series(_quadrants(tokens, 0.3, 0.5)), score=pl.Series(_q3_score(tokens))
    )
    best = scored.filter(quadrant="Q3").filter(pl.col("token").str.contains(r"^ ?[0-9]+$"))
    top = best.sort("score", descending=True)["score"][0]
    shown = float(window.rows()[0][6])
    assert shown == pytest.approx(top, rel=6e-3)


def test_live_cuts_answer_at_once(window, large):
    """Table, map and shares after a step of a slider; the best of many, since others use the
    machine too."""
    path, _ = large
    window.open(path)
    times = window.run("""
        const slider = document.getElementById("x-entropy"), times = [];
        for (let step = 0; step < 20; step += 1) {
          slider.value = Number(slider.max) - 60 - step;
          const start = performance.now();
          slider.dispatchEvent(new Event("input"));
          document.body.offsetHeight;
          times.push(performance.now() - start);
        }
        return times;
        """)
    assert min(times) < 50


@pytest.fixture(scope="module")
def two_teachers(tables, tmp_path_factory) -> tuple[Path, pl.DataFrame, pl.DataFrame]:
    """The same rollouts under two teachers: the second agrees with the student more often."""
    folder = tmp_path_factory.mktemp("teachers")
    lower = pl.when(pl.int_range(pl.len()) % 3 == 0).then(0.01).otherwise(pl.col("reverse_kl"))
    other = tables.tokens.with_columns(reverse_kl=lower.cast(pl.Float32))
    second = Tables(
        tables.rollouts, other, tables.gradients.head(0), tables.masks.head(0), tables.vocabulary
    )
    runs = [
        write_run(folder / "first", tables),
        write_run(folder / "second", second, config={"teacher": "other-teacher"}),
    ]
    path = write_report(runs, folder / "both.html", ReportOptions(Taxonomy(**CUTS)))
    return path, tables.tokens, other


def test_compare_two_teachers_on_one_rollout(window, two_teachers, task):
    path, ours, theirs = two_teachers
    window.open(path)
    window.click(".flow-cell[data-from='3'][data-to='4']")
    before, after = (_quadrants(tokens, 0.3, 0.5) for tokens in (ours, theirs))
    moved = (before == "Q3") & (after == "Q4")
    cell = window.run(
        "return document.querySelector('.flow-cell[aria-pressed=true] span').textContent"
    )
    assert cell == f"{moved.sum():,}"
    rows = window.rows(".moves-table tbody tr")
    assert rows
    change = (ours["reverse_kl"] - theirs["reverse_kl"]).abs().to_numpy()
    best = ours.filter(pl.Series(moved & (change == change[moved].max()))).row(0, named=True)
    link = window.run("return document.querySelector('.moves-table tbody a').getAttribute('href')")
    assert link == f"#token=0/{best['rollout_id'].replace('/', '%2F')}/{best['position']}"
    window.click(".moves-table tbody a")
    window.wait("return location.hash.includes('token=')")
    place, panel = window.selected()
    assert place == best["position"]
    window.choose("#b-run", "second")
    assert f"{best['rollout_id']}" in window.run(
        "const s = document.getElementById('b-rollout'); return s.selectedOptions[0].textContent"
    )
    assert window.selected()[0] == best["position"]
    assert panel != window.selected()[1]


def test_runs_with_other_tokens_are_not_aligned(tables, tmp_path):
    other = make_tables(seed=9)
    runs = [write_run(tmp_path / "a", tables), write_run(tmp_path / "b", other)]
    options = ReportOptions(Taxonomy(**CUTS), num_resamples=20)
    page = write_report(runs, tmp_path / "both.html", options).read_text("utf-8")
    assert "are not compared token by token: expected the same token at each place" in page
