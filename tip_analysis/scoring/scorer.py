"""Two models over rollouts in memory: every column of the token table; knows nothing of folders.

Each model's body runs once over a batch; then, a block of rows at a time, both heads make the
logits of that block and `divergence.token_statistics` reads everything off them, so that no more
than two [block, V] arrays of logits ever exist.

Student and teacher are aligned by position in the response: the teacher may be shown another
prompt. Its side may also come from a store (`tip_analysis.scoring.teacher_states`) instead of its
body.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import polars as pl
import torch
from torch import Tensor

from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.errors import LogitsError, OptionError
from tip_analysis.core.names import StopTokens
from tip_analysis.core.progress import Advance
from tip_analysis.core.schema import TokenTable
from tip_analysis.logits.blocks import Columns, in_blocks
from tip_analysis.logits.row_statistics import rows_per_block, token_statistics, worth_compiling
from tip_analysis.models.batching import TokenBudget
from tip_analysis.models.hidden_states import chosen_hidden_states
from tip_analysis.models.loading import LanguageModel, overflow_hint, shared_vocabulary, token_texts
from tip_analysis.models.output_head import OutputHead
from tip_analysis.models.token_model import TokenModel
from tip_analysis.rollouts.encoded import Rollout, rollouts_in_memory
from tip_analysis.rollouts.segments import label_segments
from tip_analysis.scoring.artefacts import PADDED_MASS, label_artefacts, mass_outside

SHARING_PAYS_FROM = 0.2
"""Share of a batch's positions that running each distinct prompt once must save."""


class TeacherSide(Protocol):
    """The teacher's side of N counted tokens."""

    def logits(self, rows: slice, student_logits: Tensor) -> Tensor:
        """Its logits [n, V] of some rows; V may exceed the student's."""
        ...

    def settle(self, columns: Columns) -> Columns:
        """The columns of all rows, once statistics are made of these logits."""
        ...


class StoredTeacher(Protocol):
    """The teacher's side of some rollouts, from a store."""

    def side(self, rollout_ids: Sequence[str]) -> TeacherSide:
        """Of the counted tokens of these rollouts, one after another."""
        ...


@dataclass(frozen=True)
class HiddenSide:
    """The teacher's side as last hidden states [N, D] and its head: exact."""

    hidden: Tensor
    head: OutputHead

    def logits(self, rows: slice, student_logits: Tensor) -> Tensor:
        """Its logits [n, V]."""
        return self.head(self.hidden[rows].to(self.head.device))

    def settle(self, columns: Columns) -> Columns:
        """The columns as they are."""
        return columns


