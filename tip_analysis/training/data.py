"""Where the rollouts of a training step come from: the current student (`OnPolicyRollouts`) or a
run folder (`FixedRollouts`).

Which prompts a step takes, and every random number of their rollouts, is a pure function of (seed,
step, prompt, sample). Arms of an ablation that share a seed therefore see the same prompts and
common random numbers, and a resumed training goes on as an uninterrupted one would.

Reads `rollouts/*.parquet` and `masks/*.parquet` (or `tokens/*.parquet`, from which a mask is made
where none was stored).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl

from tip_analysis.analysis.masks import candidates, reads_quadrants
from tip_analysis.analysis.rules import rule as rule_of
from tip_analysis.analysis.selection import select_tokens
from tip_analysis.analysis.taxonomy import CutOptions
from tip_analysis.analysis.weightings import NO_WEIGHTING, weigh_tokens, weighting_of
from tip_analysis.core.errors import OptionError, RunError, VocabularyMismatchError
from tip_analysis.core.names import Scope, SelectionScope
from tip_analysis.core.run_folder import Run
from tip_analysis.models.batching import TokenBudget
from tip_analysis.models.loading import LanguageModel, tokenizer_fingerprint
from tip_analysis.rollouts.encoded import EncodedPrompt, Rollout, rollouts_in_memory
from tip_analysis.rollouts.engines.engine import Engine, Request
from tip_analysis.rollouts.engines.hf import HFEngine
from tip_analysis.rollouts.engines.sampled import sampled_rollout
from tip_analysis.rollouts.sampling import Sampling, uniforms
from tip_analysis.training.agents import Playground
from tip_analysis.training.processes import ALONE, Processes

logger = logging.getLogger(__name__)


def prompts_of_step(
    prompt_ids: Sequence[str], step: int, prompts_per_step: int, seed: int
) -> list[int]:
    """Indices of the prompts that a step takes: each epoch is a new order, and a remainder that
    fills no step is left out.

    Raises:
        OptionError: there are fewer prompts than a step takes.
    """
    if len(prompt_ids) < prompts_per_step:
        raise OptionError(
            f"a step takes {prompts_per_step} prompts, but there are {len(prompt_ids)}: lower"
            " prompts_per_step"
        )
    steps_per_epoch = len(prompt_ids) // prompts_per_step
    epoch, index = divmod(step, steps_per_epoch)
    order = np.argsort(uniforms(seed, f"order of epoch {epoch}", len(prompt_ids)), kind="stable")
    return order[index * prompts_per_step : (index + 1) * prompts_per_step].tolist()


@dataclass(frozen=True)
class OnPolicyRollouts:
    """Fresh rollouts of the student as it is at each step."""

    prompts: Sequence[EncodedPrompt]
    sampling: Sampling
    prompts_per_step: int
    rollouts_per_prompt: int
    budget: TokenBudget
    """Tokens a batch of the sampler may hold, room for the response included."""
    engine: Engine | None = None
    """What the student writes with, given its weights before each step; by default this package's
    own sampler."""
    playground: Playground | None = None
    """The environment that the student acts in, where it is to act over several turns."""
    processes: Processes = ALONE
    """Each of them writes its part of a step's rollouts."""

    def rollouts(self, step: int, student: LanguageModel) -> list[Rollout]:
        """The rollouts of one step: prompts × samples, named `step/prompt_id/sample_index`."""
        chosen = prompts_of_step(
            [p.id for p in self.prompts], step, self.prompts_per_step, self.sampling.seed
        )
        jobs = [
            (self.prompts[index], sample)
            for index in chosen
            for sample in range(self.rollouts_per_prompt)
        ]
        names = [f"{step}/{prompt.id}/{sample}" for prompt, sample in jobs]
        written = [prompt for prompt, _ in jobs]
        engine = self.engine or HFEngine(student, self.budget)
        engine.update(student)
        if self.playground is not None:
            acting = [(name, prompt.id) for name, prompt in zip(names, written, strict=True)]
            return self.playground.rollouts(engine, acting, self.sampling)
        requests = [
            Request(name, prompt.token_ids) for name, prompt in zip(names, written, strict=True)
        ]
        generations = self.processes.spread(
            requests, lambda part: engine.generate(part, self.sampling)
        )
        return [
            sampled_rollout(prompt, name, generation)
            for prompt, name, generation in zip(written, names, generations, strict=True)
        ]


