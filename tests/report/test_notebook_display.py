"""How runs, quadrants and rollouts show themselves; hostile tokens are shown, never run."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

import tip_analysis as tip
from tests.synthetic import HOSTILE_TOKENS, Tables, make_hostile_tables, make_tables, write_run
from tip_analysis.analysis.quadrants import assign_quadrants, quadrant_shares
from tip_analysis.analysis.taxonomy import resolve_cuts
from tip_analysis.core.errors import RunError, UnknownNameError
from tip_analysis.core.run_folder import Run, create_run, open_run
from tip_analysis.core.text import visible
from tip_analysis.figures import QUADRANT_COLORS
from tip_analysis.report.notebook import OPACITY, SCALE_COLOR, show_quadrants, show_rollout

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class Page(HTMLParser):
    """Every start tag with its attributes; the spans of tokens with their text; balance of tags."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.tokens: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "br":
            self.open.append(tag)
        if tag == "span" and (dict(attrs).get("class") or "").startswith("tip-t "):
            self.tokens.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            return
        self.text += data
        if self.tokens and self.open and self.open[-1] == "span":
            attributes, text = self.tokens[-1]
            self.tokens[-1] = attributes, text + data


def printed(renderable: object, *, width: int = 200, color: bool = False) -> str:
    console = Console(
        width=width, force_terminal=color, color_system="truecolor" if color else None
    )
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.fixture(scope="module")
def tables() -> Tables:
    return make_tables()


@pytest.fixture(scope="module")
def run(tables, tmp_path_factory) -> Run:
    return open_run(write_run(tmp_path_factory.mktemp("display") / "run", tables))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("hostile") / "<img src=x onerror=hacked()>"
    return open_run(write_run(folder, make_hostile_tables()))


def test_every_token_has_the_colour_of_its_quadrant_and_its_own_text(run, tables):
    placed = (
        assign_quadrants(tables.tokens)
        .collect()
        .filter(pl.col("rollout_id") == "p002/1")
        .sort("position")
    )
    page = Page(show_rollout(run, "p002/1")._repr_html_())
    assert [attributes["class"] for attributes, _ in page.tokens] == [
        f"tip-t tip-{name}" for name in placed["quadrant"]
    ]
    assert [text for _, text in page.tokens] == [visible(text) for text in placed["token"]]
    assert show_rollout(run, "p002/1").counts() == {
        name: int((placed["quadrant"] == name).sum()) for name in ("Q1", "Q2", "Q3", "Q4")
    }


def test_a_tooltip_has_the_numbers_of_its_row(run, tables):
    row = tables.tokens.filter(pl.col("rollout_id") == "p002/1").sort("position").row(7, named=True)
    gradient = tables.gradients.filter(
        pl.col("rollout_id") == "p002/1", pl.col("position") == 7, pl.col("loss") == "reverse_kl"
    ).row(0, named=True)
    title = Page(show_rollout(run, "p002/1")._repr_html_()).tokens[7][0]["title"] or ""
    assert f"position 7 · id {row['token_id']}" in title
    assert f"student entropy {row['student_entropy']:.3g}"[:20] in title
    assert f"gradient norm ‖g‖ {gradient['grad_norm_sq'] ** 0.5:.3g}"[:20] in title
    for model in ("student", "teacher"):
        best = visible(tables.vocabulary[row[f"{model}_topk_ids"][0]])
        assert f"{model}: {best} {100 * row[f'{model}_top1_prob']:.1f}%" in title


def test_a_tooltip_names_the_rules_with_their_smallest_ratio(run, tables):
    rules = tables.masks.filter(pl.col("rollout_id") == "p002/1", pl.col("rule") != "all")
    smallest = rules.group_by("position", "rule").agg(pl.col("retention_ratio").min(), pl.len())
    assert (smallest["len"] > 1).any(), "some token is selected at several ratios"
    tokens = show_rollout(run, "p002/1").tokens
    for position, rule, ratio, _ in smallest.iter_rows():
        assert f"{rule} from ρ {ratio:g}" in tokens[position].details[-1]
    unselected = set(range(len(tokens))) - set(smallest["position"])
    assert all("selected by" not in tokens[position].details[-1] for position in unselected)


