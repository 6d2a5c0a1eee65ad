"""A run as flat files for other tools: tokens with scores and quadrants, masks, and labels that
trainers read.

Written: `tokens.parquet` (every token column, the scores, `quadrant`), `rollouts.parquet`, and
where they were made `vocabulary.parquet`, `gradients.parquet`, `masks.parquet` (one row per
selected token) and `labels/RULE-RATIO-SCOPE-SEED.parquet`: one row per rollout with `input_ids` and
`labels` (−100 where a token is not selected), as most trainers take them, and `selected`, one bool
per response token. For verl also `verl/….parquet` of the same names: `uid` and `response_mask`.
`export.json` says what the files were made from, with their hashes, and
`README.md` names the tables for `datasets.load_dataset(FOLDER, "rollouts")` (`tokens` by default).

All files are made whole in a hidden folder first; only then are they put in their places, in the
place of older ones where `overwrite` allows it. An export that was killed is made again; one that
is whole is left alone. Nothing is removed but files of an earlier export that are still as it wrote
them.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import polars as pl

from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, Taxonomy
from tip_analysis.core.atomic_files import (
    file_hash,
    make_folder,
    part_of,
    put_in_place,
    remove_stale_parts,
    storage_errors,
    sync,
    write_atomically,
)
from tip_analysis.core.errors import OptionError, RunError
from tip_analysis.core.names import ExportLayout
from tip_analysis.core.record import config_hash
from tip_analysis.core.run_folder import Run
from tip_analysis.core.table_files import scan

IGNORED = -100
"""The label that cross-entropy losses leave out."""

TABLES = ("vocabulary", "gradients", "masks", "ablations", "evaluations")
"""Tables that are exported where they were made."""

MANIFEST = "export.json"
CARD, CARD_BEGINS = "README.md", "---\n# made by `tip-analysis export`\nconfigs:\n"
LONGEST_RULE = 120
"""Characters of a rule's name in that of a file."""
_FILE = re.compile(r"(?:[a-z_]+|(?:labels|verl)/[A-Za-z0-9_.~%-]+)\.parquet")
"""How exported files may be called: a manifest may come from anywhere."""

_Files = dict[str, dict[str, Any]]
"""By name: `sha256` and `num_rows`."""


def export_run(
    run: Run,
    folder: Path,
    taxonomy: Taxonomy = DEFAULT_TAXONOMY,
    *,
    layout: ExportLayout | str = ExportLayout.PLAIN,
    overwrite: bool = False,
) -> dict[Path, int]:
    """Write a run's tables as flat Parquet files; tables larger than memory stream.

    Args:
        run: a run folder with scored tokens.
        folder: where the files go.
        taxonomy: how tokens are scored and put into quadrants.
        layout: whether masks are written as verl takes them too.
        overwrite: replace files that are there.

    Returns:
        Each file with its number of rows.

    Raises:
        OptionError: `folder` holds other files already, or lies in the run folder.
        RunError: tokens are not scored.
        StorageError: it cannot be written; what was there before is intact.
    """
    _refuse_run_folder(run, folder)
    layout = ExportLayout(layout)
    tables = _tables(run, taxonomy, layout)
    source = _source(run, taxonomy, layout)
    remove_stale_parts(folder)
    before = _manifest(folder)
    files: _Files = before.get("files", {})
    if before.get("source") != source:
        if not overwrite and _holds_files(folder):
            raise OptionError(
                f"{folder} is not empty; name another folder, or --overwrite what it holds"
            )
        files = _export(folder, tables, source, before)
    elif not _is_whole(folder, before):
        files = _export(folder, tables, source, before)
    _write_card(folder, list(files))
    return {folder / name: file["num_rows"] for name, file in files.items()}


