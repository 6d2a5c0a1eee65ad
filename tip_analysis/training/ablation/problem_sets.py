"""The problems that an ablation trains on and is judged by, from their sources."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import OnBadRow
from tip_analysis.core.run_folder import RunLike, open_run
from tip_analysis.core.toy_pairs import toy_pairs
from tip_analysis.rollouts.bad_rows import BadRows
from tip_analysis.rollouts.prompts import Prompt, is_file, read_prompts


def load_prompts(source: str, *, limit: int | None = None, **how: Any) -> list[Prompt]:
    """The prompts of a source: `arithmetic:SPLIT:NUMBER`, a file, or a hub dataset.

    Args:
        source: where they are.
        limit: the first so many only.
        how: further options of `read_prompts`.

    Raises:
        PromptFileError: they cannot be read.
        OptionError: a malformed arithmetic source.
    """
    if (pair := toy_pairs().get(source.split(":", maxsplit=1)[0])) is not None:
        return [
            Prompt(row["id"], problem=row["problem"], answer=row["answer"])
            for row in pair.prompts(source)
        ][:limit]
    return read_prompts(source, limit=limit, **how)


def check_prompts(source: str) -> None:
    """Refuse a source of prompts that cannot be read: an arithmetic source or a file by its first
    prompt, a hub dataset by its name only.

    Raises:
        PromptFileError: there is no such file, or its first row is no prompt.
        OptionError: a malformed arithmetic source.
    """
    if source.split(":", maxsplit=1)[0] in toy_pairs() or is_file(source):
        load_prompts(source, limit=1)


def load_evaluation_sets(
    sources: Sequence[str],
    *,
    limit: int | None = None,
    on_bad_row: BadRows | OnBadRow | str = OnBadRow.FAIL,
) -> list[Prompt]:
    """The problems of several sets, each with the name of its benchmark; with more than one set,
    ids have the name in front.

    Raises:
        PromptFileError: a problem cannot be used, for want of an answer for one.
        OptionError: a set is named twice.
    """
    names = benchmark_names(sources)
    prefix = "{}/" if len(names) > 1 else ""
    return [
        replace(prompt, id=prefix.format(name) + prompt.id, benchmark=name)
        for source, name in zip(sources, names, strict=True)
        for prompt in load_prompts(source, limit=limit, needs_answer=True, on_bad_row=on_bad_row)
    ]


def benchmark_names(sources: Sequence[str]) -> list[str]:
    """What the benchmark of each source is called: its short name, or, where two would have the
    same, the whole source.

    Raises:
        OptionError: a source is named twice.
    """
    if twice := [source for source in sources if list(sources).count(source) > 1]:
        raise OptionError(f"the evaluation set {twice[0]!r} is named twice")
    short = [short_name(source) for source in sources]
    return [
        source if short.count(name) > 1 else name
        for source, name in zip(sources, short, strict=True)
    ]


def short_name(source: str) -> str:
    """The name of a set of prompts as it stands before ids: `MATH-500` of
    `HuggingFaceH4/MATH-500:test`."""
    stem = source.split(":", maxsplit=1)[0].rstrip("/").rsplit("/", maxsplit=1)[-1]
    return stem.removesuffix(".jsonl").removesuffix(".parquet")


def num_prompts_of(run: RunLike) -> int:
    """How many prompts the rollouts of a run answer: none where there is no run yet."""
    if isinstance(run, str | Path) and not (Path(run) / "run.json").is_file():
        return 0
    folder = open_run(run)
    if not folder.has("rollouts"):
        return 0
    return folder.rollouts().select("prompt_id").unique().collect().height