def test_a_score_colours_from_the_low_to_the_high_end_of_its_scale(run, tables):
    view = show_rollout(run, "p002/1", colour_by="forward_kl")
    values = (
        tables.tokens.filter(pl.col("rollout_id") == "p002/1")
        .sort("position")["forward_kl"]
        .to_list()
    )
    low, high = (
        float(tables.tokens["forward_kl"].cast(pl.Float64).quantile(q) or 0) for q in (0.01, 0.99)
    )
    assert view.scale == pytest.approx((low, high))
    expected = [min(1.0, max(0.0, (value - low) / (high - low))) for value in values]
    assert [token.strength for token in view.tokens] == pytest.approx(expected, abs=1e-6)
    assert "(pale)" in view.legend()
    assert not any(
        "tip-Q" in (attributes["class"] or "") for attributes, _ in Page(view._repr_html_()).tokens
    )


def test_the_default_is_the_rollout_of_the_strongest_q3_token(run, tables):
    scored = assign_quadrants(tip.add_scores(tables.tokens)).collect()
    best = scored.filter(pl.col("quadrant") == "Q3").sort(
        "q3_score", "rollout_id", descending=[True, False]
    )
    assert show_rollout(run).rollout_id == best["rollout_id"][0]


def test_cuts_decide_the_colours(run):
    assert show_rollout(run, "p002/1", entropy_cut=0.0, divergence_cut=0.0).counts()["Q1"] > 20
    counts = show_rollout(run, "p002/1", entropy_cut=99, divergence_cut=99).counts()
    assert counts["Q4"] == sum(counts.values())


def test_a_long_rollout_is_cut_and_says_so(run):
    view = show_rollout(run, "p002/1", max_tokens=5)
    assert len(view.tokens) == 5
    assert f"… {view.num_left_out} more tokens" in Page(view._repr_html_()).text
    assert f"… {view.num_left_out} more tokens" in printed(view)


def test_terminal_and_notebook_show_the_same(run):
    view = show_rollout(run, "p002/1")
    plain = printed(view, width=100_000)
    assert (
        "".join(token.text + "\n" * token.num_line_breaks for token in view.tokens).strip() in plain
    )
    assert view.heading() in plain
    red, green, blue = (int(QUADRANT_COLORS["Q3"][index : index + 2], 16) for index in (1, 3, 5))
    assert f"48;2;{red};{green};{blue}" in printed(view, color=True)
    assert "\x1b[1;4;" in printed(view, color=True), (
        "Q3 is bold and underlined, for terminals without colours"
    )


def test_colours_are_those_of_the_report():
    css = (Path(tip.__file__).parent / "report" / "assets" / "report.css").read_text("utf-8")
    light = css.split("}")[0]
    for name, color in QUADRANT_COLORS.items():
        assert f"--{name.lower()}: {color};" in light
    for name, opacity in OPACITY.items():
        assert (
            f".rollout .{name.lower()} {{ background: rgb(var(--{name.lower()}-rgb) /"
            f" {opacity:.2f});" in css
        )
    scale = " ".join(str(int(SCALE_COLOR[index : index + 2], 16)) for index in (1, 3, 5))
    assert f"--scale-rgb: {scale};" in light


@pytest.mark.parametrize("colour_by", ["quadrant", "soft_or"])
def test_hostile_tokens_are_shown_and_never_run(hostile, colour_by):
    shown = set()
    for name in hostile.tokens().select("rollout_id").unique().collect()["rollout_id"]:
        view = show_rollout(hostile, name, colour_by=colour_by)
        html = view._repr_html_()
        page = Page(html)
        assert {tag for tag, _ in page.tags} <= {
            "div",
            "style",
            "b",
            "details",
            "summary",
            "pre",
            "span",
            "small",
            "br",
        }
        assert {key for _, attributes in page.tags for key in attributes} <= {
            "class",
            "style",
            "title",
        }
        assert not CONTROL.search(html)
        assert not CONTROL.search(printed(view, width=100_000))
        assert len(html) < 200_000
        assert "mathjax_ignore" in html.split(">")[0]
        shown |= {text for _, text in page.tokens}
    assert {visible(text) for text in HOSTILE_TOKENS} <= shown
    assert any("1,000,000 characters" in text for text in shown)


