"""The section with the quadrant map, live: what its script needs of each run.

The joint histogram gives shares under any pair of its edges, exactly and for all tokens; the tokens
that the page carries can be listed, filtered and found. Texts are made visible here
(`text.visible`), and the page's script puts them in place as text only.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl

from tip_analysis.analysis.carried_tokens import (
    AFTER,
    BEFORE,
    DRAWN,
    PLACE,
    SCORES,
    STRONGEST,
    Carried,
    carried_ratios,
    carry_tokens,
    context_places,
)
from tip_analysis.analysis.joint_grid import JointGrid, measure_joint_grid
from tip_analysis.analysis.run_view import GRADIENT_SCORES, RunView
from tip_analysis.core.names import Quadrant
from tip_analysis.core.text import visible
from tip_analysis.core.words import count, plural
from tip_analysis.report.binary import packed, packed_index

_CODES = {name.value: code for code, name in enumerate(Quadrant, 1)}


class _Texts:
    """Distinct visible texts, referred to by index."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self._index: dict[str, int] = {}

    def add(self, text: str) -> int:
        """The index of a text."""
        shown = visible(text)
        if shown not in self._index:
            self._index[shown] = len(self.entries)
            self.entries.append(shown)
        return self._index[shown]


def payload(views: Sequence[RunView]) -> dict[str, Any]:
    """What the script of the map and of the token table reads."""
    return {
        "runs": [_run_payload(view, carry_tokens(view)) for view in views],
        "before": BEFORE,
        "after": AFTER,
    }


def carried_words(view: RunView, carried: Carried) -> str:
    """How many tokens of a run are in the page, and which."""
    total = view.population.num_tokens
    if carried.complete:
        return f"All {plural(total, 'token')} are in this page."
    return (
        f"{count(carried.tokens.height)} of {plural(total, 'token')} are in this page: the"
        f" {STRONGEST} strongest of each quadrant and kind by Q3 score, forward KL and reverse KL,"
        f" and about {count(DRAWN)} drawn from each quadrant. The map and the shares count all"
        " tokens."
    )


def _run_payload(view: RunView, carried: Carried) -> dict[str, Any]:
    cuts = view.cuts.entropy.value, view.cuts.divergence.value
    sizes = dict(view.shares.select(pl.col("quadrant").cast(pl.String), "num_tokens").rows())
    return {
        "name": visible(view.name, 60),
        "cuts": None if None in cuts else list(cuts),
        "counts": [int(sizes.get(name.value) or 0) for name in Quadrant],
        "complete": carried.complete,
        "words": carried_words(view, carried),
        "grid": _grid_payload(measure_joint_grid(view.raw, view.cuts)),
        **_tokens_payload(view, carried),
    }


def _grid_payload(grid: JointGrid) -> dict[str, Any]:
    cells = np.flatnonzero(grid.counts)
    return {
        "entropy": grid.entropy_edges.tolist(),
        "divergence": grid.divergence_edges.tolist(),
        "cells": packed(cells.astype(np.uint32)),
        "counts": packed(grid.counts.ravel()[cells].astype(np.uint32)),
        "loss": packed(grid.loss.ravel()[cells].astype(np.float32)),
    }


def _tokens_payload(view: RunView, carried: Carried) -> dict[str, Any]:
    rows, texts = carried.tokens, _Texts()
    index = rows["rollout_id"].unique(maintain_order=True).to_list()
    place = {name: number for number, name in enumerate(index)}
    rewards = dict(view.rollouts.select("rollout_id", "reward").rows())
    text = [texts.add(value) for value in rows["token"]]
    columns = {
        "rollout": packed_index([place[name] for name in rows["rollout_id"]], len(index)),
        "position": packed(rows["position"].to_numpy().astype(np.uint32)),
        "quadrant": packed(_quadrant_codes(rows)),
        **_named_columns(rows),
        **_score_columns(rows),
    }
    expected = {model: _expected(view, rows, model, texts) for model in ("student", "teacher")}
    around = _around(carried, texts)
    size = len(texts.entries)
    columns |= {"text": packed_index(text, size)}
    columns |= {model: packed_index(_or(values, size), size) for model, values in expected.items()}
    if around is not None:
        columns["around"] = packed_index(_or(around, size), size)
    kept, rules, ratios = _kept(view, rows)
    return {
        "texts": texts.entries,
        "rollouts": [[name, rewards.get(name)] for name in index],
        "names": {name: _names_of(rows, name) for name in _NAMED if name in rows.columns},
        "rules": rules,
        "ratios": ratios,
        "columns": columns | kept,
    }


