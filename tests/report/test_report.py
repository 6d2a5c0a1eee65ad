"""The report page: every number shown equals an independent count, and nothing from a run can
become markup."""

import dataclasses
import html
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from synthetic import (
    ARM_ACCURACIES,
    HOSTILE_TOKENS,
    Tables,
    make_ablations,
    make_hostile_tables,
    make_tables,
    write_ablations,
    write_run,
)

from tip_analysis.analysis import densities
from tip_analysis.analysis.run_view import RunView
from tip_analysis.analysis.taxonomy import Taxonomy, resolve_cuts
from tip_analysis.core.contract_checks import validate
from tip_analysis.core.errors import OptionError, RunError
from tip_analysis.core.schema import RolloutTable, TokenTable
from tip_analysis.core.text import visible
from tip_analysis.core.words import number
from tip_analysis.report import paper
from tip_analysis.report.build import ReportOptions, build_report, write_report
from tip_analysis.report.page import json_block
from tip_analysis.report.sections import gradients, groups, overview, selections, taxonomy


class _Page(HTMLParser):
    """Tables by caption, text by element id, tags, and the embedded data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.data: dict | None = None
        self._caption: str | None = None
        self._caption_id: str | None = None
        self._captions: dict[str, str] = {}
        self._stack: list[str] = []
        self._script: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._stack.append(tag)
        if tag == "script":
            self._script = dict(attrs).get("id", "code")
        if dict(attrs).get("class") == "caption":
            self._caption_id = dict(attrs)["id"]
        if tag == "table" and "aria-labelledby" in dict(attrs):
            self._caption = self._captions[dict(attrs)["aria-labelledby"]]
            self.tables[self._caption] = []
        if tag == "tr" and self._caption is not None:
            self.tables[self._caption].append([])
        if tag in ("td", "th") and self._caption is not None:
            self.tables[self._caption][-1].append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self._caption = None
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script == "browser-data":
            self.data = json.loads(data)
        elif self._script is None and self._stack[-1:] != ["style"]:
            self.texts.append(data)
        if self._stack and self._stack[-1] == "p" and self._caption_id:
            self._captions[self._caption_id] = data
            self._caption_id = None
        if self._caption is None:
            return
        if self.tables.get(self._caption) and self.tables[self._caption][-1]:
            self.tables[self._caption][-1][-1] += data.strip()

    def table(self, caption: str) -> list[list[str]]:
        return next(rows for name, rows in self.tables.items() if name.startswith(caption))


@pytest.fixture(scope="module")
def tables() -> Tables:
    return make_tables()


@pytest.fixture(scope="module")
def run(tables, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "small", tables)


@pytest.fixture(scope="module")
def page(run) -> _Page:
    return _Page(build_report([run]))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> str:
    return build_report(
        [
            write_run(
                tmp_path_factory.mktemp("runs") / "<img src=x onerror=alert(1)>",
                make_hostile_tables(),
            )
        ]
    )


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch):
    """Pages that a single test makes leave out the pictures; those of the module's fixtures have
    them."""
    monkeypatch.setattr("tip_analysis.report.page.inline_svg", lambda *_arguments, **_options: "")


def _options(**options) -> ReportOptions:
    names = {field.name for field in dataclasses.fields(Taxonomy)} & options.keys()
    taxonomy = Taxonomy(**{name: options.pop(name) for name in names})
    return ReportOptions(taxonomy, **{"num_resamples": 20, **options})


def _plain_quadrants(tokens: pl.DataFrame) -> np.ndarray:
    """Quadrants by the definition: strictly above the median entropy, strictly above the mean
    reverse KL."""
    h = tokens["student_entropy"].to_numpy().astype(float)
    d = tokens["reverse_kl"].to_numpy().astype(float)
    high_h, high_d = h > np.median(h), d > d.mean()
    return np.where(high_h, np.where(high_d, "Q1", "Q2"), np.where(high_d, "Q3", "Q4"))


def test_shares_in_the_page_equal_a_plain_count(page, tables):
    names = _plain_quadrants(tables.tokens)
    rows = page.table("Tokens of each quadrant")[1:]
    assert [row[0] for row in rows] == ["Q1", "Q2", "Q3", "Q4"]
    for row in rows:
        inside = names == row[0]
        assert row[2] == f"{inside.sum():,}"
        assert row[3] == str(tables.tokens.filter(pl.Series(inside))["rollout_id"].n_unique())
        assert row[4] == str(tables.tokens.filter(pl.Series(inside))["prompt_id"].n_unique())
        assert row[5] == f"{100 * inside.mean():.1f}%"


def test_paper_ranges_are_marked_as_the_papers(page):
    assert [row[7] for row in page.table("Tokens of each quadrant")[1:]] == [
        "40–52% (Q1+Q2)the paper",
        "40–52% (Q1+Q2)the paper",
        "3–15%the paper",
        "40–47%the paper",
    ]


def test_planted_errors_are_measured_as_a_plain_loop_does(page, tables):
    names = _plain_quadrants(tables.tokens)
    planted = tables.tokens["planted_label"].cast(pl.String).to_numpy() == "planted_error"
    confident = planted & (tables.tokens["student_top1_prob"].to_numpy() >= 0.9)
    h = tables.tokens["student_entropy_norm"].to_numpy().astype(float)
    clipped = np.minimum(h, np.quantile(h, 0.98))
    score = tables.tokens["forward_kl"].to_numpy() * (
        1 - (clipped - h.min()) / (clipped.max() - h.min())
    )
    wins = (score[planted][:, None] > score[~planted]).mean() + 0.5 * (
        score[planted][:, None] == score[~planted]
    ).mean()
    rows = {row[0]: row[1] for row in page.table("The arithmetic pair")[1:]}
    assert rows["recall"] == f"{100 * (names[confident] == 'Q3').mean():.1f}%"
    assert rows["precision"] == f"{100 * planted[names == 'Q3'].mean():.1f}%"
    assert float(rows["AUC"]) == pytest.approx(wins, abs=6e-4)


def test_density_holds_every_finite_token_in_its_own_quadrant(tables, run):
    view = RunView(run, _options())
    cells = densities.density(view.tokens, view.cuts)
    assert cells["num_tokens"].sum() == tables.tokens.height
    counted = dict(cells.group_by("quadrant").agg(pl.col("num_tokens").sum()).iter_rows())
    names = _plain_quadrants(tables.tokens)
    assert counted == {name: (names == name).sum() for name in counted}


def test_strongest_q3_tokens_are_those_of_a_plain_sort(page, tables, run):
    names = _plain_quadrants(tables.tokens)
    view = RunView(run, _options(num_strong=3))
    found = densities.strongest_tokens(view.tokens, "Q3", 3)
    plain = tables.tokens.with_columns(pl.Series("name", names)).filter(pl.col("name") == "Q3")
    h = tables.tokens["student_entropy_norm"].cast(pl.Float64)
    low, high = h.min(), np.quantile(h.to_numpy(), 0.98)
    score = pl.col("forward_kl") * (
        1 - (pl.col("student_entropy_norm").clip(None, high) - low) / (high - low)
    )
    best = (
        plain.with_columns(score.alias("s"))
        .sort("s", descending=True)
        .unique("prompt_id", maintain_order=True)
        .head(3)
    )
    assert (
        found.select("rollout_id", "position").rows()
        == best.select("rollout_id", "position").rows()
    )
    assert found["q3_score"].to_numpy() == pytest.approx(best["s"].to_numpy(), rel=1e-5)
    around = densities.text_around(view.raw, found)
    rollout, position = found.row(0)[0], found["position"][0]
    texts = tables.tokens.filter(pl.col("rollout_id") == rollout)["token"].to_list()
    before, after = around[rollout, position]
    assert before == "".join(texts[max(0, position - 24) : position])
    assert after == "".join(texts[position + 1 : position + 25])


def test_both_models_top_tokens_have_their_text_and_percent(page, tables, run):
    view = RunView(run, _options())
    row = densities.strongest_tokens(view.tokens, "Q3", 1).row(0, named=True)
    shown = "".join(page.texts)
    for model in ("student", "teacher"):
        text = visible(tables.vocabulary[row[f"{model}_topk_ids"][0]]).replace(" ", "␣")
        assert text in shown
        assert f"{100 * math.exp(row[f'{model}_topk_logprobs'][0]):.1f}%" in shown


def test_worked_examples_are_shown_as_the_papers(page):
    shown = "".join(page.texts)
    assert "The paper’s worked examples" in shown
    for example in paper.WORKED_EXAMPLES:
        assert f"{example.forward_kl:.2f}" in shown
        for text, share in (*example.student_top, *example.teacher_top):
            assert text in shown
            assert f"{share:.1f}%" in shown


def test_browser_data_equals_the_token_table(page, tables):
    run = page.data["runs"][0]
    for rollout in run["rollouts"]:
        rows = tables.tokens.filter(pl.col("rollout_id") == rollout["id"]).sort("position")
        assert rollout["p"] == rows["position"].to_list()
        assert [run["texts"][index][1] for index in rollout["t"]] == rows["token_id"].to_list()
        assert rollout["s"]["student_entropy"] == pytest.approx(
            rows["student_entropy"].to_list(), rel=1e-3
        )
        assert rollout["s"]["reverse_kl"] == pytest.approx(rows["reverse_kl"].to_list(), rel=1e-3)
        assert [[run["texts"][i][1] for i in top] for top in rollout["a"]] == rows[
            "student_topk_ids"
        ].to_list()
        assert rollout["bp"][0] == pytest.approx(np.exp(rows["teacher_topk_logprobs"][0]), abs=6e-5)
    names = np.array(["", "Q1", "Q2", "Q3", "Q4"])
    codes = {
        (r["id"], p): names[q] for r in run["rollouts"] for p, q in zip(r["p"], r["q"], strict=True)
    }
    plain = dict(
        zip(
            tables.tokens.select("rollout_id", "position").rows(),
            _plain_quadrants(tables.tokens),
            strict=True,
        )
    )
    assert codes == plain


def test_browser_shows_the_smallest_ratio_of_each_rule(page, tables):
    smallest = tables.masks.group_by("rule", "rollout_id", "position").agg(
        pl.col("retention_ratio").min()
    )
    expected = {
        (rule, rollout, position): ratio for rule, rollout, position, ratio in smallest.iter_rows()
    }
    found = {
        (rule, rollout["id"], rollout["p"][index]): ratio
        for rollout in page.data["runs"][0]["rollouts"]
        for rule, ratios in rollout["r"].items()
        for index, ratio in enumerate(ratios)
        if ratio
    }
    assert found == expected


def test_a_sample_stays_within_its_budget(tables, run):
    small = _Page(build_report([run], _options(browser_tokens=200)))
    shown = sum(len(rollout["t"]) for rollout in small.data["runs"][0]["rollouts"])
    assert 100 < shown <= 200


def test_cuts_of_the_options_are_used_and_named(run, tables):
    shown = _Page(build_report([run], _options(entropy_cut="0.5", divergence_cut="q0.8")))
    h, d = tables.tokens["student_entropy"], tables.tokens["reverse_kl"].cast(pl.Float64)
    q3 = ((h <= 0.5) & (d > np.quantile(d.to_numpy(), 0.8))).sum()
    assert shown.table("Tokens of each quadrant")[3][2] == str(q3)
    assert any("--entropy-cut 0.5 --divergence-cut q0.8" in text for text in shown.texts)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "(Q1+Q2 is what the median cut makes it, by construction, and takes no part)"),
        ({"entropy_cut": "q0.6"}, "(Q1+Q2 is what the q0.6 cut makes it, by construction"),
        ({"entropy_cut": "paper"}, "so that they are no evidence here"),
        ({"entropy_cut": 0.4}, ""),
    ],
)
def test_what_a_cut_fixes_takes_no_part_in_the_verdict(run, options, said):
    view = RunView(run, _options(**options))
    finding = overview.quadrant_shares([view]).parts[0].finding
    verdict = finding.split("(Q4): ")[1]
    assert said in verdict
    judged = verdict.split(" (Q1+Q2 is what")[0]
    assert ("Q1+Q2" in judged) == (options == {"entropy_cut": 0.4})


def test_sensitivity_table_agrees_with_counting(page, tables):
    h, d = (
        tables.tokens["student_entropy"].to_numpy(),
        tables.tokens["reverse_kl"].to_numpy().astype(float),
    )
    for row in page.table("Shares at some quantile cuts")[1:]:
        entropy, divergence = (float(cell.split(" ")[0][1:]) for cell in row[:2])
        above_h, above_d = h > np.quantile(h.astype(float), entropy), d > np.quantile(d, divergence)
        assert row[4] == f"{100 * (~above_h & above_d).mean():.1f}%"


def test_several_runs_stand_side_by_side(run, tmp_path):
    other = write_run(tmp_path / "other", make_tables(seed=3, kind_shares=(0.3, 0.3, 0.2, 0.2)))
    shown = _Page(build_report([run, other], _options()))
    rows = shown.table("Runs side by side")[1:]
    assert [row[0] for row in rows] == ["small", "other"]
    quadrants = _plain_quadrants(make_tables(seed=3, kind_shares=(0.3, 0.3, 0.2, 0.2)).tokens)
    assert rows[1][6] == f"{100 * (quadrants == 'Q3').mean():.1f}%"
    assert [item["name"] for item in shown.data["runs"]] == ["small", "other"]


def test_hostile_texts_stay_text(hostile):
    shown = _Page(hostile)
    assert [tag for tag, _ in shown.tags].count("script") == 3
    assert not [
        tag
        for tag, _ in shown.tags
        if tag in ("img", "iframe", "object", "link") and ("rel", "icon") not in _.items()
    ]
    handlers = [
        name for _, attributes in shown.tags for name in attributes if name.startswith("on")
    ]
    assert handlers == []
    assert len(hostile) < 3_000_000
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\u202e\u2028\u2029]", hostile)
    displayed = {text for text, _, _ in shown.data["runs"][0]["texts"]}
    assert {visible(text) for text in HOSTILE_TOKENS[:6]} <= displayed
    assert any(text.endswith("… (1,000,000 characters)") for text in displayed)


def test_nothing_is_fetched(page, hostile):
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert re.match(r"(#|data:)|$", attributes.get(name) or ""), attributes
    assert "@import" not in hostile
    assert not re.search(r"url\((?!#)", hostile.split("<body>")[0])


def test_json_block_cannot_end_its_element():
    value = {"</script>": ["<!--", "]]>", "\u2028", "&amp;", '"\\']}
    text = str(json_block(value))
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == value


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", " the"),
        ("a\nb", "a↵b"),
        ("\t", "⇥"),
        ("\x00\x1b", "⟨00⟩⟨1B⟩"),
        ("\u202eabc", "⟨202E⟩abc"),
        ("\u200d", "⟨200D⟩"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("\ufffd", "\ufffd"),
        ("你好", "你好"),
        ("سلام", "سلام"),
        ("", ""),
        ("x" * 1_000_000, "x" * 48 + "… (1,000,000 characters)"),
        ("a" + "\u0301" * 40, "a" + "\u0301" * 4),
    ],
)
def test_visible_text(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (1234.5, "1,234"),
        (0.12345, "0.123"),
        (-1.5, "−1.50"),
        (1e-7, "1.00e−07"),
        (12.345, "12.3"),
    ],
)
def test_numbers_in_words(value, shown):
    assert number(value) == shown


def test_warnings_name_what_is_unusual(tmp_path):
    tables = make_tables(num_prompts=3, rollouts_per_prompt=2, mean_length=30)
    inf = (
        pl.when(pl.int_range(pl.len()) < 2)
        .then(math.inf)
        .otherwise("forward_kl")
        .cast(pl.Float32)
        .alias("forward_kl")
    )
    tokens = validate(tables.tokens.with_columns(inf), TokenTable)
    rollouts = validate(
        tables.rollouts.with_columns(
            temperature=pl.lit(0.7, pl.Float32),
            ids_origin=pl.lit("retokenized").cast(tables.rollouts["ids_origin"].dtype),
        ),
        RolloutTable,
    )
    path = write_run(
        tmp_path / "odd",
        Tables(rollouts, tokens, tables.gradients, tables.masks, tables.vocabulary),
    )
    shard = next((path / "rollouts").glob("*.parquet"))
    frame = pl.read_parquet(shard)
    frame.with_columns(prompt_text=pl.lit("changed")).write_parquet(shard)
    shown = " ".join(
        _Page(build_report([path], _options(entropy_cut="0.0001", divergence_clip=0.98))).texts
    )
    for words_expected in (
        "0 reverse and 2 forward divergences are +∞",
        "6 of 6 rollouts were imported as text",
        "6 of 6 rollouts were sampled at another temperature",
        "1 shard changed since written (rollouts/part-00000.parquet)",
        "whose most likely token has a probability above 0.95",
        "Divergence is clipped at its 0.98 quantile",
    ):
        assert words_expected in shown


@pytest.mark.parametrize(
    "options",
    [_options(entropy_cut="1e9"), _options(divergence_cut="1e9"), _options(cut_scope="batch")],
)
def test_empty_quadrants_and_batch_cuts_make_a_page(run, options):
    shown = _Page(build_report([run], options))
    assert (
        sum(int(row[2].replace(",", "")) for row in shown.table("Tokens of each quadrant")[1:])
        > 1000
    )


def test_one_rollout_of_one_token_without_reward(tmp_path):
    tables = make_tables(
        num_prompts=1,
        rollouts_per_prompt=1,
        mean_length=0,
        rewards=False,
        planted=False,
        gradients=False,
    )
    assert tables.tokens.height == 1
    shown = _Page(build_report([write_run(tmp_path / "one", tables)], _options()))
    assert shown.table("Tokens of each quadrant")[4][2] == "1"


def test_only_tokens_of_others(tmp_path):
    """All rows masked: nothing has statistics, and the page says so."""
    tables = make_tables(num_prompts=1, rollouts_per_prompt=1, mean_length=5, gradients=False)
    statistics = [name for name in TokenTable.column_names() if TokenTable.columns()[name].nullable]
    tokens = tables.tokens.with_columns(
        pl.lit(None).cast(tables.tokens.schema[name]).alias(name) for name in statistics
    )
    tokens = validate(tokens.with_columns(loss_mask=pl.lit(False)), TokenTable)
    path = write_run(
        tmp_path / "none",
        Tables(tables.rollouts, tokens, tables.gradients, tables.masks.head(0), tables.vocabulary),
    )
    assert "No response token has statistics" in " ".join(
        _Page(build_report([path], _options())).texts
    )


def test_errors_name_the_fix(tmp_path, run):
    with pytest.raises(RunError, match=r"expected a folder with run\.json"):
        build_report([tmp_path / "absent"])
    with pytest.raises(OptionError, match="twice"):
        build_report([run, run], _options())
    with pytest.raises(OptionError, match="at least one"):
        build_report([])


def test_command_line_writes_the_page_without_torch(run, tmp_path):
    output = tmp_path / "deep" / "page.html"
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['report', {str(run)!r}, '-o', {str(output)!r}, '--entropy-cut', 'otsu']\n"
        "runpy.run_module('tip_analysis.report', run_name='__main__')\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert output.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]


def test_equal_runs_make_equal_pages(run, tmp_path):
    first, second = (
        write_report([run], tmp_path / "a.html", _options()),
        write_report([run], tmp_path / "a.html", _options()),
    )
    assert first.read_bytes() == second.read_bytes()


def test_page_reads_in_order_of_headings(page):
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_titles_are_escaped(hostile):
    title = re.search("<title>(.*?)</title>", hostile)[1]
    assert html.unescape(title) == "Token importance in <img src=x onerror=alert(1)>"


def test_cuts_in_the_text_are_those_measured(page, run):
    cuts = resolve_cuts(RunView(run, _options()).raw)
    assert any(
        f"Entropy cut: median ({number(cuts.entropy.value)} nats)" in text for text in page.texts
    )


def test_gradient_shares_equal_plain_sums(page, tables):
    names = _plain_quadrants(tables.tokens)
    measured = tables.gradients.filter(pl.col("loss").cast(pl.String) == "forward_kl")
    norms, phi = measured["grad_norm_sq"].to_numpy(), measured["grad_dot_loss"].to_numpy()
    for row in page.table("Gradients of the forward KL")[1:]:
        inside = names == row[0]
        assert row[2].startswith(f"{100 * norms[inside].sum() / norms.sum():.1f}%")
        assert row[3].startswith(f"{100 * phi[inside].sum() / phi.sum():.1f}%".replace("-", "−"))
        assert row[4].startswith(number(phi[inside].sum() / norms[inside].sum()))
        assert row[6].startswith(f"{100 * (phi[inside] < 0).mean():.1f}%")


def test_what_a_selection_misses_of_q3_equals_a_plain_count(page, tables):
    in_q3 = tables.tokens.filter(pl.Series(_plain_quadrants(tables.tokens) == "Q3")).select(
        "rollout_id", "position"
    )
    for row in page.table("What each selection takes from Q3")[1:]:
        chosen = tables.masks.filter(
            pl.col("rule") == row[0], (pl.col("retention_ratio") - float(row[1])).abs() < 1e-9
        )
        taken = chosen.join(in_q3, on=["rollout_id", "position"], how="semi").height
        assert row[4] == str(chosen.height)
        assert row[5] == f"{100 * taken / chosen.height:.1f}%"
        assert row[6] == f"{100 * (1 - taken / in_q3.height):.1f}%"


def test_group_shares_equal_a_plain_count(page, tables):
    names, position = _plain_quadrants(tables.tokens), tables.tokens["position"].to_numpy()
    rows = {row[0]: row for row in page.table("Shares within groups")[1:]}
    inside = (position >= 4) & (position <= 15)
    assert rows["position: 4–15"][1] == str(inside.sum())
    assert rows["position: 4–15"][4] == f"{100 * (names[inside] == 'Q3').mean():.1f}%"
    digits = np.array([text.strip().isdigit() for text in tables.tokens["token"]])
    assert rows["kind: number"][1] == str(digits.sum())
    assert rows["kind: number"][6] == number(
        (names[digits] == "Q3").mean() / (names == "Q3").mean()
    )


def test_stages_not_run_say_how(tmp_path):
    bare = make_tables(num_prompts=2, rollouts_per_prompt=2, gradients=False)
    path = write_run(
        tmp_path / "bare",
        Tables(bare.rollouts, bare.tokens, bare.gradients, bare.masks.clear(), bare.vocabulary),
    )
    shown = " ".join(_Page(build_report([path], _options())).texts)
    assert f"tip-analysis gradients {path}" in shown
    assert f"tip-analysis select {path} --rules" in shown
    assert f"tip-analysis ablate {path} --rules" in shown


@pytest.fixture(scope="module")
def ablated(tables, tmp_path_factory) -> tuple[_Page, pl.DataFrame]:
    path = write_run(tmp_path_factory.mktemp("runs") / "ablated", tables)
    arms = make_ablations()
    write_ablations(path, arms)
    return _Page(build_report([path], _options())), arms


def test_arms_show_the_mean_over_seeds(ablated):
    shown, arms = ablated
    rows = {row[0]: row for row in shown.table("Arms by accuracy")[1:]}
    assert set(rows) == {"all"} | {
        f"{rule}:{ratio:g}" for rule, ratio in ARM_ACCURACIES if rule != "all"
    }
    for name, ratio in ARM_ACCURACIES:
        of_arm = arms.filter(pl.col("rule") == name, pl.col("retention_ratio") == ratio)["accuracy"]
        row = rows[name if name == "all" else f"{name}:{ratio:g}"]
        assert row[2] == f"{100 * of_arm.mean():.1f}%± {100 * of_arm.std():.1f}%"


def test_claims_stand_beside_the_papers_numbers(ablated):
    shown, arms = ablated
    rows = shown.table("Differences of accuracy in points")[1:]
    accuracy = {
        (rule, round(ratio, 3), seed): value
        for rule, ratio, seed, value in arms.select(
            "rule", "retention_ratio", "seed", "accuracy"
        ).iter_rows()
    }
    effect = np.mean(
        [
            accuracy["soft_or", 0.5, seed] - accuracy["soft_or_bottom", 0.5, seed]
            for seed in range(3)
        ]
    )
    row = next(row for row in rows if row[0] == "e")
    assert row[4].startswith(f"{100 * effect:+.1f}")
    assert row[6] == "supported"
    assert row[8] == "9 of 9the paper"
    assert any("supported: b at ρ = 0.1" in text or "supported: " in text for text in shown.texts)


BENCHMARK_COLUMNS = ["MATH-500", "AIME24", "mean over benchmarks"]


def test_each_benchmark_has_a_column_and_nothing_is_pooled(tables, tmp_path):
    """Two benchmarks of different size: a column each and their unweighted mean, whose pooled mean
    stands nowhere in the section."""
    path = write_run(tmp_path / "two", tables)
    small = make_ablations(benchmark="AIME24", problems=5, seed=1)
    large = make_ablations(benchmark="MATH-500", problems=80, seed=2)
    write_ablations(path, pl.concat([large, small]))
    shown = _Page(build_report([path], _options()))
    header, *rows = shown.table("Arms by accuracy")
    assert [name for name in header if name.startswith("accuracy")] == [
        f"accuracy: {name}" for name in BENCHMARK_COLUMNS
    ]
    for name, ratio in ARM_ACCURACIES:
        own = [
            part.filter(pl.col("rule") == name, pl.col("retention_ratio") == ratio)
            for part in (large, small)
        ]
        means = [part["accuracy"].mean() for part in own]
        pooled = (80 * means[0] + 5 * means[1]) / 85
        row = next(r for r in rows if r[0] == (name if name == "all" else f"{name}:{ratio:g}"))
        cells = [row[header.index(f"accuracy: {name}")] for name in BENCHMARK_COLUMNS]
        for cell, value in zip(cells, [*means, np.mean(means)], strict=True):
            assert cell.startswith(f"{100 * value:.1f}%")
        distinct = {f"{100 * value:.1f}%" for value in [*means, np.mean(means)]}
        assert f"{100 * pooled:.1f}%" in distinct or not any(
            cell.startswith(f"{100 * pooled:.1f}%") for cell in row
        )
    claims = shown.table("Differences of accuracy in points")[1:]
    assert [row[2] for row in claims if row[0] == "e"] == [
        "MATH-500",
        "AIME24",
        "mean over benchmarks",
    ]
    assert next(row[8] for row in claims if row[0] == "e") == "3 of 3the paper"


def test_intervals_of_a_large_run_come_from_sampled_prompts(tables, run):
    """Values are those of all tokens; widths, from half of the prompts, are near those of all
    prompts."""
    whole = RunView(run, ReportOptions(num_resamples=400)).quadrant_means.filter(
        pl.col("statistic") == "share"
    )
    view = RunView(
        run, ReportOptions(num_resamples=400, resampled_tokens=tables.tokens.height // 2)
    )
    assert view.prompt_sample is not None
    assert 2 <= view.prompt_sample.height < 8
    part = view.quadrant_means.filter(pl.col("statistic") == "share")
    assert part["value"].to_list() == whole["value"].to_list()
    ratio = (part["high"] - part["low"]).to_numpy() / (whole["high"] - whole["low"]).to_numpy()
    assert (ratio > 0.2).all()
    assert (ratio < 4).all()


def _headline(run, **options):
    return overview.overview([RunView(run, _options(**options))]).parts[0].finding


def test_headline_gives_the_share_of_tokens_and_of_the_loss_with_n_and_intervals(run, tables):
    in_q3 = _plain_quadrants(tables.tokens) == "Q3"
    divergence = tables.tokens["reverse_kl"].cast(pl.Float64).to_numpy()
    words = _headline(run)
    found = re.search(r"is ([\d.]+%) \[.+?%\] of ([\d,]+) tokens and ([\d.]+%) \[.+?%\]", words)
    assert found is not None, words
    assert found[1] == f"{100 * in_q3.mean():.1f}%"
    assert found[2] == f"{tables.tokens.height:,}"
    assert found[3] == f"{100 * divergence[in_q3].sum() / divergence.sum():.1f}%"


def test_headline_is_silent_about_what_a_few_tokens_carry(run, tables):
    divergence = tables.tokens["reverse_kl"].cast(pl.Float64)
    cut = float(divergence.sort(descending=True)[5])
    words = _headline(run, entropy_cut=100.0, divergence_cut=cut)
    assert "5 tokens, too few to say what it carries" in words
    assert "of the loss" not in words


def test_every_headline_has_its_number_of_tokens_and_no_doubled_brackets(ablated):
    """A number of tokens, seeds or rollouts in each finding, and intervals in one bracket."""
    shown, _ = ablated
    text = " ".join(shown.texts)
    assert "[[" not in text
    assert "]]" not in text


def test_sections_are_silent_about_a_few_q3_tokens(run, tables):
    divergence = tables.tokens["reverse_kl"].cast(pl.Float64)
    cut = float(divergence.sort(descending=True)[5])
    view = RunView(run, _options(entropy_cut=100.0, divergence_cut=cut))
    finding = taxonomy.quadrant_map([view]).parts[0].finding
    assert "Q3" not in finding
    assert "too few to say" in selections.selections([view]).parts[0].finding
    assert "Q3 carries" not in gradients.gradients([view]).parts[0].finding


def test_headlines_name_n_and_an_interval(run):
    view = RunView(run, _options())
    makers = (
        taxonomy.quadrant_map,
        selections.selections,
        gradients.gradients,
        groups.group_effects,
    )
    for make in makers:
        finding = make([view]).parts[0].finding
        assert re.search(r"[\d,]+ (measured )?tokens?", finding), finding
        assert re.search(r"\d% \[−?[\d.]+%, −?[\d.]+%\]", finding), finding


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "both see the same prompt"),
        ({"teacher_context": "solution"}, "the teacher is also shown the reference solution"),
    ],
)
def test_the_title_says_who_teaches_whom_with_what_context(tables, tmp_path, config, said):
    path = write_run(tmp_path / "context", tables, config=config)
    html = build_report([path], _options())
    assert f"synthetic-student learning from synthetic-teacher; {said}" in html