def test_a_hostile_folder_name_is_escaped(hostile):
    page = Page(hostile._repr_html_())
    assert "img" not in {tag for tag, _ in page.tags}
    assert "<img src=x onerror=hacked()>" in page.text


def test_tokens_of_the_user_stand_apart_without_a_quadrant(tmp_path, tables):
    masked = pl.col("position") < 3
    kept = {"rollout_id", "prompt_id", "position", "batch_id", "token_id", "token", "loss_mask"}
    gone = [
        pl.when(~masked).then(pl.col(name)).alias(name)
        for name in tables.tokens.columns
        if name not in kept
    ]
    tokens = tables.tokens.with_columns(*gone, (~masked).alias("loss_mask"))
    run = open_run(
        write_run(
            tmp_path / "run", Tables(tables.rollouts, tokens, *_empty(tables), tables.vocabulary)
        )
    )
    view = show_rollout(run, "p000/0")
    assert [token.quadrant for token in view.tokens[:3]] == [None] * 3
    assert view.tokens[0].details[0].endswith("not written by the student")
    assert [attributes["class"] for attributes, _ in Page(view._repr_html_()).tokens[:3]] == [
        "tip-t tip-q0"
    ] * 3


def _empty(tables: Tables) -> tuple[pl.DataFrame, pl.DataFrame]:
    return tables.gradients.clear(), tables.masks.clear()


def test_quadrant_summary_has_shares_and_cuts(run, tables):
    summary = show_quadrants(run)
    shares = quadrant_shares(assign_quadrants(tables.tokens))
    for name, share in shares.select("quadrant", "share").iter_rows():
        assert summary.share(str(name)) == pytest.approx(share)
        assert f"{100 * share:.1f}%" in summary._repr_html_()
        assert f"{100 * share:.1f}%" in printed(summary)
    cuts = resolve_cuts(tables.tokens)
    assert (
        f"student entropy is high above {cuts.entropy.value:.3g} nats (median)"
        in Page(cuts._repr_html_()).text
    )
    assert (
        "student entropy is high above 0.300 nats"
        in Page(show_quadrants(run, entropy_cut=0.3).html()).text
    )
    assert "3% to 15%" in printed(summary)


def test_cuts_by_batch_and_by_the_paper_say_what_they_are(run):
    assert (
        "median of its batch (1 cut)"
        in Page(show_quadrants(run, cut_scope="batch")._repr_html_()).text
    )
    text = Page(show_quadrants(run, entropy_cut="paper")._repr_html_()).text
    assert "of the paper’s ranges" in text


def test_a_run_shows_its_stages_quadrants_and_next_steps(run, tables):
    text = Page(run._repr_html_()).text
    assert f"{tables.tokens.height:,}" in text
    assert "synthetic-student learns from synthetic-teacher" in text
    assert "tip-analysis report" in text
    for stage in ("rollout", "score", "gradients", "select"):
        assert stage in text


def test_a_run_without_tokens_shows_what_comes_next(tmp_path):
    text = Page(create_run(tmp_path / "new")._repr_html_()).text
    assert "empty" in text
    assert "tip-analysis rollout" in text


def test_a_large_run_counts_only_when_asked(run, monkeypatch):
    monkeypatch.setattr("tip_analysis.report.notebook.runs.MAX_SUMMARY_TOKENS", 10)
    assert "tip.show_quadrants(run)" in Page(run._repr_html_()).text


def test_wrong_names_are_refused(run, tmp_path):
    with pytest.raises(UnknownNameError, match=r"unknown rollout 'p002/9' \(did you mean"):
        show_rollout(run, "p002/9")
    with pytest.raises(UnknownNameError, match="did you mean 'soft_or'"):
        show_rollout(run, colour_by="softor")
    with pytest.raises(RunError, match="no scored tokens"):
        show_rollout(create_run(tmp_path / "new"))
    bare = write_run(tmp_path / "bare", make_tables(num_prompts=1, gradients=False))
    with pytest.raises(RunError, match="tip-analysis gradients"):
        show_rollout(bare, colour_by="grad_norm")


def test_showing_needs_no_torch(run):
    code = (
        f"import sys, tip_analysis as tip; run = tip.open_run({str(run.path)!r});"
        " run._repr_html_(); tip.show_rollout(run)._repr_html_(); assert 'torch' not in"
        " sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
