"""`influence`: what a step on one group of tokens does to the loss of every token.

Rollouts in, `influences/*.parquet` (`instrument_tables.InfluenceTable`) out, shard by shard. Groups
are quadrants, or any grouping of `analysis.groupings`. For each group and fold one gradient, then
one forward-mode pass a group and rollout (`weighted_losses`); `analysis.influence_matrix` sums them
up. The gradients are made again when a stage goes on after an interruption.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import torch
from torch import Tensor

from tip_analysis.analysis.groupings import with_group, with_rewards
from tip_analysis.analysis.quadrants import assign_quadrants
from tip_analysis.analysis.taxonomy import DEFAULT_TAXONOMY, Taxonomy
from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.errors import OptionError, RunError
from tip_analysis.core.instrument_tables import InfluenceTable
from tip_analysis.core.names import Loss, Preconditioner, StopTokens
from tip_analysis.core.progress import track
from tip_analysis.core.run_folder import Run, RunLike, Stage, open_run
from tip_analysis.gradients.loss_gradients import Pair, prompt_folds
from tip_analysis.gradients.measuring import model_pair
from tip_analysis.gradients.run_models import (
    measured_rollouts,
    scored_config,
    scored_pair,
    teacher_context,
)
from tip_analysis.gradients.scopes import ParameterScope, parameter_scope
from tip_analysis.gradients.weighted_losses import (
    Gradient,
    Source,
    SourceGradients,
    adam_preconditioner,
    fold_weights,
    source_gradients,
    stream_products,
)
from tip_analysis.models.named import ModelLike
from tip_analysis.rollouts.encoded import Rollout

ROLLOUTS_PER_SHARD = 16
QUADRANT = "quadrant"
WHOLE = "all"
"""L itself, where norms are named."""
LARGEST_IN_MEMORY = 1 << 24
"""Bytes of a scope whose gradients are kept in memory; those of larger ones lie on disk."""


def influence(
    run: RunLike,
    *,
    grouping: str = QUADRANT,
    preconditioner: Preconditioner | str = Preconditioner.NONE,
    params: str = "all",
    loss: Loss | str = Loss.REVERSE_KL,
    taxonomy: Taxonomy = DEFAULT_TAXONOMY,
    seed: int = 0,
    limit: int | None = None,
    student: ModelLike | None = None,
    teacher: ModelLike | None = None,
    dtype: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
) -> pl.DataFrame:
    """Measure what a step on each group of tokens does to every token's loss, cross-fitted over
    prompts.

    Args:
        run: a run folder with scored tokens.
        grouping: `quadrant`, or a name of `analysis.groupings.GROUPINGS`.
        preconditioner: `none` (gradient descent) or `adam`.
        params: parameters that count: `all`, `body`, `head`, `last:N`, `lora`.
        loss: the per-token loss.
        taxonomy: whose cuts make the quadrants.
        seed: of the two folds of prompts.
        limit: the first so many rollouts only.
        student: the model that was scored, where it is loaded already.
        teacher: likewise.
        dtype: of models that are loaded.
        device: likewise.
        overwrite: measure again what this configuration has measured.

    Returns:
        Rows of `InfluenceTable`; `influence_matrix` sums them up by group.

    Raises:
        RunError: the run is not scored.
        UnknownNameError, SchemaError: no such grouping, or the run lacks what it reads.
        ModelError: forward mode does not see all parameters.

    Example:
        tip.influence_matrix(tip.influence("runs/mine"))
    """
    if limit is not None and limit < 1:
        raise OptionError(f"--limit must be at least 1, found {limit}")
    folder, preconditioner, loss = open_run(run), Preconditioner(preconditioner), Loss(loss)
    if scored_config(folder).get("stop_tokens") == StopTokens.MERGED:
        raise OptionError(
            f"{folder.path} was scored with --stop-tokens merged, but gradients are those of the"
            " loss with declared stop tokens; score with --stop-tokens declared first"
        )
    groups = _groups(folder, grouping, taxonomy, limit)
    key = {
        "grouping": grouping,
        "preconditioner": preconditioner,
        "param_scope": params,
        "loss": loss,
        "seed": seed,
    }
    context = {"limit": limit, "teacher_context": teacher_context(folder)}
    asked = {"taxonomy": taxonomy.arguments()} if grouping == QUADRANT else {}
    stage = folder.begin(
        "influence",
        key=key,
        config=key | context | asked,
        inputs={name: folder.table_hash(name) for name in ("rollouts", "tokens")},
        overwrite=overwrite,
    )
    ids = groups["rollout_id"].unique(maintain_order=True).to_list()
    num_shards = -(-len(ids) // ROLLOUTS_PER_SHARD)
    if stage.missing(num_shards):
        pair = model_pair(*scored_pair(folder, student, teacher, dtype=dtype, device=device))
        scope = parameter_scope(pair.student.model, pair.student.head, params)
        work = _Work(pair, scope, measured_rollouts(folder, pair, ids), groups, loss, seed)
        work.fill(stage, key, _batches(folder), preconditioner)
    rows = pl.concat([pl.read_parquet(stage.path(i), glob=False) for i in range(num_shards)])
    stage.finish(num_tokens=rows.select("rollout_id", "position").n_unique())
    return rows


def _groups(run: Run, grouping: str, taxonomy: Taxonomy, limit: int | None) -> pl.DataFrame:
    """rollout_id, position, group of every written token that has one, in the order of the run."""
    tokens = run.tokens().filter("loss_mask")
    if limit is not None:
        first = run.rollouts().select("rollout_id").head(limit)
        tokens = tokens.join(first, on="rollout_id", how="semi", maintain_order="left")
    if grouping == QUADRANT:
        cuts = taxonomy.measure(run.tokens())
        placed = assign_quadrants(tokens, cuts=cuts).drop_nulls("quadrant").collect()
        named = placed.with_columns(group=pl.col("quadrant").cast(pl.String))
    else:
        named = with_group(with_rewards(tokens, run.rollouts()).collect(), grouping)
    if named.is_empty():
        raise RunError(f"{run.path}: no token has a group of {grouping!r}")
    return named.select("rollout_id", "position", "group")


def _batches(run: Run) -> dict[str, int]:
    return dict(run.rollouts().select("rollout_id", "batch_id").collect().iter_rows())


class _Work:
    """The rollouts, with the weight of every token in L and its group."""

    def __init__(
        self,
        pair: Pair,
        scope: ParameterScope,
        rollouts: Sequence[Rollout],
        groups: pl.DataFrame,
        loss: Loss,
        seed: int,
    ) -> None:
        self.pair, self.scope, self.rollouts = pair, scope, rollouts
        self.loss, self.seed = loss, seed
        self.folds = prompt_folds([rollout.prompt_id for rollout in rollouts], seed)
        self.group_of = {
            str(name): dict(part.select("position", "group").iter_rows())
            for (name,), part in groups.group_by("rollout_id")
        }
        self.names = sorted(groups["group"].unique())
        shares = {
            rollout.rollout_id: torch.full(
                (rollout.num_tokens,), 1.0 / rollout.num_tokens, dtype=torch.float64
            )
            for rollout in rollouts
        }
        self.weights = fold_weights(rollouts, self.folds, shares)

    def sources(self) -> list[Source]:
        """The loss of each group: L's own weights at its tokens."""
        return [Source(name, self._part(name), self.loss) for name in self.names]

    def _part(self, group: str) -> dict[str, Tensor]:
        parts = {}
        for rollout in self.rollouts:
            known = self.group_of[rollout.rollout_id]
            inside = torch.tensor([known.get(t) == group for t in rollout.positions])
            parts[rollout.rollout_id] = self.weights[rollout.rollout_id] * inside
        return parts

    def fill(
        self,
        stage: Stage,
        key: Mapping[str, Any],
        batch_of: Mapping[str, int],
        preconditioner: Preconditioner,
    ) -> None:
        """Write every shard that is missing."""
        shards = [
            self.rollouts[start : start + ROLLOUTS_PER_SHARD]
            for start in range(0, len(self.rollouts), ROLLOUTS_PER_SHARD)
        ]
        missing = stage.missing(len(shards))
        factors = None
        if preconditioner is Preconditioner.ADAM:
            whole = Source(WHOLE, self.weights, self.loss)
            factors = adam_preconditioner(self.pair, self.scope, self.rollouts, whole, batch_of)
        with TemporaryDirectory(prefix="tip-analysis-") as place:
            on_disk = self.scope.num_bytes > LARGEST_IN_MEMORY
            found = self.gradients(factors, Path(place) if on_disk else None)
            facts = {"norms": group_norms(found, self.names, self.scope)}
            wanted = [rollout for index in missing for rollout in shards[index]]
            frames = self.rows(found, wanted, key)
            with track("influence", len(wanted)) as advance:
                for index in missing:
                    parts = []
                    for _ in shards[index]:
                        parts.append(next(frames))
                        advance(1)
                    stage.write(index, pl.concat(parts), **facts)

    def gradients(self, factors: Gradient | None, folder: Path | None) -> SourceGradients:
        """∇L_a of every group, from each fold."""
        return source_gradients(
            self.pair,
            self.scope,
            self.rollouts,
            self.sources(),
            seed=self.seed,
            folder=folder,
            precondition=factors,
        )

    def rows(
        self, found: SourceGradients, rollouts: Sequence[Rollout], key: Mapping[str, Any]
    ) -> Iterator[pl.DataFrame]:
        """Rows of `InfluenceTable`, one frame a rollout."""
        for rollout, positions, products in stream_products(
            self.pair, self.scope, rollouts, found, (self.loss,)
        ):
            along = products.get(self.loss, {})
            frames = [self._frame(rollout, positions, source, along, key) for source in self.names]
            yield pl.concat(frames)

    def _frame(
        self,
        rollout: Rollout,
        positions: Sequence[int],
        source: str,
        along: Mapping[str, Tensor],
        key: Mapping[str, Any],
    ) -> pl.DataFrame:
        value = along.get(source)
        known = self.group_of[rollout.rollout_id]
        columns = {
            **{name: str(entry) for name, entry in key.items() if name != "seed"},
            "seed": key["seed"],
            "source": source,
            "rollout_id": rollout.rollout_id,
            "position": list(positions),
            "prompt_id": rollout.prompt_id,
            "fold": self.folds[rollout.prompt_id],
            "group": [known.get(t) for t in positions],
            "weight": self.weights[rollout.rollout_id].numpy(),
            "grad_dot_source": None if value is None else value.cpu().numpy(),
        }
        frame = pl.DataFrame(columns, schema=polars_schema(InfluenceTable), strict=False)
        return frame.drop_nulls("group").with_columns(pl.col("grad_dot_source").fill_nan(None))


def group_norms(
    found: SourceGradients, names: Sequence[str], scope: ParameterScope
) -> dict[str, list[float]]:
    """‖P ∇L_a‖ of each group in both folds, and of their sum L, for the record."""
    norms = {
        name: [found.stored[name, fold].scale if (name, fold) in found.stored else 0.0
               for fold in (0, 1)]
        for name in names
    }  # fmt: skip
    return norms | {WHOLE: [_norm_of_sum(found, names, fold, scope) for fold in (0, 1)]}


def _norm_of_sum(
    found: SourceGradients, names: Sequence[str], fold: int, scope: ParameterScope
) -> float:
    square = 0.0
    for key, parameter in scope.parameters.items():
        total = torch.zeros_like(parameter, dtype=torch.float64, requires_grad=False)
        for name in names:
            if (direction := found.stored.get((name, fold))) is not None:
                total += direction.tensor(key, total) * direction.scale
        square += float(total.square().sum())
    return square**0.5
