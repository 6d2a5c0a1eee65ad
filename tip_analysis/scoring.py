"""Two models over rollouts: every column of the token table, shard by shard.

Reads `rollouts/*.parquet`; writes `tokens/*.parquet` (`schema.TokenTable`), one shard for every `shard_size` rollouts, and
`vocabulary.parquet`, the text of every shared token.
Each model's body runs once over a batch; then, a block of rows at a time, both heads make the logits of that block and
`divergence.token_statistics` reads everything off them, so that no more than two [block, V] arrays of logits ever exist.

The teacher may be shown another prompt for the same response (`teacher_context="solution"`: privileged context); student
and teacher are aligned by position in the response.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import torch
from torch import Tensor

from tip_analysis.artifacts import Run, Stage, write_atomically
from tip_analysis.batching import TokenBudget, padding_waste, plan_batches
from tip_analysis.divergence import rows_per_block, token_statistics, worth_compiling
from tip_analysis.errors import LogitsError, OptionError, RunError, UnknownNameError, VocabularyMismatchError
from tip_analysis.forward import check_context, response_hidden_states
from tip_analysis.models import LanguageModel, shared_vocabulary, token_texts, tokenizer_fingerprint
from tip_analysis.progress import Advance, track
from tip_analysis.prompts import render, teacher_messages
from tip_analysis.schema import TokenTable, polars_schema

logger = logging.getLogger(__name__)

TEACHER_CONTEXTS = ("none", "solution")
SHARING_PAYS_FROM = 0.2
"""Share of a batch's positions that running each distinct prompt once must save."""

Statistics = dict[str, Tensor]


