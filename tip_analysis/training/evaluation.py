"""Evaluation: sample k answers to each problem, grade them, keep every sample.

Writes `evaluations/*.parquet` (`schema.EvaluationTable`), one row per sample, from which `accuracy`
takes mean@k, Best@k and paired differences without any model. Which tokens a sample holds depends
on the model, its problem and the seed only, so models that are evaluated under one seed see common
random numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from tip_analysis.analysis.accuracy import accuracy, rewards_by_problem, truncated_share
from tip_analysis.analysis.repeated_samples import sample_metrics
from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.errors import OptionError, PromptFileError
from tip_analysis.core.names import UNNAMED_BENCHMARK, FinishReason, OnBadRow
from tip_analysis.core.progress import Advance, track
from tip_analysis.core.record import config_hash
from tip_analysis.core.run_folder import Run
from tip_analysis.core.schema import EvaluationTable
from tip_analysis.core.table_files import scan
from tip_analysis.models.token_model import TokenModel
from tip_analysis.rollouts.bad_rows import BadRows, as_bad_rows
from tip_analysis.rollouts.encoded import EncodedPrompt, Rollout, encode_usable, with_room
from tip_analysis.rollouts.engines.engine import Engine, Request
from tip_analysis.rollouts.engines.sampled import sampled_rollout
from tip_analysis.rollouts.grading import answer_in, grade, resolve_grader
from tip_analysis.rollouts.prompts import Prompt, usable_prompts
from tip_analysis.rollouts.rendering import resolve_template
from tip_analysis.rollouts.sampling import Generation, Sampling
from tip_analysis.rollouts.stage import longest_sequence, own_sampler
from tip_analysis.training.processes import ALONE, Processes

PROBLEMS_PER_SHARD = 32


@dataclass(frozen=True)
class Samples:
    """The samples of some problems, in the order of problems and then samples."""

    problems: Sequence[EncodedPrompt]
    benchmarks: Sequence[str]
    """The evaluation set of each problem."""
    num_samples: int
    generations: Sequence[Generation]
    texts: Sequence[str]
    rewards: np.ndarray
    """[P, k] float64."""
    answers: Sequence[str | None]
    """The answer in each text, where the grader reads one."""
    reward_parts: Sequence[str | None] = ()
    """What each reward is made of, as JSON; none without an environment."""
    num_turns: Sequence[int | None] = ()
    """Turns of each; none without an environment."""
    rollouts: Sequence[Rollout] = ()
    """Of several turns, with what their environment said; none without one."""

    def first_rollouts(self) -> list[Rollout]:
        """The first sample of each problem, as a rollout."""
        if self.rollouts:
            return list(self.rollouts[:: self.num_samples])
        first = self.generations[:: self.num_samples]
        return [sampled_rollout(p, p.id, g) for p, g in zip(self.problems, first, strict=True)]

    @property
    def num_tokens(self) -> list[int]:
        """Tokens of each response."""
        return [len(generation.token_ids) for generation in self.generations]

    @property
    def truncated(self) -> list[bool]:
        """Whether the length limit cut each response off."""
        return [generation.finish_reason == FinishReason.LENGTH for generation in self.generations]

    def by_benchmark(self) -> "list[Samples]":
        """The samples of each benchmark, in the order in which they come."""
        return [self._of(name) for name in dict.fromkeys(self.benchmarks)]

    def _of(self, benchmark: str) -> "Samples":
        problems = [i for i, name in enumerate(self.benchmarks) if name == benchmark]
        samples = [i * self.num_samples + j for i in problems for j in range(self.num_samples)]
        return Samples(
            [self.problems[i] for i in problems],
            [benchmark] * len(problems),
            self.num_samples,
            [self.generations[i] for i in samples],
            [self.texts[i] for i in samples],
            self.rewards[problems],
            [self.answers[i] for i in samples],
            [self.reward_parts[i] for i in samples] if self.reward_parts else (),
            [self.num_turns[i] for i in samples] if self.num_turns else (),
            [self.rollouts[i] for i in samples] if self.rollouts else (),
        )


def sample_problems(
    engine: Engine,
    problems: Sequence[EncodedPrompt],
    *,
    num_samples: int,
    sampling: Sampling,
    grader: str,
    benchmarks: Sequence[str] | None = None,
    advance: Advance | None = None,
    processes: Processes = ALONE,
) -> Samples:
    """Sample and grade `num_samples` responses to each problem.

    Args:
        engine: the model, and what it writes with.
        problems: what it is asked.
        num_samples: k.
        sampling: temperature (1.0 in the paper), length limit and seed.
        grader: name of a grader.
        benchmarks: the evaluation set of each problem; by default one nameless set.
        advance: told of progress, in samples.
        processes: each of them writes its part of the samples.

    Raises:
        PromptFileError: the grader has no verdict on some response.
    """
    if num_samples < 1:
        raise OptionError(f"--num-samples must be at least 1, found {num_samples}")
    jobs = [(problem, index) for problem in problems for index in range(num_samples)]
    requests = [
        Request(f"evaluation/{problem.id}/{index}", problem.token_ids) for problem, index in jobs
    ]
    ordered = processes.spread(requests, lambda part: engine.generate(part, sampling, advance))
    texts = engine.author.tokenizer.batch_decode(
        [generation.token_ids for generation in ordered], skip_special_tokens=True
    )
    rewards = [
        grade(grader, text, problem.answer or "", prompt_text=problem.shown.text)
        for text, (problem, _) in zip(texts, jobs, strict=True)
    ]
    if None in rewards:
        problem = jobs[rewards.index(None)][0]
        raise PromptFileError(
            f"the grader {grader!r} has no verdict on a response to {problem.id!r}; choose another"
            " grader"
        )
    return Samples(
        problems,
        benchmarks or [UNNAMED_BENCHMARK] * len(problems),
        num_samples,
        ordered,
        texts,
        np.array(rewards, dtype=np.float64).reshape(-1, num_samples),
        [answer_in(grader, text) for text in texts],
    )


def evaluation_rows(samples: Samples, *, model: str, seed: int) -> pl.DataFrame:
    """Samples as rows of the evaluation table."""
    names = [
        (problem.id, index) for problem in samples.problems for index in range(samples.num_samples)
    ]
    rows = {
        "model": [model] * len(names),
        "benchmark": np.repeat(list(samples.benchmarks), samples.num_samples).tolist(),
        "problem_id": [name for name, _ in names],
        "sample_index": [index for _, index in names],
        "reward": samples.rewards.reshape(-1).tolist(),
        "answer": list(samples.answers),
        "reward_parts": samples.reward_parts or [None] * len(names),
        "num_turns": samples.num_turns or [None] * len(names),
        "num_tokens": samples.num_tokens,
        "finish_reason": [str(generation.finish_reason) for generation in samples.generations],
        "response_text": list(samples.texts),
        "seed": [seed] * len(names),
    }
    return pl.DataFrame(rows, schema=polars_schema(EvaluationTable))


def evaluate_model(
    run: Run,
    *,
    model: TokenModel,
    prompts: Sequence[Prompt],
    engine: Engine | None = None,
    num_samples: int = 16,
    sampling: Sampling | None = None,
    template: str = "plain",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    grader: str = "math",
    token_budget: int = 65_536,
    on_bad_row: BadRows | OnBadRow | str = OnBadRow.FAIL,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Evaluate a model on one benchmark; adds rows to `evaluations/`, keyed by configuration.

    Args:
        run: the run folder.
        model: the model to evaluate; without its weights where `engine` holds them.
        prompts: problems with answers, all of one benchmark.
        engine: what it writes with; by default this package's own sampler.
        num_samples: k, samples of each problem.
        sampling: temperature, nucleus, length limit and seed; temperature 1 by default.
        template: the text around a problem.
        chat_template_kwargs: switches for the chat template.
        grader: name of a grader.
        token_budget: tokens a batch of the own sampler, room for responses included.
        on_bad_row: `fail`, or `skip`: a problem that cannot be used is left out and counted; or
            what counted rows of the file already.
        overwrite: make the rows of this configuration again.

    Returns:
        The stage's summary: the fields of `accuracy.Accuracy`, and counts.

    Raises:
        PromptFileError: a prompt has no answer, or cannot be shown to the model.
        OptionError: the prompts are of several benchmarks.
        ContextLengthError: a prompt leaves no room for the response.
    """
    sampling = sampling or Sampling()
    engine = engine or own_sampler(model, token_budget)
    resolve_grader(grader)
    benchmark = _only_benchmark(prompts)
    bad_rows = as_bad_rows(on_bad_row)
    asked = usable_prompts(prompts, "prompts", stem="", needs_answer=True, on_bad_row=bad_rows)
    problems = encode_usable(
        asked, bad_rows, student=model, template=template, chat_template_kwargs=chat_template_kwargs
    )
    problems = with_room(problems, bad_rows, student=model, max_new_tokens=sampling.max_new_tokens)
    asked = [problem.prompt for problem in problems]
    engine.expect(longest_sequence(problems, sampling))
    stage = run.begin(
        "evaluate",
        config={
            "model": model.describe(),
            "benchmark": benchmark,
            "num_samples": num_samples,
            **asdict(sampling),
            "template": resolve_template(template),
            "chat_template_kwargs": dict(chat_template_kwargs or {}),
            "grader": grader,
            **engine.identity(),
        },
        inputs={"prompts": config_hash([[p.id, p.problem, p.messages, p.answer] for p in asked])},
        settings={**engine.facts(), **bad_rows.record()},
        overwrite=overwrite,
        additive=True,
    )
    shards = [
        problems[start : start + PROBLEMS_PER_SHARD]
        for start in range(0, len(problems), PROBLEMS_PER_SHARD)
    ]
    missing = stage.missing(len(shards))
    done = num_samples * (len(problems) - sum(len(shards[index]) for index in missing))
    with track("evaluating", num_samples * len(problems), unit="samples", done=done) as advance:
        for index in missing:
            samples = sample_problems(
                engine,
                shards[index],
                num_samples=num_samples,
                sampling=sampling,
                grader=grader,
                benchmarks=[benchmark] * len(shards[index]),
                advance=advance,
            )
            stage.write(index, evaluation_rows(samples, model=model.name, seed=sampling.seed))
    rows = scan([stage.path(index) for index in range(len(shards))]).collect()
    return stage.finish(**summary_of(rows), **bad_rows.summary())


def _only_benchmark(prompts: Sequence[Prompt]) -> str:
    """The benchmark of all of these.

    Raises:
        OptionError: there are several, or no prompts.
    """
    names = list(dict.fromkeys(prompt.benchmark for prompt in prompts))
    if len(names) != 1:
        raise OptionError(
            f"one evaluation takes the problems of one benchmark; found {len(names)}"
            f" ({', '.join(names)}): evaluate each by itself"
        )
    return names[0]


def summary_of(rows: pl.DataFrame) -> dict[str, Any]:
    """What an evaluation's rows come to, for the record."""
    found = {
        name: None if value != value else value
        for name, value in asdict(accuracy(rewards_by_problem(rows))).items()
    }
    table = sample_metrics(rows)
    own = table.filter(pl.col("metric").str.contains("^(?:pass|majority)@"))
    ends = table.select("metric", "low", "high").iter_rows()
    return found | {
        **dict(own.select("metric", "value").iter_rows()),
        "intervals": {metric: [low, high] for metric, low, high in ends},
        "num_tokens": int(rows["num_tokens"].sum()),
        "truncated_share": truncated_share(rows),
    }
