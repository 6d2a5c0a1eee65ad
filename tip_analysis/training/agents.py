"""Agents in training and evaluation: trajectories of the current student in an environment, as
training rollouts and as samples that are graded by the environment itself.

Writes rows of `evaluations/*.parquet` (`evaluate --environment`). Tokens that the environment said
are masked: they carry no loss and no statistics.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tip_analysis.core.errors import InputError, OptionError
from tip_analysis.core.names import UNNAMED_BENCHMARK, OnBadRow
from tip_analysis.core.progress import Advance, track
from tip_analysis.core.run_folder import Run
from tip_analysis.core.table_files import scan
from tip_analysis.models.token_model import TokenModel
from tip_analysis.rollouts.bad_rows import BadRows, as_bad_rows
from tip_analysis.rollouts.encoded import Rollout
from tip_analysis.rollouts.engines.engine import Engine
from tip_analysis.rollouts.environments.episodes import Asked, Episode, Limits, run_episodes
from tip_analysis.rollouts.environments.registry import EnvironmentSource
from tip_analysis.rollouts.environments.stage import ask_all, tasks_hashes
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Generation, Sampling
from tip_analysis.rollouts.stage import longest_sequence
from tip_analysis.training.evaluation import (
    PROBLEMS_PER_SHARD,
    Samples,
    evaluation_rows,
    summary_of,
)


@dataclass(frozen=True)
class Playground:
    """An environment, and the tasks in it that were encoded for a student."""

    source: EnvironmentSource
    tasks: Mapping[str, Asked]
    """By the id of their prompt."""
    limits: Limits = field(default_factory=Limits)
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def episodes(
        self,
        engine: Engine,
        jobs: Sequence[tuple[str, str]],
        sampling: Sampling,
        advance: Advance | None = None,
    ) -> list[Episode]:
        """One trajectory for each (name, prompt id).

        Raises:
            InputError: the chat template shows an earlier turn otherwise than it was written, which
                neither training nor evaluation can leave out.
        """
        found = run_episodes(
            engine,
            self.source,
            [(name, self.tasks[prompt_id]) for name, prompt_id in jobs],
            sampling,
            self.limits,
            chat_template_kwargs=self.chat_template_kwargs,
            advance=advance,
        )
        if refused := [one.refused for one in found if one.refused is not None]:
            raise InputError(refused[0])
        return found

    def rollouts(
        self, engine: Engine, jobs: Sequence[tuple[str, str]], sampling: Sampling
    ) -> list[Rollout]:
        """The same as training rollouts."""
        return [episode.rollout() for episode in self.episodes(engine, jobs, sampling)]


def sample_tasks(
    engine: Engine,
    playground: Playground,
    tasks: Sequence[Asked],
    *,
    num_samples: int,
    sampling: Sampling,
    benchmarks: Sequence[str] | None = None,
    advance: Advance | None = None,
) -> Samples:
    """`num_samples` trajectories of each task, with the rewards of the environment.

    Args:
        engine: the model, and what it writes with.
        playground: the environment.
        tasks: what it is to do.
        num_samples: k.
        sampling: temperature, nucleus and seed; the length limit counts what the environment says.
        benchmarks: the evaluation set of each task; by default one nameless set.
        advance: told of progress, in samples.

    Raises:
        OptionError: k is below 1.
    """
    if num_samples < 1:
        raise OptionError(f"--num-samples must be at least 1, found {num_samples}")
    jobs = [(f"evaluation/{task.id}/{i}", task.id) for task in tasks for i in range(num_samples)]
    episodes = playground.episodes(engine, jobs, sampling, advance)
    texts = engine.author.tokenizer.batch_decode(
        [episode.conversation.response for episode in episodes], skip_special_tokens=True
    )
    rewards = np.array([episode.reward.total for episode in episodes], dtype=np.float64)
    return Samples(
        [task.shown for task in tasks],
        benchmarks or [UNNAMED_BENCHMARK] * len(tasks),
        num_samples,
        [_generation(episode) for episode in episodes],
        texts,
        rewards.reshape(-1, num_samples),
        [None] * len(episodes),
        [json.dumps(dict(episode.reward.parts), ensure_ascii=False) for episode in episodes],
        [episode.num_turns for episode in episodes],
        [episode.rollout() for episode in episodes],
    )


def _generation(episode: Episode) -> Generation:
    """What the student wrote in all turns."""
    conversation = episode.conversation
    written = [
        (token, logprob)
        for token, logprob in zip(conversation.response, conversation.logprobs, strict=True)
        if logprob is not None
    ]
    return Generation(
        [token for token, _ in written], [logprob for _, logprob in written], episode.finish_reason
    )


def evaluate_agent(
    run: Run,
    *,
    model: TokenModel,
    engine: Engine,
    source: EnvironmentSource,
    prompts: Sequence[Prompt],
    benchmark: str,
    num_samples: int = 16,
    sampling: Sampling | None = None,
    limits: Limits | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    on_bad_row: BadRows | OnBadRow | str = OnBadRow.FAIL,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Evaluate a model in an environment; adds rows to `evaluations/`, keyed by configuration.

    Args:
        run: the run folder.
        model: the model to evaluate; without its weights where `engine` holds them.
        engine: what it writes with.
        source: the environment, which grades.
        prompts: its tasks.
        benchmark: what the set of tasks is called.
        num_samples: k, samples of each task.
        sampling: temperature, nucleus, length limit and seed; temperature 1 by default.
        limits: turns, and time of a step.
        chat_template_kwargs: switches for the chat template.
        on_bad_row: `fail`, or `skip`: a task that cannot be begun is left out and counted.
        overwrite: make the rows of this configuration again.

    Returns:
        The stage's summary: the fields of `accuracy.Accuracy`, counts, and the mean of each part of
        the reward.

    Raises:
        InputError: a task cannot be begun, or the environment does not keep the protocol.
    """
    sampling, limits = sampling or Sampling(), limits or Limits()
    bad_rows, switches = as_bad_rows(on_bad_row), dict(chat_template_kwargs or {})
    asked = ask_all(prompts, source, bad_rows, model, sampling, switches)
    engine.expect(longest_sequence([task.shown for task in asked], sampling))
    playground = Playground(source, {task.id: task for task in asked}, limits, switches)
    stage = run.begin(
        "evaluate",
        config={
            "model": model.describe(),
            "benchmark": benchmark,
            "num_samples": num_samples,
            **asdict(sampling),
            "chat_template_kwargs": switches,
            **source.identity(),
            **limits.identity(),
            **engine.identity(),
        },
        inputs=tasks_hashes([task.prompt for task in asked]),
        settings={**engine.facts(), **bad_rows.record()},
        overwrite=overwrite,
        additive=True,
    )
    shards = [
        asked[start : start + PROBLEMS_PER_SHARD]
        for start in range(0, len(asked), PROBLEMS_PER_SHARD)
    ]
    missing = stage.missing(len(shards))
    done = num_samples * (len(asked) - sum(len(shards[index]) for index in missing))
    with track("evaluating", num_samples * len(asked), unit="samples", done=done) as advance:
        for index in missing:
            samples = sample_tasks(
                engine,
                playground,
                shards[index],
                num_samples=num_samples,
                sampling=sampling,
                benchmarks=[benchmark] * len(shards[index]),
                advance=advance,
            )
            stage.write(index, evaluation_rows(samples, model=model.name, seed=sampling.seed))
    rows = scan([stage.path(index) for index in range(len(shards))]).collect()
    parts = mean_parts(rows["reward_parts"].to_list())
    turns = {"mean_turns": rows["num_turns"].mean()}
    return stage.finish(**summary_of(rows), **turns, reward_parts=parts, **bad_rows.summary())


def mean_parts(parts: Sequence[str | None]) -> dict[str, float]:
    """The mean of each part of the reward, over the samples that have it."""
    found: dict[str, list[float]] = {}
    for text in parts:
        for name, value in json.loads(text or "{}").items():
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in sorted(found.items())}