@dataclass(frozen=True)
class Scorer:
    """Student and teacher, ready to turn rollouts into token rows; knows nothing of folders."""

    student: LanguageModel
    teacher: LanguageModel
    budget: TokenBudget = field(default_factory=lambda: TokenBudget(16384))
    top_k: int = 5
    share_prompts: bool | None = None
    """Run each distinct prompt of a batch once; None does so where it pays (`SHARING_PAYS_FROM`)."""
    compile: bool | None = None
    """Whether the statistics are compiled; None leaves it to the size of the work."""
    vocab_size: int = field(init=False)

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise OptionError(f"--top-k must be at least 1, found {self.top_k}")
        object.__setattr__(self, "vocab_size", shared_vocabulary(self.student, self.teacher))

    def token_table(self, rollouts: pl.DataFrame, advance: Advance | None = None) -> pl.DataFrame:
        """Token rows (`schema.TokenTable`) of some rollouts (`schema.RolloutTable`), in their order.

        Raises:
            LogitsError: a model answers NaN or +inf; names rollout and position.
        """
        rows = rollouts.to_dicts()
        scored = [row for row in rows if any(row["loss_mask"])]
        lengths = [_length(row) for row in scored]
        prompts = [row["prompt_id"] for row in scored]
        parts: dict[int, Statistics] = {}
        for batch, results in self.budget.run(lengths, lambda batch: self._score([scored[i] for i in batch]), groups=prompts):
            parts |= zip(batch, results, strict=True)
            if advance is not None:
                advance(len(batch), tokens=sum(sum(scored[i]["loss_mask"]) for i in batch))
        if advance is not None:
            advance(len(rows) - len(scored))
        return _assemble(rollouts, [parts[index] for index in range(len(scored))], self)

    @torch.no_grad()
    def _score(self, rows: Sequence[Mapping[str, Any]]) -> list[Statistics]:
        """Statistics of one batch: for each rollout, its counted tokens' columns."""
        responses = [row["response_token_ids"] for row in rows]
        counted = [torch.tensor(row["loss_mask"]) for row in rows]
        student = self._states(self.student, [row["prompt_token_ids"] for row in rows], responses, counted)
        teacher = self._states(self.teacher, [_teacher_prompt(row) for row in rows], responses, counted)
        token_ids = torch.cat([torch.tensor(ids)[mask] for ids, mask in zip(responses, counted, strict=True)])
        try:
            statistics = self._statistics(student, teacher, token_ids.to(student.device))
        except LogitsError as error:
            raise _located(error, rows) from error
        sizes = [int(mask.sum()) for mask in counted]
        columns = {name: column.cpu().split(sizes) for name, column in statistics.items()}
        return [{name: pieces[index] for name, pieces in columns.items()} for index in range(len(rows))]

    def _states(
        self, model: LanguageModel, prompts: list[list[int]], responses: list[list[int]], counted: list[Tensor]
    ) -> Tensor:
        """Hidden states [N, D] that predict the counted tokens of a batch."""
        share = _sharing_pays(prompts, responses) if self.share_prompts is None else self.share_prompts
        states = response_hidden_states(model.model, prompts, responses, share_prompts=share)
        return torch.cat([rows[mask.to(rows.device)] for rows, mask in zip(states, counted, strict=True)])

    def _statistics(self, student: Tensor, teacher: Tensor, token_ids: Tensor) -> Statistics:
        """Heads and statistics, a cache-sized block of rows at a time."""
        compiled = self.compile if self.compile is not None else worth_compiling(len(token_ids) * self.vocab_size)
        step = rows_per_block(self.vocab_size, device=student.device)
        blocks = []
        for start in range(0, len(token_ids), step):
            rows = slice(start, start + step)
            student_logits = self.student.head(student[rows])[:, : self.vocab_size]
            teacher_logits = self.teacher.head(teacher[rows])[:, : self.vocab_size].to(student_logits.device)
            try:
                blocks.append(
                    token_statistics(
                        student=student_logits,
                        teacher=teacher_logits,
                        token_ids=token_ids[rows],
                        top_k=self.top_k,
                        compile=compiled,
                    )
                )
            except LogitsError as error:
                error.row = start + (error.row or 0)
                raise
        return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def score_rollouts(
    run: Run,
    scorer: Scorer,
    *,
    teacher_context: str = "none",
    shard_size: int = 64,
    part: tuple[int, int] = (0, 1),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score every rollout of `run`; shards that are whole already are left alone.

    Args:
        run: a run folder with rollouts.
        scorer: student and teacher.
        teacher_context: `none` (the rollout's own prompt, or the teacher's where the rollout carries one) or `solution`
            (the reference solution in the user's turn).
        shard_size: rollouts a shard.
        part: (i, n): make only every n-th shard, from the i-th on, as one of n processes that fill the run together.
        overwrite: start afresh.

    Returns:
        The stage's summary, as `run.json` has it.

    Raises:
        RunError: there are no rollouts, or they are of another tokenizer.
        ContextLengthError: a rollout is longer than a model's context.
        LogitsError: a model answers NaN or +inf; names rollout and position.
        ConfigurationMismatchError: the folder was scored with another configuration.
    """
    work = begin_scoring(run, scorer, teacher_context, shard_size, part, overwrite=overwrite)
    missing = [index for index in work.mine if not work.stage.is_whole(index)]
    total = sum(work.shard(index).height for index in work.mine)
    with track("scoring", total, done=total - sum(work.shard(index).height for index in missing)) as advance:
        for index in missing:
            score_shard(scorer, work, index, advance)
    return finish_scoring(run, work.stage)


@dataclass(frozen=True)
class ScoringWork:
    """The rollouts of a run, cut into the shards of its token table."""

    stage: Stage
    rollouts: pl.DataFrame
    shard_size: int
    mine: range
    """Shards that this process is to make."""

    def shard(self, index: int) -> pl.DataFrame:
        """The rollouts of one shard."""
        return self.rollouts[index * self.shard_size : (index + 1) * self.shard_size]


def score_shard(scorer: Scorer, work: ScoringWork, index: int, advance: Advance | None = None) -> int:
    """Score one shard and write it; returns its number of token rows."""
    rollouts = work.shard(index)
    table = scorer.token_table(rollouts, advance)
    lengths = [_length(row) for row in rollouts.iter_rows(named=True)]
    plan = plan_batches(lengths, scorer.budget.tokens, groups=rollouts["prompt_id"].to_list())
    work.stage.write(index, table, padding_waste=round(padding_waste(lengths, plan), 4))
    return table.height


def begin_scoring(
    run: Run, scorer: Scorer, teacher_context: str, shard_size: int, part: tuple[int, int] = (0, 1), *, overwrite: bool = False
) -> ScoringWork:
    """Check everything that can be checked before a model runs, and say what there is to do."""
    if shard_size < 1:
        raise OptionError(f"--shard-size must be at least 1, found {shard_size}")
    if not 0 <= part[0] < part[1]:
        raise OptionError(f"--shard i/n needs 0 <= i < n, found {part[0]}/{part[1]}")
    rollouts = prepare_rollouts(run, scorer.student, scorer.teacher, teacher_context)
    stage = run.begin(
        "score",
        config={
            "student": scorer.student.describe(),
            "teacher": scorer.teacher.describe(),
            "teacher_context": teacher_context,
            "shared_vocabulary": scorer.vocab_size,
            "shard_size": shard_size,
            "top_k": scorer.top_k,
        },
        inputs={"rollouts": run.table_hash("rollouts")},
        settings={"device": str(scorer.student.device), "token_budget": scorer.budget.tokens},
        overwrite=overwrite,
    )
    write_vocabulary(run, scorer, overwrite=overwrite)
    return ScoringWork(stage, rollouts, shard_size, range(part[0], -(-rollouts.height // shard_size), part[1]))


def write_vocabulary(run: Run, scorer: Scorer, *, overwrite: bool = False) -> None:
    """Write `vocabulary.parquet` (token_id, token), so that a report can name tokens that were likely but not sampled."""
    path = run.path / "vocabulary.parquet"
    if path.is_file() and not overwrite:
        return
    texts = sorted(token_texts(scorer.student.tokenizer, range(scorer.vocab_size)).items())
    frame = pl.DataFrame(texts, schema={"token_id": pl.Int32, "token": pl.String}, orient="row")
    write_atomically(path, frame.write_parquet)


def finish_scoring(run: Run, stage: Stage) -> dict[str, Any]:
    """Record the outcome once the last shard is there, whichever process made it."""
    rollouts = run.rollouts().select(num_tokens=pl.col("response_token_ids").list.len()).collect()
    num_shards = -(-rollouts.height // run.stages()[stage.key]["config"]["shard_size"])
    if missing := stage.missing(num_shards):
        return {"num_shards": num_shards, "num_shards_missing": len(missing)}
    waste = [shard["padding_waste"] for shard in stage.shards()]
    return stage.finish(
        num_shards=num_shards,
        **summarize(run),
        num_empty_rollouts=int((rollouts["num_tokens"] == 0).sum()),
        mean_padding_waste=round(sum(waste) / len(waste), 4) if waste else 0.0,
    )


def prepare_rollouts(run: Run, student: LanguageModel, teacher: LanguageModel, teacher_context: str) -> pl.DataFrame:
    """The run's rollouts, each with the prompt that the teacher is shown; refuses what cannot be scored."""
    rollouts = run.rollouts().collect()
    ours = tokenizer_fingerprint(student.tokenizer)
    if foreign := rollouts.filter(pl.col("tokenizer_fingerprint") != ours)["rollout_id"].to_list():
        raise VocabularyMismatchError(
            f"rollout {foreign[0]!r} holds the token ids of another tokenizer than that of {student.name}: "
            "score with the student that wrote it"
        )
    rollouts = with_teacher_prompts(rollouts, teacher, teacher_context, _template_switches(run))
    for model, prompt in ((student, "prompt_token_ids"), (teacher, "teacher_prompt_token_ids")):
        lengths = (
            rollouts[prompt].fill_null(rollouts["prompt_token_ids"]).list.len() + rollouts["response_token_ids"].list.len()
        )
        check_context(model, rollouts["rollout_id"].to_list(), lengths.to_list())
    return rollouts


def with_teacher_prompts(
    rollouts: pl.DataFrame, teacher: LanguageModel, teacher_context: str, switches: Mapping[str, Any] | None = None
) -> pl.DataFrame:
    """Set `teacher_prompt_token_ids` for the context asked for.

    Raises:
        UnknownNameError: no such context.
        RunError: a rollout lacks the solution, or its messages, that `solution` needs.
    """
    if teacher_context not in TEACHER_CONTEXTS:
        raise UnknownNameError("teacher context", teacher_context, TEACHER_CONTEXTS)
    if teacher_context == "none":
        return rollouts
    prompts: dict[str, list[int]] = {}
    for row in rollouts.unique("prompt_id", keep="first", maintain_order=True).iter_rows(named=True):
        for needed in ("solution", "messages"):
            if row[needed] is None:
                raise RunError(
                    f"prompt {row['prompt_id']!r} has no {needed}: --teacher-context solution needs one for every prompt"
                )
        messages = teacher_messages(json.loads(row["messages"]), row["solution"])
        prompts[row["prompt_id"]] = render(teacher.tokenizer, messages, chat_template_kwargs=switches).token_ids
    shown = pl.Series("teacher_prompt_token_ids", [prompts[name] for name in rollouts["prompt_id"]], dtype=pl.List(pl.Int32))
    return rollouts.with_columns(shown)


def summarize(run: Run) -> dict[str, Any]:
    """Counts of a run's token table, and where it needs care."""
    tokens = run.tokens()
    return tokens.select(
        num_tokens=pl.len(),
        num_scored_tokens=pl.col("loss_mask").sum(),
        num_infinite_reverse_kl=pl.col("reverse_kl").is_infinite().sum(),
        num_infinite_forward_kl=pl.col("forward_kl").is_infinite().sum(),
        mean_student_entropy=pl.col("student_entropy").mean(),
        mean_reverse_kl=pl.col("reverse_kl").filter(pl.col("reverse_kl").is_finite()).mean(),
    ).collect(engine="streaming").to_dicts()[0]  # fmt: skip


def _assemble(rollouts: pl.DataFrame, parts: Sequence[Statistics], scorer: Scorer) -> pl.DataFrame:
    """The token table of some rollouts from the statistics of their counted tokens."""
    base = (
        rollouts.select(
            "rollout_id",
            "prompt_id",
            "batch_id",
            "loss_mask",
            token_id="response_token_ids",
            position=pl.int_ranges(pl.col("response_token_ids").list.len(), dtype=pl.Int32),
            planted_label=pl.coalesce(
                "planted_labels", pl.lit(None, pl.String).repeat_by(pl.col("response_token_ids").list.len())
            ).cast(pl.List(TokenTable.planted_label.dtype)),
        )
        .filter(pl.col("position").list.len() > 0)
        .explode("loss_mask", "token_id", "position", "planted_label")
        .with_row_index("row")
    )
    texts = token_texts(scorer.student.tokenizer, base["token_id"].to_list())
    base = base.with_columns(pl.Series("token", [texts[token_id] for token_id in base["token_id"]], dtype=pl.String))
    schema = polars_schema(TokenTable)
    if not parts:
        return base.select(
            base[name] if name in base.columns else pl.lit(None, dtype).alias(name) for name, dtype in schema.items()
        )
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    statistics = pl.DataFrame([_series(name, column, schema[name]) for name, column in columns.items()])
    counted = base.filter("loss_mask").select("row").hstack(statistics)
    return base.join(counted, on="row", how="left", maintain_order="left").select(*schema)


def _series(name: str, column: Tensor, dtype: pl.DataType) -> pl.Series:
    """One column of statistics as polars holds it; what is undefined (NaN) is null."""
    values = column.numpy()
    if values.ndim == 2:
        return pl.Series(name, values).cast(dtype)
    series = pl.Series(name, values).cast(dtype)
    return series.fill_nan(None) if dtype.is_float() else series


def _length(row: Mapping[str, Any]) -> int:
    """Tokens of a rollout as the longer of both models sees it."""
    return max(len(row["prompt_token_ids"]), len(_teacher_prompt(row))) + len(row["response_token_ids"])


def _teacher_prompt(row: Mapping[str, Any]) -> list[int]:
    own = row["teacher_prompt_token_ids"]
    return row["prompt_token_ids"] if own is None else own


def _sharing_pays(prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> bool:
    """Whether running each distinct prompt once saves enough positions."""
    alone = sum(map(len, prompts)) + sum(map(len, responses))
    saved = sum(map(len, prompts)) - sum(map(len, set(map(tuple, prompts))))
    return saved >= SHARING_PAYS_FROM * alone


def _located(error: LogitsError, rows: Sequence[Mapping[str, Any]]) -> LogitsError:
    """The same error, saying which rollout and position it is."""
    places = [(row["rollout_id"], position) for row in rows for position, counted in enumerate(row["loss_mask"]) if counted]
    rollout_id, position = places[error.row or 0]
    return LogitsError(f"rollout {rollout_id!r}, position {position}: {error}", model=error.model, row=error.row)


def _template_switches(run: Run) -> dict[str, Any]:
    """Switches of the chat template that the student's prompts were rendered with."""
    return run.stages().get("rollout", {}).get("config", {}).get("chat_template_kwargs", {})