def _write_card(folder: Path, files: list[str]) -> None:
    """Name each table for `load_dataset`, which would else put files of several schemas into one;
    a README that is not ours is left alone."""
    path = folder / CARD
    ours = path.is_file() and path.read_bytes().startswith(CARD_BEGINS.encode())
    if path.exists() and not ours:
        return
    lines = [CARD_BEGINS]
    for name in files:
        lines.append(f"- config_name: {_table_name(name)}\n  data_files: {name}\n")
        if name == "tokens.parquet":
            lines.append("  default: true\n")
    text = "".join([*lines, "---\n"])
    if not path.exists() or path.read_text("utf-8") != text:
        write_atomically(path, lambda part: part.write_text(text, "utf-8"))


def _table_name(file: str) -> str:
    return file.removesuffix(".parquet").replace("/", "-").replace("%", "_")


def _tables(run: Run, taxonomy: Taxonomy, layout: ExportLayout) -> dict[str, pl.LazyFrame]:
    """What is exported, by file name."""
    tokens = run.tokens()
    scored = add_scores(tokens, normalization=taxonomy.normalization(tokens))
    tables = {
        "tokens": assign_quadrants(scored, cuts=taxonomy.measure(tokens)),
        "rollouts": run.rollouts(),
    }
    tables |= {name: run.table(name) for name in TABLES if run.has(name)}
    if run.has("masks"):
        labels = mask_labels(run.rollouts(), run.masks())
        tables |= {f"labels/{name}": table for name, table in labels.items()}
        if layout is ExportLayout.VERL:
            tables |= {f"verl/{name}": response_masks(table) for name, table in labels.items()}
    elif layout is ExportLayout.VERL:
        raise RunError(
            f"{run.path} has no masks to hand to verl: `tip-analysis select {run.path} …` makes"
            " them"
        )
    return {f"{name}.parquet": table for name, table in tables.items()}


def _source(run: Run, taxonomy: Taxonomy, layout: ExportLayout) -> str:
    """What the files are made from, as one hash."""
    hashes = {name: run.table_hash(name) for name in ("tokens", "rollouts", *TABLES)}
    beside = [] if layout is ExportLayout.PLAIN else [layout.value]
    return config_hash([hashes, str(taxonomy), *beside])


def _refuse_run_folder(run: Run, folder: Path) -> None:
    for parent in [folder.resolve(), *folder.resolve().parents]:
        own = parent.exists() and parent.samefile(run.path)
        if own or (parent / "run.json").is_file():
            raise OptionError(
                f"{folder} lies in the run folder {parent}, whose files are the run's own; name"
                " another folder"
            )