@dataclass(frozen=True)
class Scorer:
    """Student and teacher, ready to turn rollouts into token rows."""

    student: LanguageModel
    teacher: TokenModel
    """Without its body where its side comes from a store or a server."""
    budget: TokenBudget = field(default_factory=lambda: TokenBudget(16384))
    top_k: int = 5
    share_prompts: bool | None = None
    """Run each distinct prompt of a batch once; None does so where it pays
    (`SHARING_PAYS_FROM`)."""
    compile: bool | None = None
    """Whether the statistics are compiled; None leaves it to device and size of each table
    (`divergence.worth_compiling`)."""
    stop_tokens: StopTokens = StopTokens.DECLARED
    """Whether the tokens with which either model stops count as one."""
    vocab_size: int = field(init=False)
    _texts: dict[int, str] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise OptionError(f"--top-k must be at least 1, found {self.top_k}")
        object.__setattr__(self, "vocab_size", shared_vocabulary(self.student, self.teacher))

    @cached_property
    def stop_ids(self) -> list[int]:
        """The shared tokens with which either model ends a response, rising."""
        either = self.student.stop_token_ids | self.teacher.stop_token_ids
        return sorted(token_id for token_id in either if token_id < self.vocab_size)

    def token_table(
        self,
        rollouts: pl.DataFrame,
        advance: Advance | None = None,
        stored: StoredTeacher | None = None,
    ) -> pl.DataFrame:
        """Token rows (`schema.TokenTable`) of some rollouts (`schema.RolloutTable`), in their
        order.

        Args:
            rollouts: the rollouts.
            advance: told of progress.
            stored: the teacher's side of these rollouts; then the teacher's body is not run.

        Raises:
            LogitsError: a model answers NaN or +inf; names rollout and position.
        """
        compiled = self.compiles(rollouts)
        columns = in_batches(
            rollouts, self.budget, lambda rows: self._score(rows, stored, compiled), advance
        )
        table = _assemble(rollouts, columns, self.texts)
        special_ids = self.student.tokenizer.all_special_ids
        table = label_segments(table, rollouts, special_ids=special_ids)
        return label_artefacts(
            table,
            rollouts,
            stop_ids=self.stop_ids,
            special_ids=special_ids,
            stop_tokens=self.stop_tokens,
        )

    def compiles(self, rollouts: pl.DataFrame) -> bool:
        """Whether the statistics of these rollouts' tokens are compiled."""
        if self.compile is not None:
            return self.compile
        num_tokens = rollouts.select(pl.col("loss_mask").list.sum().sum()).item()
        return worth_compiling(num_tokens * self.vocab_size, self.student.device)

    def texts(self, token_ids: Iterable[int]) -> dict[int, str]:
        """The text of each distinct token; each is decoded once."""
        wanted = set(token_ids)
        if new := wanted - self._texts.keys():
            self._texts.update(token_texts(self.student.tokenizer, new))
        return {token_id: self._texts[token_id] for token_id in wanted}

    @torch.no_grad()
    def _score(
        self, rows: Sequence[Rollout], stored: StoredTeacher | None, compiled: bool
    ) -> Columns:
        """Columns of one batch's counted tokens."""
        student = counted_states(self.student, rows, share_prompts=self.share_prompts)
        teacher = (
            self._body(rows)
            if stored is None
            else stored.side([rollout.rollout_id for rollout in rows])
        )
        try:
            return self._statistics(student, teacher, counted_tokens(rows), compiled)
        except LogitsError as error:
            raise located(
                error, rows, {"student": self.student, "teacher": self.teacher}
            ) from error

    def _body(self, rows: Sequence[Rollout]) -> HiddenSide:
        """The teacher's side from its own body."""
        if not isinstance(self.teacher, LanguageModel):
            raise OptionError(f"{self.teacher.name} has no body here, and no stored side was given")
        hidden = counted_states(self.teacher, rows, teacher=True, share_prompts=self.share_prompts)
        return HiddenSide(hidden, self.teacher.head)

    def _statistics(
        self, student: Tensor, teacher: TeacherSide, token_ids: Tensor, compiled: bool
    ) -> Columns:
        """Heads and statistics, a cache-sized block of rows at a time."""
        stop_ids = torch.tensor(self.stop_ids, dtype=torch.long)

        def block(rows: slice) -> Columns:
            of_student = self.student.head(student[rows])
            student_logits = of_student[:, : self.vocab_size]
            of_teacher = teacher.logits(rows, student_logits).to(student_logits.device)
            found = token_statistics(
                student=student_logits,
                teacher=of_teacher[:, : self.vocab_size],
                token_ids=token_ids[rows],
                top_k=self.top_k,
                stop_ids=stop_ids,
                merge_stop_tokens=self.stop_tokens is StopTokens.MERGED,
                compile=compiled,
            )
            return found | self._padded_mass(of_student, of_teacher, found)

        columns = in_blocks(
            len(token_ids), rows_per_block(self.vocab_size, device=student.device), block
        )
        return teacher.settle({name: column.cpu() for name, column in columns.items()})

    def _padded_mass(self, student: Tensor, teacher: Tensor, found: Columns) -> Columns:
        """The scratch column of `artefacts`, where a head has rows beyond the shared vocabulary;
        not of merged rows, whose top token may be the merged one."""
        if max(student.shape[1], teacher.shape[1]) == self.vocab_size or (
            self.stop_tokens is StopTokens.MERGED
        ):
            return {}
        masses = [
            mass_outside(
                logits,
                self.vocab_size,
                found[f"{side}_topk_ids"][:, 0],
                found[f"{side}_topk_logprobs"][:, 0],
            )
            for side, logits in (("student", student), ("teacher", teacher))
        ]
        return {PADDED_MASS: torch.maximum(*masses)}


def in_batches(
    rollouts: pl.DataFrame,
    budget: TokenBudget,
    work: Callable[[Sequence[Rollout]], Columns],
    advance: Advance | None = None,
) -> Columns:
    """Columns of the counted tokens of some rollouts, in their order; `work` makes those of one
    batch.

    Both phases of a scoring in two cut their batches here, so that each body sees what it would see
    in one pass.
    """
    rows = [rollout for rollout in rollouts_in_memory(rollouts) if rollout.num_tokens]
    lengths = longer_lengths(rollouts.filter(pl.col("loss_mask").list.any())).to_list()
    groups = [rollout.prompt_id for rollout in rows]
    made, order = [], []
    for batch, columns in budget.run(
        lengths, lambda batch: work([rows[index] for index in batch]), groups
    ):
        made.append(columns)
        order += batch
        if advance is not None:
            advance(len(batch), tokens=sum(rows[index].num_tokens for index in batch))
    if advance is not None:
        advance(rollouts.height - len(rows))
    return _in_order(made, order, [rollout.num_tokens for rollout in rows])


