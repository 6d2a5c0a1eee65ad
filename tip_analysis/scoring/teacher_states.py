"""The teacher's phase of a scoring in two, for pairs that do not fit together: its side of every
counted token, stored.

Reads `rollouts/*.parquet`; writes `teacher_states/*.safetensors`, shard for shard as the token
table, with their hashes and a signature (teacher, its head, context, rollouts, shard size, form) in
`run.json`, which the student's phase checks.

- `hidden`: last hidden states [N, D] in the body's own dtype. The student's phase loads the
  teacher's head alone and rebuilds the very logits: the table is that of one pass.
- `topk`: the K most likely tokens with their log-probabilities, and the mass of the tail. What the
  teacher's row says on its own (entropy, top-k, the sampled token's log-probability …) is kept
  beside and stays exact. A divergence takes the tail as one token, which is the same as a tail
  shaped like the student's: by the data-processing inequality a *lower bound* (`LOWER_BOUNDS`).
  Numbers without such a bound are null (`NOT_STORED`).
"""

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tip_analysis.core.atomic_files import made_in_a_folder
from tip_analysis.core.errors import (
    ConfigurationMismatchError,
    LogitsError,
    ModelError,
    OptionError,
    RunError,
)
from tip_analysis.core.names import TeacherContext, TeacherStoreForm
from tip_analysis.core.progress import track
from tip_analysis.core.run_folder import Run, Stage
from tip_analysis.logits.blocks import Columns, in_blocks
from tip_analysis.logits.row_statistics import rows_per_block, token_statistics
from tip_analysis.models.batching import TokenBudget
from tip_analysis.models.loading import LanguageModel, weights_fingerprint
from tip_analysis.models.output_head import HEAD_TOLERANCE, OutputHead
from tip_analysis.models.token_model import TokenModel
from tip_analysis.rollouts.encoded import Rollout
from tip_analysis.rollouts.teacher_prompts import num_shards, prepare_rollouts, shards_of_part
from tip_analysis.scoring.scorer import (
    HiddenSide,
    counted_states,
    counted_tokens,
    in_batches,
    located,
)
from tip_analysis.scoring.top_k_side import OF_THE_TEACHER, TopKSide, marks_of

if TYPE_CHECKING:
    from tip_analysis.scoring.scorer import Scorer

_NUM_CHECKED = 256


