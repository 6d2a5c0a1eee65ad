"""The whole of the main job on the embedded arithmetic pair, in a few minutes on a laptop.

Problems → rollouts of the flawed student → token table → quadrants → gradient norms → masks → a
short ablation → report. Since the student's errors are planted, the taxonomy can be checked: the
demo prints how many of them are found in Q3.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from tip_analysis.analysis.arms import arm_results
from tip_analysis.analysis.masks import write_masks
from tip_analysis.analysis.planted import planted_detection
from tip_analysis.analysis.quadrants import assign_quadrants, quadrant_shares
from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.taxonomy import Taxonomy
from tip_analysis.core.run_folder import Run, create_run
from tip_analysis.demo.arithmetic.language import problems
from tip_analysis.demo.arithmetic.tokenizer import MAX_LENGTH
from tip_analysis.gradients.settings import GradientSettings
from tip_analysis.gradients.stage import measure_run
from tip_analysis.models.loading import LanguageModel, load_model
from tip_analysis.report.build import ReportOptions, write_report
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.rollouts.stage import sample_rollouts
from tip_analysis.scoring.stage import Scorer, score_rollouts
from tip_analysis.training.ablation.presets import resolve_preset
from tip_analysis.training.ablation.problem_sets import load_evaluation_sets, load_prompts
from tip_analysis.training.ablation.study import run_ablation, study_from_preset

ENTROPY_CUT, DIVERGENCE_CUT = "0.3", "0.5"
"""The demo's cuts, in nats: a tiny model is nearly certain of most tokens, so ranks (a median) say
little of confidence."""

MAX_NEW_TOKENS = MAX_LENGTH - 12
RULES = (
    "all",
    "random",
    "entropy",
    "entropy_sampling",
    "soft_or",
    "soft_or_bottom",
    "q3",
    "divergence",
    "gradient_oracle",
)
RATIOS = (0.1, 0.2, 0.5)
GRADIENT_ROLLOUTS = 128
NUM_PROBES = 32
ABLATION_ARMS = ("all", "soft_or:0.5", "soft_or_bottom:0.5", "q3:0.1")
ABLATION_STEPS, ABLATION_PROBLEMS, ABLATION_SAMPLES = 40, 64, 8


@dataclass(frozen=True)
class DemoResult:
    """What the demo found, and where it lies."""

    shares: pl.DataFrame
    detection: pl.DataFrame
    arms: pl.DataFrame
    report: Path


def run_demo(
    folder: Path,
    report: Path,
    *,
    num_prompts: int = 192,
    num_rollouts: int = 4,
    seed: int = 0,
    token_budget: int = 16384,
    overwrite: bool = False,
    say: Callable[[str], Any] = lambda text: None,
) -> DemoResult:
    """Run every stage on the arithmetic pair; what is there already is kept.

    Args:
        folder: run folder.
        report: HTML file to write.
        num_prompts: problems.
        num_rollouts: rollouts of each.
        seed: of the sampling.
        token_budget: tokens a batch.
        overwrite: start afresh.
        say: told what comes next.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small lose more by handing work out than they gain
    try:
        run = create_run(folder)
        student, teacher = (
            load_model(f"arithmetic-{role}", device="cpu") for role in ("student", "teacher")
        )
        say("1/6 rollouts: the student solves problems")
        sampling, counts = Sampling(MAX_NEW_TOKENS, seed=seed), (num_prompts, num_rollouts)
        _sample(run, student, *counts, sampling, token_budget, overwrite=overwrite)
        say("2/6 scores: student and teacher on every token")
        score_rollouts(run, Scorer(student, teacher))
        say("3/6 gradients: norm and direction of every token's own loss")
        settings = GradientSettings(num_probes=NUM_PROBES, seed=seed)
        limit = min(GRADIENT_ROLLOUTS, num_prompts * num_rollouts)
        measure_run(run, student=student, teacher=teacher, settings=settings, limit=limit)
        say("4/6 masks: which tokens each rule selects")
        write_masks(run, rules=RULES, retention_ratios=RATIOS, seeds=(seed,))
        say("5/6 ablation: what training on the selected tokens does")
        arms = _ablate(run, seed)
    finally:
        torch.set_num_threads(threads)
    say("6/6 report")
    write_report([run.path], report, ReportOptions(Taxonomy(ENTROPY_CUT, DIVERGENCE_CUT)))
    scored = add_scores(run.tokens())
    placed = assign_quadrants(scored, entropy_cut=ENTROPY_CUT, divergence_cut=DIVERGENCE_CUT)
    return DemoResult(quadrant_shares(placed), planted_detection(placed), arm_results(arms), report)


def _ablate(run: Run, seed: int) -> pl.DataFrame:
    """A short ablation of the arithmetic preset: fewer steps, arms and problems, one seed."""
    preset = resolve_preset(
        "arithmetic", num_steps=ABLATION_STEPS, num_samples=ABLATION_SAMPLES, arms=ABLATION_ARMS
    )
    study = study_from_preset(
        preset,
        prompts=load_prompts(str(preset.prompts)),
        evaluation_prompts=load_evaluation_sets(preset.evaluation_sets, limit=ABLATION_PROBLEMS),
        device="cpu",
    )
    return run_ablation(run, study, arms=preset.parsed_arms(), seeds=(seed,))


def _sample(
    run: Run,
    student: LanguageModel,
    num_prompts: int,
    num_rollouts: int,
    sampling: Sampling,
    token_budget: int,
    *,
    overwrite: bool,
) -> Mapping[str, Any]:
    prompts = [
        Prompt(row["id"], problem=row["problem"], answer=row["answer"])
        for row in problems(num_prompts)
    ]
    return sample_rollouts(
        run,
        student=student,
        prompts=prompts,
        sampling=sampling,
        num_rollouts=num_rollouts,
        token_budget=token_budget,
        overwrite=overwrite,
    )