def _in_order(made: list[Columns], order: list[int], sizes: list[int]) -> Columns:
    """Columns of batches as one, for the rollouts 0, 1, 2 … of these sizes, which were made in
    another order."""
    if not made:
        return {}
    pieces = dict(
        zip(order, torch.arange(sum(sizes)).split([sizes[index] for index in order]), strict=True)
    )
    places = torch.cat([pieces[index] for index in range(len(sizes))])
    return {name: torch.cat([columns[name] for columns in made])[places] for name in made[0]}


def counted_states(
    model: LanguageModel,
    rollouts: Sequence[Rollout],
    *,
    teacher: bool = False,
    share_prompts: bool | None = None,
) -> Tensor:
    """Last hidden states [N, D] that predict the counted tokens of a batch.

    Args:
        model: student or teacher.
        rollouts: the rollouts.
        teacher: whether the teacher's prompts are shown.
        share_prompts: run each distinct prompt once; None does so where it pays.
    """
    responses = [rollout.response for rollout in rollouts]
    prompts = [rollout.prompt_of(teacher=teacher) for rollout in rollouts]
    share = _sharing_pays(prompts, responses) if share_prompts is None else share_prompts
    chosen = [rollout.positions for rollout in rollouts]
    return chosen_hidden_states(model.model, prompts, responses, chosen, share_prompts=share)


def counted_tokens(rollouts: Sequence[Rollout]) -> Tensor:
    """The counted tokens of a batch, [N]."""
    return torch.from_numpy(np.concatenate([rollout.written_tokens for rollout in rollouts]))


def longer_lengths(rollouts: pl.DataFrame) -> pl.Series:
    """Tokens of each rollout as the longer of both models sees it."""
    prompt, teacher_prompt = (
        pl.col("prompt_token_ids").list.len(),
        pl.col("teacher_prompt_token_ids").list.len(),
    )
    longer = pl.max_horizontal(prompt, teacher_prompt) + pl.col("response_token_ids").list.len()
    return rollouts.select(longer.cast(pl.Int64)).to_series()


def located(
    error: LogitsError, rollouts: Sequence[Rollout], models: Mapping[str, TokenModel]
) -> LogitsError:
    """The same error, saying which rollout and position it is, and the usual cause in float16."""
    places = [(rollout.rollout_id, at) for rollout in rollouts for at in rollout.positions]
    rollout_id, position = places[error.row or 0]
    guilty = models.get(error.model or "")
    hint = overflow_hint(guilty) if isinstance(guilty, LanguageModel) else ""
    return LogitsError(
        f"rollout {rollout_id!r}, position {position}: {error}{hint}",
        model=error.model,
        row=error.row,
    )


def _sharing_pays(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> bool:
    """Whether running each distinct prompt once saves enough positions."""
    alone = sum(map(len, prompts)) + sum(map(len, responses))
    saved = sum(map(len, prompts)) - sum(map(len, set(map(tuple, prompts))))
    return saved >= SHARING_PAYS_FROM * alone


def _assemble(
    rollouts: pl.DataFrame, columns: Columns, texts: Callable[[Iterable[int]], Mapping[int, str]]
) -> pl.DataFrame:
    """The token table of some rollouts from the columns of their counted tokens."""
    labels = pl.lit(None, pl.String).repeat_by(pl.col("response_token_ids").list.len())
    base = (
        rollouts.select(
            "rollout_id",
            "prompt_id",
            "batch_id",
            "loss_mask",
            token_id="response_token_ids",
            position=pl.int_ranges(pl.col("response_token_ids").list.len(), dtype=pl.Int32),
            planted_label=pl.coalesce("planted_labels", labels).cast(
                pl.List(TokenTable.planted_label.dtype)
            ),
        )
        .filter(pl.col("position").list.len() > 0)
        .explode("loss_mask", "token_id", "position", "planted_label")
        .with_row_index("row")
    )
    known = list(texts(base["token_id"].unique()).items())
    names = pl.DataFrame(known, schema={"token_id": pl.Int32, "token": pl.String}, orient="row")
    base = base.join(names, on="token_id", how="left", maintain_order="left")
    schema = polars_schema(TokenTable)
    if PADDED_MASS in columns:
        schema[PADDED_MASS] = pl.Float32()
    statistics = [_series(name, column, schema[name]) for name, column in columns.items()]
    if statistics:
        counted = base.filter("loss_mask").select("row").hstack(statistics)
        base = base.join(counted, on="row", how="left", maintain_order="left")
    return base.select(
        pl.col(name) if name in base.columns else pl.lit(None, dtype).alias(name)
        for name, dtype in schema.items()
    )


def _series(name: str, column: Tensor, dtype: pl.DataType) -> pl.Series:
    """One column of statistics as polars holds it; what is undefined (NaN) is null."""
    values = column.numpy()
    if values.ndim == 2:
        return pl.Series(name, values).cast(dtype)
    series = pl.Series(name, values).cast(dtype)
    return series.fill_nan(None) if dtype.is_float() else series