def store_teacher_states(
    run: Run,
    teacher: LanguageModel,
    *,
    form: TeacherStoreForm | str = TeacherStoreForm.HIDDEN,
    store_k: int = 64,
    vocab_size: int | None = None,
    teacher_context: TeacherContext | str = TeacherContext.NONE,
    shard_size: int = 64,
    budget: TokenBudget | None = None,
    part: tuple[int, int] = (0, 1),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Store the teacher's side of every counted token of `run`; shards that are whole already are
    left alone.

    Args:
        run: a run folder with rollouts.
        teacher: the teacher.
        form: `hidden` (exact) or `topk` (smaller where K is far below D; divergences become lower
            bounds).
        store_k: K of `topk`.
        vocab_size: |V| that student and teacher share; `topk` needs it where the student's head has
            fewer rows.
        teacher_context: as for `scoring.score_rollouts`.
        shard_size: rollouts a shard; the student's phase takes the same.
        budget: tokens a batch. The same in both phases gives the table of one pass to the last bit.
        part: (i, n): make only every n-th shard, from the i-th on.
        overwrite: start afresh.

    Returns:
        The stage's summary, as `run.json` has it.

    Raises:
        ConfigurationMismatchError: states of another configuration lie there.
        LogitsError: the teacher answers NaN or +inf; names rollout and position.
    """
    form, teacher_context = TeacherStoreForm(form), TeacherContext(teacher_context)
    if store_k < 1:
        raise OptionError(f"--store-k must be at least 1, found {store_k}")
    mine = shards_of_part(run, shard_size, part)
    rollouts = prepare_rollouts(run, None, teacher, teacher_context)
    size = min(teacher.vocab_size, vocab_size or teacher.vocab_size)
    top_k = (
        {"store_k": min(store_k, size), "shared_vocabulary": size}
        if form is TeacherStoreForm.TOPK
        else {}
    )
    budget = budget or TokenBudget(16384)
    stage = run.begin(
        "teacher",
        config={
            "teacher": teacher.describe(),
            "head_fingerprint": weights_fingerprint(teacher.head.linear),
            "teacher_context": teacher_context,
            "shard_size": shard_size,
            "form": form,
            **top_k,
        },
        inputs={"rollouts": run.table_hash("rollouts")},
        settings={"device": str(teacher.device), "token_budget": budget.tokens},
        overwrite=overwrite,
    )
    shards = {index: rollouts[index * shard_size : (index + 1) * shard_size] for index in mine}
    _store_missing(stage, teacher, shards, budget, top_k)
    return _finish(run, stage, shard_size)


def _store_missing(
    stage: Stage,
    teacher: LanguageModel,
    shards: dict[int, pl.DataFrame],
    budget: TokenBudget,
    top_k: dict[str, int],
) -> None:
    """Write the shards that are not whole."""
    missing = [index for index in shards if not stage.is_whole(index)]
    total = sum(shard.height for shard in shards.values())
    done = total - sum(shards[index].height for index in missing)
    with track("teacher's pass", total, done=done) as advance:
        for index in missing:
            columns = in_batches(
                shards[index], budget, lambda rows: _side(teacher, rows, top_k), advance
            )
            _write(stage, index, columns, teacher.head)


@torch.no_grad()
def _side(teacher: LanguageModel, rows: Sequence[Rollout], top_k: dict[str, int]) -> Columns:
    """What is stored of one batch's counted tokens."""
    hidden = counted_states(teacher, rows, teacher=True)
    if not top_k:
        return {"hidden": hidden.cpu()}
    token_ids, size = counted_tokens(rows), top_k["shared_vocabulary"]

    def block(part: slice) -> Columns:
        logits = teacher.head(hidden[part])[:, :size]
        return _summary(logits, token_ids[part].to(logits.device), top_k["store_k"])

    try:
        columns = in_blocks(len(token_ids), rows_per_block(size, device=hidden.device), block)
    except LogitsError as error:
        raise located(error, rows, {"teacher": teacher}) from error
    return {name: column.cpu() for name, column in columns.items()}


def _summary(logits: Tensor, token_ids: Tensor, k: int) -> Columns:
    """The teacher's own columns with its k most likely tokens, and ln of the mass of all others,
    `log_tail_mass` [N]."""
    try:
        # Against itself, so that the numbers are those which the same function reads in one pass.
        columns = token_statistics(student=logits, teacher=logits, token_ids=token_ids, top_k=k)
    except LogitsError as error:
        message = str(error).replace("student logits", "teacher logits")
        raise LogitsError(message, model="teacher", row=error.row) from error
    kept = {name: columns[name] for name in OF_THE_TEACHER}
    wide = logits.to(kept["teacher_entropy"].dtype)
    rest = wide.scatter(1, kept["teacher_topk_ids"], -math.inf)
    kept["teacher_topk_ids"] = kept["teacher_topk_ids"].int()
    return kept | {"log_tail_mass": rest.logsumexp(-1) - wide.logsumexp(-1)}


def _write(stage: Stage, index: int, columns: Columns, head: OutputHead) -> None:
    num_rows = len(next(iter(columns.values()))) if columns else 0
    tensors = {name: column.contiguous() for name, column in columns.items()}
    facts = {}
    if "hidden" in tensors:
        tensors["checked_logits"] = _some_logits(head, tensors["hidden"])
    elif num_rows:
        facts = {"tail_mass": float(tensors["log_tail_mass"].double().exp().sum())}

    def write(part: Path) -> None:
        with made_in_a_folder(part) as path:
            save_file(tensors, path)
        part.chmod(
            stage.run.record_path.stat().st_mode
        )  # safetensors lets none but the owner read it

    stage.write_file(index, write, num_rows=num_rows, **facts)


def _finish(run: Run, stage: Stage, shard_size: int) -> dict[str, Any]:
    total = num_shards(run, shard_size)
    if missing := stage.missing(total):
        return {"num_shards": total, "num_shards_missing": len(missing)}
    shards = stage.shards()
    num_tokens = sum(shard["num_rows"] for shard in shards)
    summary: dict[str, Any] = {
        "num_shards": total,
        "num_tokens": num_tokens,
        "num_bytes": sum(stage.path(index).stat().st_size for index in range(total)),
    }
    if num_tokens and any("tail_mass" in shard for shard in shards):
        summary["mean_tail_mass"] = (
            sum(shard.get("tail_mass", 0.0) for shard in shards) / num_tokens
        )
    return stage.finish(**summary)


class TeacherStore:
    """What the teacher's phase left in a run folder."""

    def __init__(self, run: Run) -> None:
        record = run.stages().get("teacher")
        if record is None:
            raise RunError(
                f"{run.path} holds no teacher's states: `tip-analysis score {run.path} --teacher"
                " MODEL --phase teacher` stores them"
            )
        self.stage = run.stage("teacher")
        self.run = run
        self.config: dict[str, Any] = record["config"]
        self.rollouts_hash: str = record["inputs"]["rollouts"]

    @property
    def teacher(self) -> dict[str, Any]:
        """The teacher, as `LanguageModel.describe` told it."""
        return self.config["teacher"]

    def marks(self) -> dict[str, Any]:
        """What the token table's record says of columns that are not exact."""
        if self.config["form"] == TeacherStoreForm.HIDDEN:
            return {}
        return {
            "teacher_store": {name: self.config[name] for name in ("form", "store_k")},
            **marks_of(OF_THE_TEACHER),
        }

    def facts(self) -> dict[str, Any]:
        """Nothing besides."""
        return {}

    def require(self, **expected: Any) -> None:
        """Refuse states that were made otherwise than is asked for now.

        Args:
            **expected: `teacher` (its name), `teacher_context`, `shard_size`.

        Raises:
            ConfigurationMismatchError: says what differs.
        """
        found = self.config | {"teacher": self.teacher["name"]}
        differing = [
            f"{name}: {found[name]!r} → {value!r}"
            for name, value in expected.items()
            if found[name] != value
        ]
        if self.rollouts_hash != self.run.table_hash("rollouts"):
            differing.append("the rollouts have changed since")
        if differing:
            raise ConfigurationMismatchError(
                f"{self.run.path}: the teacher's states were stored with another configuration:"
                f" {'; '.join(differing)}. Use the same options, or store them again with --phase"
                " teacher --overwrite"
            )

    def check(self, scorer: "Scorer") -> None:
        """Refuse a head that is not the stored teacher's, and a vocabulary or top-k that the states
        cannot serve.

        Raises:
            ModelError, RunError, OptionError: says what differs.
        """
        if weights_fingerprint(head_of(scorer.teacher).linear) != self.config["head_fingerprint"]:
            raise ModelError(
                f"the output head of {scorer.teacher.name} is not that of the teacher whose states"
                " are stored: store them again with --phase teacher --overwrite"
            )
        if self.config["form"] == TeacherStoreForm.HIDDEN:
            return
        if self.config["shared_vocabulary"] != scorer.vocab_size:
            raise RunError(
                f"the stored top-k is over {self.config['shared_vocabulary']} tokens, but student"
                f" and teacher share {scorer.vocab_size}: store it again with --phase teacher"
                f" --student {scorer.student.name} --overwrite"
            )
        if scorer.top_k > self.config["store_k"]:
            raise OptionError(
                f"--top-k {scorer.top_k} is more than the {self.config['store_k']} tokens that are"
                " stored"
            )

    def shard(self, index: int, rollouts: pl.DataFrame, scorer: "Scorer") -> "ShardStates":
        """The states of one shard's rollouts.

        Raises:
            RunError: they are missing, altered, or do not belong to these rollouts.
            ModelError: the head does not answer as the teacher's did.
        """
        if not self.stage.is_whole(index):
            raise RunError(
                f"{self.stage.path(index)} is missing, altered or discarded: run `score` with"
                " --phase teacher again, which makes it again"
            )
        return ShardStates(self, index, rollouts, head_of(scorer.teacher))

    def discard(self) -> None:
        """Delete the states; how they were made stays on record, so that the same command may run
        again."""
        self.run.discard("teacher", keep_record=True)
        folder = self.stage.path(0).parent
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


class ShardStates:
    """The stored states of one shard; rows are read as they are asked for."""

    def __init__(
        self, store: TeacherStore, index: int, rollouts: pl.DataFrame, head: OutputHead
    ) -> None:
        self._path = store.stage.path(index)
        self._head = head
        counts = rollouts["loss_mask"].list.sum().to_list()
        ends = list(accumulate(counts))
        self._rows = {
            name: slice(end - count, end)
            for name, end, count in zip(rollouts["rollout_id"].to_list(), ends, counts, strict=True)
        }
        self._check(sum(counts))

    @cached_property
    def _file(self) -> Any:
        return safe_open(self._path, framework="pt")

    @torch.no_grad()
    def _check(self, num_rows: int) -> None:
        names = set(self._file.keys())
        stored = next(
            (self._file.get_slice(name).get_shape()[0] for name in names - {"checked_logits"}), 0
        )
        if stored != num_rows:
            raise RunError(
                f"{self._path} holds {stored} rows, but its rollouts have {num_rows} counted tokens"
            )
        if "checked_logits" not in names:
            return
        expected = self._file.get_tensor("checked_logits")
        found = _some_logits(self._head, self._file.get_slice("hidden")[:1])
        scale = expected.abs().max().clamp(min=1e-6)
        dtype: Any = self._head.linear.weight.dtype
        if not bool((found - expected).abs().max() / scale <= HEAD_TOLERANCE[dtype]):
            raise ModelError(
                "the teacher's head does not give the logits that the teacher gave when its states"
                " were stored"
            )

    def side(self, rollout_ids: Sequence[str]) -> "HiddenSide | TopKSide":
        """The teacher's side of the counted tokens of these rollouts, one after another."""
        rows = [self._rows[name] for name in rollout_ids]
        columns = {
            name: torch.cat([self._file.get_slice(name)[part] for part in rows])
            for name in self._file.keys()  # noqa: SIM118 - not a dictionary
            if name != "checked_logits"
        }
        return (
            HiddenSide(columns["hidden"], self._head)
            if "hidden" in columns
            else TopKSide(columns, OF_THE_TEACHER)
        )


def head_of(teacher: TokenModel) -> OutputHead:
    """The teacher's head, which a store of hidden states needs."""
    if not isinstance(teacher, LanguageModel):
        raise OptionError(f"{teacher.name} has no output head here, which stored states need")
    return teacher.head


def _some_logits(head: OutputHead, hidden: Tensor) -> Tensor:
    """A few evenly spaced logits of the first row, float32: tells one head from another."""
    logits = head(hidden[:1].to(head.device)).float().cpu()
    return logits[:, :: max(1, logits.shape[1] // _NUM_CHECKED)].contiguous()