_NAMED = ("kind", "segment", "planted_label", "artefact")
"""Columns of few names, each carried as an index into its names; 0 is none."""


def _names_of(rows: pl.DataFrame, column: str) -> list[str]:
    return sorted(visible(str(name)) for name in rows[column].cast(pl.String).drop_nulls().unique())


def _named_columns(rows: pl.DataFrame) -> dict[str, dict[str, str]]:
    made = {}
    for column in (name for name in _NAMED if name in rows.columns):
        place = {name: number for number, name in enumerate(_names_of(rows, column), 1)}
        values = rows[column].cast(pl.String)
        codes = [0 if value is None else place[visible(value)] for value in values]
        made[column] = packed(np.array(codes, dtype=np.uint8))
    return made


def _quadrant_codes(rows: pl.DataFrame) -> np.ndarray:
    names = rows["quadrant"].cast(pl.String)
    codes = names.replace_strict(_CODES, default=0, return_dtype=pl.UInt8)
    return codes.fill_null(0).to_numpy()


def _score_columns(rows: pl.DataFrame) -> dict[str, dict[str, str]]:
    """The scores that any token has; NaN where one has none."""
    present = (
        name for name in (*SCORES, *GRADIENT_SCORES) if rows[name].null_count() < rows.height
    )
    return {
        name: packed(rows[name].cast(pl.Float32).fill_null(np.nan).to_numpy()) for name in present
    }


def _expected(view: RunView, rows: pl.DataFrame, model: str, texts: _Texts) -> list[int | None]:
    """The text of what a model held most likely at each place."""
    first = rows[f"{model}_topk_ids"].list.first()
    known = view.token_texts(first.drop_nulls().unique())
    return [None if value is None else texts.add(known[value]) for value in first]


def _around(carried: Carried, texts: _Texts) -> list[int | None] | None:
    """[N · (before + after)] the texts around each token; None where all tokens are carried, and
    are each other's context."""
    if carried.complete:
        return None
    made: list[int | None] = []
    for rollout, position in carried.tokens.select(PLACE).iter_rows():
        near = (carried.around.get(place) for place in context_places(rollout, position))
        made += [None if found is None else texts.add(found[1]) for found in near]
    return made


def _or(values: Iterable[int | None], size: int) -> list[int]:
    return [size if value is None else value for value in values]


def _kept(
    view: RunView, rows: pl.DataFrame
) -> tuple[dict[str, dict[str, str]], list[str], list[float]]:
    """By rule, the smallest ρ that keeps each token, as an index into the ratios from 1; 0 where
    none does."""
    masks = carried_ratios(view, rows.select(PLACE))
    rules, ratios = sorted(masks["rule"].unique()), sorted(masks["retention_ratio"].unique())
    codes = {ratio: number for number, ratio in enumerate(ratios, 1)}
    coded = masks.with_columns(
        pl.col("retention_ratio").replace_strict(codes, return_dtype=pl.UInt8)
    )
    kept = {}
    for rule in rules:
        joined = rows.select(PLACE).join(
            coded.filter(rule=rule), on=PLACE, how="left", maintain_order="left"
        )
        kept[f"kept{len(kept)}"] = packed(joined["retention_ratio"].fill_null(0).to_numpy())
    return kept, [visible(rule, 60) for rule in rules], [float(ratio) for ratio in ratios]
