"""The `score` stage: rollouts in, token table out, shard by shard.

Reads `rollouts/*.parquet`; writes `tokens/*.parquet` (`schema.TokenTable`), one shard for every
`shard_size` rollouts, and `vocabulary/*.parquet` (`schema.VocabularyTable`), the text of every
shared token. How the numbers are made is told in `tip_analysis.scoring.scorer`.

Where student and teacher do not fit together, the teacher's phase comes first
(`tip_analysis.scoring.teacher_states`), and its stored states take the place of the teacher's body
here. The table is the same.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import polars as pl

from tip_analysis.analysis.logprob_gap import logprob_gap, warn_about_gap
from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.errors import ConfigurationMismatchError
from tip_analysis.core.names import StopTokens, TeacherContext
from tip_analysis.core.progress import Advance, track
from tip_analysis.core.run_folder import Run, Stage, open_run
from tip_analysis.core.schema import VocabularyTable
from tip_analysis.models.batching import padding_waste, plan_batches
from tip_analysis.models.loading import tokenizer_fingerprint
from tip_analysis.rollouts.teacher_prompts import num_shards, prepare_rollouts, shards_of_part
from tip_analysis.scoring.scorer import Scorer, StoredTeacher, longer_lengths

__all__ = [
    "Scorer",
    "ScoringWork",
    "begin_scoring",
    "finish_scoring",
    "score_rollouts",
    "score_shard",
]


class TeacherSource(Protocol):
    """The teacher's side of a run, from elsewhere than its body."""

    @property
    def teacher(self) -> dict[str, Any]:
        """What the record says of the teacher."""
        ...

    def marks(self) -> dict[str, Any]:
        """What the record says of columns that are not exact."""
        ...

    def facts(self) -> dict[str, Any]:
        """What is recorded besides."""
        ...

    def check(self, scorer: Scorer) -> None:
        """Refuse a scorer that this side cannot serve."""
        ...

    def shard(self, index: int, rollouts: pl.DataFrame, scorer: Scorer) -> StoredTeacher:
        """The side of one shard's rollouts."""
        ...


def score_rollouts(
    run: Run,
    scorer: Scorer,
    *,
    teacher_context: TeacherContext | str = TeacherContext.NONE,
    shard_size: int = 64,
    part: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    stored: TeacherSource | None = None,
) -> dict[str, Any]:
    """Score every rollout of `run`; shards that are whole already are left alone.

    Args:
        run: a run folder with rollouts.
        scorer: student and teacher.
        teacher_context: `none` (the rollout's own prompt, or the teacher's where the rollout
            carries one) or `solution` (the reference solution in the user's turn).
        shard_size: rollouts a shard.
        part: (i, n): make only every n-th shard, from the i-th on, as one of n processes that fill
            the run together.
        overwrite: start afresh.
        stored: the teacher's side, where it comes from a store (then only the head of
            `scorer.teacher` is used) or a server.

    Returns:
        The stage's summary, as `run.json` has it.

    Raises:
        RunError: there are no rollouts, or they are of another tokenizer.
        ContextLengthError: a rollout is longer than a model's context.
        LogitsError: a model answers NaN or +inf; names rollout and position.
        ConfigurationMismatchError: the folder was scored with another configuration.
    """
    context = TeacherContext(teacher_context)
    work = begin_scoring(run, scorer, context, shard_size, part, overwrite=overwrite, stored=stored)
    missing = [index for index in work.mine if not work.stage.is_whole(index)]
    total = sum(work.shard(index).height for index in work.mine)
    with track(
        "scoring", total, done=total - sum(work.shard(index).height for index in missing)
    ) as advance:
        for index in missing:
            score_shard(work, index, advance)
    return finish_scoring(run, work.stage)


@dataclass(frozen=True)
class ScoringWork:
    """The rollouts of a run, cut into the shards of its token table."""

    stage: Stage
    scorer: Scorer
    """Compiles its statistics or not by the size of the whole run, so that all shards are made
    alike, whoever makes them."""
    rollouts: pl.DataFrame
    shard_size: int
    mine: range
    """Shards that this process is to make."""
    stored: TeacherSource | None = None
    """The teacher's side, where it comes from a store or a server."""

    def shard(self, index: int) -> pl.DataFrame:
        """The rollouts of one shard."""
        return self.rollouts[index * self.shard_size : (index + 1) * self.shard_size]


def score_shard(work: ScoringWork, index: int, advance: Advance | None = None) -> int:
    """Score one shard and write it; returns its number of token rows."""
    rollouts, scorer = work.shard(index), work.scorer
    stored = None if work.stored is None else work.stored.shard(index, rollouts, scorer)
    table = scorer.token_table(rollouts, advance, stored)
    if work.stored is not None and (why := work.stored.marks().get("approximate")):
        table = table.with_columns(approximation=pl.lit(why, table.schema["approximation"]))
    lengths = longer_lengths(rollouts).to_list()
    plan = plan_batches(lengths, scorer.budget.tokens, groups=rollouts["prompt_id"].to_list())
    is_first = not work.stage.shards()  # an old vocabulary stays for as long as old rows do
    work.stage.write(index, table, padding_waste=round(padding_waste(lengths, plan), 4))
    run = open_run(work.stage.run.path)
    if is_first or not run.has("vocabulary"):
        write_vocabulary(run, scorer, may_replace=is_first)
    return table.height


