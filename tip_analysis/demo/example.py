"""A run to try things on, for notebooks: the one that is named, the demo's, or a small one made on
the spot.

torch is loaded only where a run has to be made.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from tip_analysis.core.run_folder import Run, create_run, open_run

DEMO = Path("runs") / "demo"
RULES = ("all", "random", "entropy", "soft_or", "q3", "gradient_oracle")
RATIOS = (0.1, 0.2, 0.5)
ARMS = ("all", "soft_or:0.5", "q3:0.1")

_made: list[tuple[TemporaryDirectory[str], Run]] = []


def example_run(variable: str = "TIP_RUN") -> Run:
    """The run folder that the environment variable names, else `runs/demo` here or one folder up,
    else a small run made now.

    A run that is made lies in a temporary folder until this process ends; asked again, the same one
    is given.

    Raises:
        RunError: the variable names a folder that holds no run.
    """
    if named := os.environ.get(variable):
        return open_run(named)
    for folder in (Path.cwd(), Path.cwd().parent):
        if (folder / DEMO / "run.json").is_file():
            return open_run(folder / DEMO)
    if not _made:
        print(
            f"There is no {DEMO} here (`make demo` makes it): making a small run, which takes about"
            " half a minute."
        )
        folder = TemporaryDirectory(prefix="tip-analysis-example-")
        _made.append((folder, make_small_run(Path(folder.name) / "small")))
    return _made[0][1]


def make_small_run(
    folder: Path, *, num_prompts: int = 24, num_rollouts: int = 4, seed: int = 0
) -> Run:
    """Every stage of the demo on the arithmetic pair, with few prompts, probes and steps: enough to
    draw from, not to conclude.

    Args:
        folder: run folder; what is there already is kept.
        num_prompts: problems.
        num_rollouts: rollouts of each.
        seed: of sampling, probes and training.
    """
    import torch

    from tip_analysis.analysis.masks import write_masks
    from tip_analysis.demo.arithmetic.language import problems
    from tip_analysis.demo.arithmetic.tokenizer import MAX_LENGTH
    from tip_analysis.gradients.settings import GradientSettings
    from tip_analysis.gradients.stage import measure_run
    from tip_analysis.models.loading import load_model
    from tip_analysis.rollouts.prompts import Prompt
    from tip_analysis.rollouts.sampling import Sampling
    from tip_analysis.rollouts.stage import sample_rollouts
    from tip_analysis.scoring.stage import Scorer, score_rollouts

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small lose more by handing work out than they gain
    try:
        run = create_run(folder)
        student, teacher = (
            load_model(f"arithmetic-{role}", device="cpu") for role in ("student", "teacher")
        )
        prompts = [
            Prompt(row["id"], problem=row["problem"], answer=row["answer"])
            for row in problems(num_prompts)
        ]
        sampling = Sampling(MAX_LENGTH - 12, seed=seed)
        sample_rollouts(
            run, student=student, prompts=prompts, sampling=sampling, num_rollouts=num_rollouts
        )
        score_rollouts(run, Scorer(student, teacher))
        settings = GradientSettings(num_probes=16, seed=seed)
        measure_run(
            run,
            student=student,
            teacher=teacher,
            settings=settings,
            limit=min(32, num_prompts * num_rollouts),
        )
        write_masks(run, rules=RULES, retention_ratios=RATIOS, seeds=(seed,))
        _train_arms(run, seed)
    finally:
        torch.set_num_threads(threads)
    return run


def _train_arms(run: Run, seed: int) -> None:
    """An ablation of a few steps, on a few problems."""
    from tip_analysis.training.ablation.presets import resolve_preset
    from tip_analysis.training.ablation.problem_sets import load_evaluation_sets, load_prompts
    from tip_analysis.training.ablation.study import run_ablation, study_from_preset

    preset = resolve_preset("arithmetic", num_steps=4, num_samples=2, arms=ARMS)
    study = study_from_preset(
        preset,
        prompts=load_prompts(str(preset.prompts)),
        evaluation_prompts=load_evaluation_sets(preset.evaluation_sets, limit=32),
        device="cpu",
    )
    run_ablation(run, study, arms=preset.parsed_arms(), seeds=(seed,))