def _holds_files(folder: Path) -> bool:
    """Whether anything lies there but what is hidden, such as part files."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def _manifest(folder: Path) -> dict[str, Any]:
    """What an earlier export wrote of itself; empty where there is none that can be trusted."""
    if not (folder / MANIFEST).is_file():
        return {}
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
        files: list[tuple[str, Any]] = [*found["files"].items(), *found["stale"].items()]
        sound = all(
            _FILE.fullmatch(name) and isinstance(file["sha256"], str) and file["num_rows"] >= 0
            for name, file in files
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return found if sound else {}


def _is_whole(folder: Path, manifest: dict[str, Any]) -> bool:
    return not manifest["stale"] and all(
        _is_as_written(folder / name, file) for name, file in manifest["files"].items()
    )


def _is_as_written(path: Path, file: dict[str, Any]) -> bool:
    return path.is_file() and not path.is_symlink() and file_hash(path) == file["sha256"]


def _export(
    folder: Path, tables: dict[str, pl.LazyFrame], source: str, before: dict[str, Any]
) -> _Files:
    """Make all files, say in the manifest what is to be there, and put them in their places."""
    if (folder / "labels").is_symlink():
        raise OptionError(f"{folder / 'labels'} is a link, which leads elsewhere: remove it")
    with storage_errors(folder), _staging(folder) as staging:
        files = {name: _make(staging / name, frame) for name, frame in tables.items()}
        stale = {**before.get("stale", {}), **before.get("files", {})}
        stale = {name: file for name, file in stale.items() if name not in files}
        _write_manifest(folder, {"source": source, "files": files, "stale": stale})
        for name in files:
            make_folder((folder / name).parent)
            put_in_place(staging / name, folder / name)
        for name, file in stale.items():
            if _is_as_written(folder / name, file):
                (folder / name).unlink()
        _write_manifest(folder, {"source": source, "files": files, "stale": {}})
    return files


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    make_folder(folder)
    staging = part_of(folder / "export")
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _make(path: Path, frame: pl.LazyFrame) -> dict[str, Any]:
    make_folder(path.parent)
    with path.open("wb") as file:
        frame.sink_parquet(file)
    sync(path)
    num_rows = scan([path]).select(pl.len()).collect().item()
    return {"sha256": file_hash(path), "num_rows": num_rows}


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest, indent=1) + "\n"
    write_atomically(folder / MANIFEST, lambda part: part.write_text(text, "utf-8"))


def mask_labels(rollouts: pl.LazyFrame, masks: pl.LazyFrame) -> dict[str, pl.LazyFrame]:
    """For each mask one row per rollout: `rollout_id`, `input_ids`, `labels`, `selected`."""
    keys = ["rule", "retention_ratio", "selection_scope", "seed"]
    found = masks.select(keys).unique().sort(keys).collect().iter_rows(named=True)
    named: dict[str, pl.LazyFrame] = {}
    taken: set[str] = set()
    for key in found:
        name = _label_name(key)
        if name.casefold() in taken:  # one file on a file system that does not tell cases apart
            name += f"-{config_hash(key)}"
        taken.add(name.casefold())
        wanted = [pl.col(column) == value for column, value in key.items()]
        named[name] = _labels(rollouts, masks.filter(*wanted))
    return named


def response_masks(labels: pl.LazyFrame) -> pl.LazyFrame:
    """Masks as verl's `response_mask` has them: `uid` (the rollout's id, which of an imported dump
    is the sample's own) and one 0 or 1 for each response token."""
    mask = pl.col("selected").list.eval(pl.element().cast(pl.Int64))
    return labels.select(uid="rollout_id", response_mask=mask)


def _label_name(key: dict[str, Any]) -> str:
    """The name of a mask's file; a rule's name may hold anything, its file's name may not."""
    rule = quote(key["rule"], safe="")
    if len(rule) > LONGEST_RULE:
        rule = f"{rule[:LONGEST_RULE]}~{config_hash(key['rule'])}"
    return f"{rule}-{key['retention_ratio']:g}-{key['selection_scope']}-{key['seed']}"


def _labels(rollouts: pl.LazyFrame, mask: pl.LazyFrame) -> pl.LazyFrame:
    num_response = pl.col("response_token_ids").list.len()
    chosen = mask.select("rollout_id", "position", selected=pl.lit(True))
    tokens = (
        rollouts.select(
            "rollout_id", "response_token_ids", position=pl.int_ranges(num_response, dtype=pl.Int32)
        )
        .filter(num_response > 0)
        .explode("response_token_ids", "position")
        .join(chosen, on=["rollout_id", "position"], how="left", maintain_order="left")
        .with_columns(pl.col("selected").fill_null(False))
        .with_columns(label=pl.when("selected").then("response_token_ids").otherwise(IGNORED))
        .group_by("rollout_id", maintain_order=True)
        .agg("label", "selected")
    )
    ignored_prompt = pl.lit(IGNORED, pl.Int32).repeat_by(pl.col("prompt_token_ids").list.len())
    return rollouts.join(tokens, on="rollout_id", how="left", maintain_order="left").select(
        "rollout_id",
        input_ids=pl.col("prompt_token_ids").list.concat("response_token_ids"),
        labels=ignored_prompt.list.concat(pl.col("label").fill_null([])),
        selected=pl.col("selected").fill_null([]),
    )