def begin_scoring(
    run: Run,
    scorer: Scorer,
    teacher_context: TeacherContext,
    shard_size: int,
    part: tuple[int, int] = (0, 1),
    *,
    overwrite: bool | str = False,
    stored: TeacherSource | None = None,
) -> ScoringWork:
    """Check everything that can be checked before a model runs, and say what there is to do."""
    mine = shards_of_part(run, shard_size, part)
    rollouts = prepare_rollouts(run, scorer.student, scorer.teacher, teacher_context)
    if stored is not None:
        stored.check(scorer)
    stage = run.begin(
        "score",
        config={
            "student": scorer.student.describe(),
            "teacher": scorer.teacher.describe() if stored is None else stored.teacher,
            "teacher_context": teacher_context,
            "shared_vocabulary": scorer.vocab_size,
            "shard_size": shard_size,
            "top_k": scorer.top_k,
            "stop_tokens": scorer.stop_tokens,
            "student_stop_tokens": sorted(scorer.student.stop_token_ids),
            "teacher_stop_tokens": sorted(scorer.teacher.stop_token_ids),
            **({} if stored is None else stored.marks()),
        },
        inputs={"rollouts": run.table_hash("rollouts")},
        settings={
            "device": str(scorer.student.device),
            "token_budget": scorer.budget.tokens,
            "phases": 1 if stored is None else 2,
            **({} if stored is None else stored.facts()),
        },
        overwrite=overwrite,
    )
    scorer = replace(scorer, compile=scorer.compiles(rollouts))
    if stage.shards():
        write_vocabulary(run, scorer, may_replace=False)
    return ScoringWork(stage, scorer, rollouts, shard_size, mine, stored)


def write_vocabulary(run: Run, scorer: Scorer, *, may_replace: bool) -> None:
    """Write the vocabulary table, so that a report can name tokens that were likely but not
    sampled.

    Args:
        run: the run that is scored.
        scorer: student and teacher, whose shared tokens are meant.
        may_replace: another vocabulary may be there: of scoring that left no shard behind.
    """
    stage = _begin_vocabulary(run, scorer, may_replace)
    if not stage.is_whole(0):
        texts = sorted(scorer.texts(range(scorer.vocab_size)).items())
        stage.write(0, pl.DataFrame(texts, schema=polars_schema(VocabularyTable), orient="row"))
    stage.finish(num_texts=scorer.vocab_size)


def _begin_vocabulary(run: Run, scorer: Scorer, may_replace: bool) -> Stage:
    config = {
        "tokenizer_fingerprint": tokenizer_fingerprint(scorer.student.tokenizer),
        "shared_vocabulary": scorer.vocab_size,
    }
    try:
        return run.begin("vocabulary", config=config)
    except ConfigurationMismatchError:
        if not may_replace:
            raise
        return run.begin("vocabulary", config=config, overwrite=True)


def finish_scoring(run: Run, stage: Stage) -> dict[str, Any]:
    """Record the outcome once the last shard is there, whichever process made it."""
    rollouts = run.rollouts().select(num_tokens=pl.col("response_token_ids").list.len()).collect()
    total = num_shards(run, stage.config["shard_size"])
    if missing := stage.missing(total):
        return {"num_shards": total, "num_shards_missing": len(missing)}
    waste = [shard.get("padding_waste", 0.0) for shard in stage.shards()]
    gap = logprob_gap(run, _merged_stops(stage))
    warn_about_gap(gap)
    return stage.finish(
        num_shards=total,
        **summarize(run),
        **gap,
        num_empty_rollouts=int((rollouts["num_tokens"] == 0).sum()),
        mean_padding_waste=round(sum(waste) / len(waste), 4) if waste else 0.0,
    )


def _merged_stops(stage: Stage) -> list[int]:
    """Stop tokens whose log-probability is that of all of them together."""
    if stage.config.get("stop_tokens") != StopTokens.MERGED:
        return []
    return [*stage.config["student_stop_tokens"], *stage.config["teacher_stop_tokens"]]


def summarize(run: Run) -> dict[str, Any]:
    """Counts of a run's token table, and where it needs care."""
    tokens = run.tokens()
    return (
        tokens.select(
            num_tokens=pl.len(),
            num_scored_tokens=pl.col("loss_mask").sum(),
            num_infinite_reverse_kl=pl.col("reverse_kl").is_infinite().sum(),
            num_infinite_forward_kl=pl.col("forward_kl").is_infinite().sum(),
            mean_student_entropy=pl.col("student_entropy").mean(),
            mean_reverse_kl=pl.col("reverse_kl").filter(pl.col("reverse_kl").is_finite()).mean(),
        )
        .collect(engine="streaming")
        .to_dicts()[0]
    )