@dataclass(frozen=True)
class FixedRollouts:
    """The rollouts of a run folder, the same ones epoch after epoch: off-policy from the second
    step on."""

    by_prompt: Mapping[str, list[Rollout]]
    prompts_per_step: int
    seed: int
    masks: Mapping[str, np.ndarray]
    """Selected positions of each rollout, [R] bool; a rollout without an entry has none."""
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What each response token weighs, [R] ≥ 0; a rollout without an entry weighs 1 a token."""

    def rollouts(self, step: int, student: LanguageModel) -> list[Rollout]:
        """The rollouts of `prompts_per_step` prompts (all of them, where there are fewer)."""
        names = list(self.by_prompt)
        chosen = prompts_of_step(names, step, min(self.prompts_per_step, len(names)), self.seed)
        return [rollout for index in chosen for rollout in self.by_prompt[names[index]]]

    def mask(self, rollout: Rollout) -> np.ndarray:
        """Which tokens of a rollout carry loss, [R] bool."""
        return self.masks.get(rollout.rollout_id, np.zeros(len(rollout.response), dtype=bool))

    def weight(self, rollout: Rollout) -> np.ndarray:
        """What each token of a rollout weighs, [R]."""
        return self.weights.get(rollout.rollout_id, np.ones(len(rollout.response)))

    def changed(
        self,
        rollouts: Sequence[Rollout],
        selected: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
    ) -> "FixedRollouts":
        """The same with other masks and weights, given for the written tokens of each rollout."""
        return replace(
            self,
            masks={r.rollout_id: _spread(r, s) for r, s in zip(rollouts, selected, strict=True)},
            weights={r.rollout_id: _spread(r, w) for r, w in zip(rollouts, weights, strict=True)},
        )

    def all_rollouts(self) -> list[Rollout]:
        """Every rollout, by prompt."""
        return [rollout for rollouts in self.by_prompt.values() for rollout in rollouts]

    def steps_per_epoch(self) -> int:
        """Optimizer steps that show each prompt once."""
        return max(1, len(self.by_prompt) // self.prompts_per_step)


def _spread(rollout: Rollout, values: np.ndarray) -> np.ndarray:
    """Values of the written tokens over all response tokens, 0 elsewhere."""
    spread = np.zeros(len(rollout.response), dtype=values.dtype)
    spread[rollout.written] = values
    return spread


def fixed_rollouts(
    run: Run,
    student: LanguageModel,
    *,
    rule: str,
    retention_ratio: float,
    selection_scope: SelectionScope | str,
    mask_seed: int,
    prompts_per_step: int,
    seed: int,
    normalization_scope: Scope | str = Scope.RUN,
    divergence_clip: float | None = None,
    weighting: str = NO_WEIGHTING,
    cuts: CutOptions | None = None,
) -> FixedRollouts:
    """The rollouts of a run, one of its masks, and what their tokens weigh.

    The mask is that of `masks/` where the run has it, else made from `tokens/` by the same
    function. `all` needs neither. Weights are always made from `tokens/` (and `gradients/`).

    Raises:
        RunError: the run has no rollouts, or no tokens where a mask must be made.
        VocabularyMismatchError: the rollouts hold the token ids of another tokenizer.
    """
    table = run.rollouts().collect()
    ours = tokenizer_fingerprint(student.tokenizer)
    if foreign := table.filter(pl.col("tokenizer_fingerprint") != ours)["rollout_id"].to_list():
        raise VocabularyMismatchError(
            f"rollout {foreign[0]!r} holds token ids of another tokenizer than that of"
            f" {student.name}"
        )
    by_prompt: dict[str, list[Rollout]] = {}
    for rollout in rollouts_in_memory(table):
        if rollout.num_tokens:
            by_prompt.setdefault(rollout.prompt_id, []).append(rollout)
    if not by_prompt:
        raise RunError(
            f"{run.path}: no rollout has a token that the student wrote; there is nothing to"
            " train on"
        )
    every = [rollout for rollouts in by_prompt.values() for rollout in rollouts]
    key = {
        "rule": rule,
        "retention_ratio": retention_ratio,
        "selection_scope": SelectionScope(selection_scope),
        "seed": mask_seed,
    }
    how = _How(normalization_scope, divergence_clip, cuts or {})
    if rule_of(rule).keeps_all:
        masks = {rollout.rollout_id: rollout.written for rollout in every}
    else:
        masks = _masks_by_rollout(_selected_positions(run, key, how), every)
    weights = {}
    if weighting != NO_WEIGHTING:
        weights = _weights_by_rollout(_weights(run, weighting, key, how), every)
    return FixedRollouts(by_prompt, prompts_per_step, seed, masks, weights)


@dataclass(frozen=True)
class _How:
    """How the tokens of a run are scored and put into quadrants."""

    normalization_scope: Scope | str
    divergence_clip: float | None
    cuts: CutOptions

    def candidates(self, run: Run, *, needs_gradients: bool, quadrants: bool) -> pl.LazyFrame:
        found = candidates(
            run,
            needs_gradients=needs_gradients,
            normalization_scope=self.normalization_scope,
            divergence_clip=self.divergence_clip,
            cuts=self.cuts if quadrants else None,
        )
        return found.scored


def _weights(run: Run, weighting: str, key: Mapping[str, Any], how: _How) -> pl.DataFrame:
    """(rollout_id, position, weight) of the tokens of a run.

    Raises:
        RunError: the run has no token table, or no gradients where the weighting needs them.
    """
    if not run.has("tokens"):
        raise RunError(
            f"{run.path} has no token table to make the weights {weighting!r} from: `tip-analysis"
            f" score {run.path} …` makes one"
        )
    kind = weighting_of(weighting)
    quadrants = "quadrant" in kind.columns or reads_quadrants(key["rule"])
    scored = how.candidates(run, needs_gradients=kind.needs_gradients, quadrants=quadrants)
    weighed = weigh_tokens(scored, weighting=weighting, **key)
    return weighed.filter("loss_mask").select("rollout_id", "position", "weight").collect()


def _weights_by_rollout(table: pl.DataFrame, rollouts: Sequence[Rollout]) -> dict[str, np.ndarray]:
    """[R] of each rollout; tokens that the table does not hold weigh nothing."""
    weights = {rollout.rollout_id: np.zeros(len(rollout.response)) for rollout in rollouts}
    for (rollout_id,), group in table.group_by("rollout_id"):
        if str(rollout_id) in weights:
            weights[str(rollout_id)][group["position"].to_numpy()] = group["weight"].to_numpy()
    return weights


def _selected_positions(run: Run, key: Mapping[str, Any], how: _How) -> pl.DataFrame:
    """(rollout_id, position) of a mask: the stored one, else one made from the token table."""
    if run.has("masks"):
        names = [
            "rule",
            "selection_scope",
            *(["seed"] if rule_of(key["rule"]).has_seed else []),
        ]  # others have one mask
        same = [pl.col(name).cast(pl.String) == str(key[name]) for name in names]
        same.append(pl.col("retention_ratio") == key["retention_ratio"])
        stored = run.masks().filter(*same).select("rollout_id", "position").collect()
        if stored.height:
            return stored
    if not run.has("tokens"):
        raise RunError(
            f"{run.path} has neither the mask {json.dumps(dict(key))} nor a token table to make it"
            f" from: `tip-analysis score {run.path} …` makes one"
        )
    logger.info(
        "%s holds no mask %s: it is made from the token table", run.path, json.dumps(dict(key))
    )
    scored = how.candidates(
        run,
        needs_gradients=rule_of(key["rule"]).needs_gradients,
        quadrants=reads_quadrants(key["rule"]),
    )
    chosen = select_tokens(scored, **key).filter("selected")
    return chosen.select("rollout_id", "position").collect()


def _masks_by_rollout(
    positions: pl.DataFrame, rollouts: Sequence[Rollout]
) -> dict[str, np.ndarray]:
    lengths = {rollout.rollout_id: len(rollout.response) for rollout in rollouts}
    masks = {}
    for (rollout_id,), group in positions.group_by("rollout_id"):
        if rollout_id in lengths:
            mask = np.zeros(lengths[str(rollout_id)], dtype=bool)
            mask[group["position"].to_numpy()] = True
            masks[str(rollout_id)] = mask
    return masks
