"""Small runs of the arithmetic pair for tests of the instruments: seconds, not minutes."""

from functools import cache
from pathlib import Path

import torch

from tip_analysis.core.run_folder import Run, create_run
from tip_analysis.demo.arithmetic.language import problems
from tip_analysis.gradients.settings import GradientSettings
from tip_analysis.gradients.stage import measure_run
from tip_analysis.models.loading import LanguageModel, load_model
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.rollouts.stage import sample_rollouts
from tip_analysis.scoring.stage import Scorer, score_rollouts

MAX_NEW_TOKENS = 116


@cache
def arithmetic_pair() -> tuple[LanguageModel, LanguageModel]:
    """Student and teacher."""
    return load_model("arithmetic-student", device="cpu"), load_model(
        "arithmetic-teacher", device="cpu"
    )


def arithmetic_run(
    folder: Path, *, num_prompts: int = 8, num_rollouts: int = 2, gradients: bool = False
) -> Run:
    """Rollouts and tokens, and gradients of 4 probes where they are asked for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run, (student, teacher) = create_run(folder), arithmetic_pair()
        prompts = [
            Prompt(row["id"], problem=row["problem"], answer=row["answer"])
            for row in problems(num_prompts)
        ]
        sampling = Sampling(MAX_NEW_TOKENS)
        sample_rollouts(
            run, student=student, prompts=prompts, sampling=sampling, num_rollouts=num_rollouts
        )
        score_rollouts(run, Scorer(student, teacher, compile=False))
        if gradients:
            settings = GradientSettings(losses=("reverse_kl",), num_probes=4)
            measure_run(run, student=student, teacher=teacher, settings=settings)
    finally:
        torch.set_num_threads(threads)
    return run
