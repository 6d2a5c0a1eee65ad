"""The page in a real browser: nothing runs that a run put there, nothing is fetched, keys walk the
token browser.

Needs Chromium and its driver (Debian: chromium, chromium-driver); the accessibility check also
needs npm, to bring axe-core into a temporary folder.
"""

import base64
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from browser_window import INSTALLED, Window, open_window
from synthetic import (
    HOSTILE_TOKENS,
    Tables,
    make_ablations,
    make_dynamics,
    make_hostile_tables,
    make_large_tokens,
    make_tables,
    write_ablations,
    write_dynamics,
    write_run,
)

from tip_analysis.core.text import visible
from tip_analysis.report.build import ReportOptions, write_report

if not INSTALLED:
    pytest.skip("Chromium or its driver is not installed", allow_module_level=True)

pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def window(tmp_path_factory) -> Iterator[Window]:
    with open_window(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture(scope="module")
def tables() -> Tables:
    return make_tables()


@pytest.fixture(scope="module")
def page(tables, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return write_report([write_run(folder / "small", tables)], folder / "small.html")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    return write_report(
        [write_run(folder / "<svg onload=window.hacked=9>", make_hostile_tables())],
        folder / "hostile.html",
    )


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_is_quiet_and_fits(window, page, width, dark):
    window.open(page, width=width, dark=dark)
    assert window.run("return document.documentElement.scrollWidth") <= width
    assert window.overflowing() == []
    assert window.errors() == []
    assert window.requests() == []
    ground = window.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == dark


def test_hostile_tokens_are_shown_and_never_run(window, hostile):
    window.open(hostile, width=390)
    steps = window.run("return document.getElementById('b-rollout').options.length")
    texts = set()
    for _ in range(steps):
        texts |= set(
            window.run(
                "return [...document.querySelectorAll('#b-tokens .tok')].map((e) => e.textContent)"
            )
        )
        window.run("document.getElementById('b-next').click()")
    assert {visible(text) for text in HOSTILE_TOKENS} <= texts
    assert window.run("return window.hacked") is None
    assert (
        window.run(
            "return document.querySelectorAll('main script, #b-tokens *:not(span), img,"
            " iframe').length"
        )
        == 2
    )
    assert window.errors() == []
    assert window.requests() == []
    assert window.overflowing() == []


def test_keys_walk_the_tokens(window, page, tables):
    from selenium.webdriver.common.keys import Keys

    window.open(page)
    window.run("document.querySelector('#b-tokens [tabindex=\"0\"]').focus()")
    rollout = window.run(
        "return"
        " JSON.parse(document.getElementById('browser-data').textContent).runs[0].rollouts[0].id"
    )
    rows = tables.tokens.filter(pl.col("rollout_id") == rollout).sort("position")
    window.press(Keys.HOME)
    assert window.selected()[0] == 0
    window.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    place, panel = window.selected()
    assert place == 2
    row = rows.row(2, named=True)
    assert f"position 2 · id {row['token_id']}" in panel
    assert f"{100 * row['student_top1_prob']:.1f}%" in panel
    assert f"{100 * row['teacher_top1_prob']:.1f}%" in panel
    window.press(Keys.END)
    assert window.selected()[0] == rows.height - 1
    assert window.run("return document.activeElement.dataset.place") == str(rows.height - 1)
    window.press("n")
    assert window.run(
        "return document.querySelector('#b-tokens [aria-selected=true]').classList.contains('q3')"
    )
    window.press("]")
    assert window.run("return document.getElementById('b-rollout').selectedIndex") > 0


def test_a_tab_reaches_the_tokens_and_leaves_them(window, page):
    from selenium.webdriver.common.keys import Keys

    window.open(page)
    window.run(
        "document.getElementById('b-prompt').closest('details').querySelector('summary').focus()"
    )
    window.press(Keys.TAB)
    assert window.run("return document.activeElement.getAttribute('role')") == "option"
    window.press(Keys.TAB)
    assert window.run("return document.activeElement.closest('#b-tokens')") is None


def test_a_link_opens_its_token(window, page, tables):
    row = tables.tokens.row(500, named=True)
    rollout = row["rollout_id"].replace("/", "%2F")
    window.open(page, fragment=f"#token=0/{rollout}/{row['position']}")
    place, panel = window.selected()
    assert place == row["position"]
    assert f"position {row['position']} · id {row['token_id']}" in panel
    assert (
        window.run("return document.querySelector('#b-detail a').getAttribute('href')")
        == f"#token=0/{rollout}/{place}"
    )
    for fragment in ("#token=0/%E0%A4%A/1", "#token=9/x/1", "#token=0/nowhere/1"):
        window.open(page, fragment=fragment)
        assert window.errors() == []


def test_filters_and_colours(window, page, tables):
    window.open(page)
    window.run("document.querySelector('#token-browser .chip.Q4').click()")
    assert window.run("return document.querySelectorAll('#b-tokens .q4:not(.dim)').length") == 0
    assert window.run("return document.querySelectorAll('#b-tokens .q4.dim').length") > 0
    correct = tables.rollouts.filter(pl.col("reward") == 1.0).height
    window.run(
        "const s = document.getElementById('b-reward'); s.value = '1'; s.dispatchEvent(new"
        " Event('change'))"
    )
    assert window.run("return document.getElementById('b-rollout').options.length") == correct
    window.run(
        "const s = document.getElementById('b-reward'); s.value = 'all'; s.dispatchEvent(new"
        " Event('change'))"
    )
    window.run(
        "const s = document.getElementById('b-search'); s.value = ' CARRY we'; s.dispatchEvent(new"
        " Event('input'))"
    )
    texts = tables.rollouts.filter(
        pl.col("response_text").str.to_lowercase().str.contains(" carry we", literal=True)
    )
    assert window.run("return document.getElementById('b-rollout').options.length") == max(
        1, texts.height
    )
    window.run(
        "const s = document.getElementById('b-search'); s.value = 'no such text';"
        " s.dispatchEvent(new Event('input'))"
    )
    assert "No rollout fits" in window.run("return document.getElementById('b-detail').textContent")
    window.run(
        "const s = document.getElementById('b-search'); s.value = ''; s.dispatchEvent(new"
        " Event('input'))"
    )
    window.run(
        "const s = document.getElementById('b-color'); s.value = 'reverse_kl'; s.dispatchEvent(new"
        " Event('change'))"
    )
    assert "nats" in window.run("return document.getElementById('b-legend').textContent")
    assert window.errors() == []


def test_theme_button_overrides_the_system(window, page):
    window.open(page, dark=False)
    window.run("document.getElementById('theme').click(); document.getElementById('theme').click()")
    assert window.run("return document.documentElement.dataset.theme") == "dark"
    assert window.run("return getComputedStyle(document.documentElement).colorScheme") == "dark"
    window.run("document.getElementById('theme').click()")
    assert window.run("return document.documentElement.dataset.theme ?? null") is None


def test_several_runs_in_one_browser(window, tables, tmp_path):
    other = write_run(tmp_path / "other", make_tables(num_prompts=2, seed=4))
    path = write_report(
        [write_run(tmp_path / "first", tables), other],
        tmp_path / "both.html",
        ReportOptions(browser_tokens=2000),
    )
    window.open(path)
    window.run(
        "const s = document.getElementById('b-run'); s.value = '1'; s.dispatchEvent(new"
        " Event('change'))"
    )
    assert window.run(
        "return document.getElementById('b-rollout').options[0].textContent"
    ).startswith("p00")
    assert window.errors() == []


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed: axe-core cannot be brought")
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "pack", "axe-core", "--silent"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    archives = list(folder.glob("axe-core-*.tgz"))
    if done.returncode or not archives:
        pytest.skip(f"npm cannot bring axe-core: {done.stderr.strip()[:200]}")
    with tarfile.open(archives[0]) as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


@pytest.fixture(scope="module")
def whole(tables, tmp_path_factory) -> Path:
    """A page with every section filled."""
    folder = tmp_path_factory.mktemp("whole")
    run, arms = write_run(folder / "whole", tables), make_ablations()
    write_ablations(run, arms)
    write_dynamics(run, make_dynamics(arms))
    return write_report([run], folder / "whole.html")


def test_the_page_is_short_with_its_folds_closed(window, whole):
    window.open(whole, width=1280)
    assert window.run("return document.documentElement.scrollHeight") <= 14_000


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_prints_on_few_sheets(window, whole, dark):
    window.open(whole, dark=dark)
    options = {"printBackground": True, "preferCSSPageSize": True}
    printed = window.driver.execute_cdp_cmd("Page.printToPDF", options)["data"]
    assert len(re.findall(rb"/Type\s*/Page[^s]", base64.b64decode(printed))) <= 12


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_no_serious_accessibility_violation(window, whole, axe, scheme, width):
    window.open(whole, dark=scheme == "dark", width=width)
    if scheme == "print":
        window.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    window.run(axe)
    found = window.driver.execute_async_script("axe.run().then(arguments[0])")
    serious = [
        (item["id"], item["help"], [node["target"] for node in item["nodes"]][:4])
        for item in found["violations"]
        if item["impact"] in ("serious", "critical")
    ]
    window.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert serious == []


@pytest.mark.slow
def test_a_million_tokens_open_at_once(window, tmp_path):
    path = write_report(
        [write_run(tmp_path / "large", make_large_tokens(1_000_000))], tmp_path / "large.html"
    )
    assert path.stat().st_size < 6_000_000
    window.open(path)
    timing = window.run(
        "const t = performance.getEntriesByType('navigation')[0]; return t.domComplete"
    )
    assert timing < 2000
    assert window.errors() == []
