"""Tasks to trajectories: `rollout --environment`, shard by shard into a run folder.

Reads prompts and a student; writes `rollouts/*.parquet` (`schema.RolloutTable`), one row per
trajectory: the response is everything after the first prompt, and `loss_mask` is false for what the
student did not write. A shard is whole or absent; one that was interrupted is sampled again, with
the same tokens.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import polars as pl

from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.errors import InputError, OptionError
from tip_analysis.core.names import IdsOrigin, OnBadRow, TemplateOrigin
from tip_analysis.core.progress import track
from tip_analysis.core.record import config_hash, jsonable
from tip_analysis.core.run_folder import Run
from tip_analysis.core.schema import RolloutTable
from tip_analysis.models.loading import tokenizer_fingerprint
from tip_analysis.models.token_model import TokenModel
from tip_analysis.rollouts.bad_rows import BadRows, as_bad_rows
from tip_analysis.rollouts.encoded import with_room
from tip_analysis.rollouts.engines.engine import Engine
from tip_analysis.rollouts.environments.episodes import Asked, Episode, Limits, ask, run_episodes
from tip_analysis.rollouts.environments.registry import EnvironmentSource
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.rollouts.stage import (
    hash_of_prompts,
    longest_sequence,
    own_sampler,
    planted_labels,
    summarize,
)

logger = logging.getLogger(__name__)


def sample_trajectories(
    run: Run,
    *,
    student: TokenModel,
    source: EnvironmentSource,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    limits: Limits | None = None,
    engine: Engine | None = None,
    num_rollouts: int = 4,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    prompts_per_batch: int = 8,
    token_budget: int = 16384,
    on_bad_row: BadRows | OnBadRow | str = OnBadRow.FAIL,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Sample `num_rollouts` trajectories of every task into `run`; what is there already is kept.

    Args:
        run: the run folder.
        student: the model that writes; without its weights where `engine` holds them.
        source: the environment.
        prompts: its tasks.
        sampling: temperature, nucleus and seed; `max_new_tokens` is the longest response, what the
            environment says included.
        limits: turns, and time of a step.
        engine: what the student writes with; by default this package's own sampler.
        num_rollouts: k, the rollouts of each task.
        chat_template_kwargs: switches for the chat template.
        prompts_per_batch: tasks whose rollouts make one optimizer step.
        token_budget: tokens a batch of the own sampler.
        on_bad_row: `fail`, or `skip`: a task that cannot be begun is left out and counted.
        overwrite: start afresh, whatever the folder holds.

    Returns:
        The stage's summary; `refused_rollouts` names those that the template shows otherwise than
        they were written.

    Raises:
        ConfigurationMismatchError: the folder holds rollouts of another configuration.
        ContextLengthError: a task leaves no room for the response.
        InputError: the environment does not keep the protocol, or no trajectory can be used.
    """
    if num_rollouts < 1 or prompts_per_batch < 1:
        raise OptionError("--num-rollouts and --prompts-per-batch must be at least 1")
    limits = limits or Limits()
    engine = engine or own_sampler(student, token_budget)
    switches = dict(chat_template_kwargs or {})
    bad_rows = as_bad_rows(on_bad_row)
    asked = ask_all(prompts, source, bad_rows, student, sampling, switches)
    engine.expect(longest_sequence([one.shown for one in asked], sampling))
    stage = run.begin(
        "rollout",
        config={
            "student": student.describe(),
            "num_rollouts": num_rollouts,
            **asdict(sampling),
            "chat_template_kwargs": switches,
            "prompts_per_batch": prompts_per_batch,
            **source.identity(),
            **limits.identity(),
            **engine.identity(),
        },
        inputs=tasks_hashes([one.prompt for one in asked]),
        settings={
            **engine.facts(),
            "num_prompts": len(asked),
            "step_timeout_s": limits.step_timeout_s,
            **bad_rows.record(),
        },
        overwrite=overwrite,
    )
    shards = _shards(asked, num_rollouts, engine.rollouts_per_shard)
    missing = stage.missing(len(shards))
    done = num_rollouts * (len(asked) - sum(len(shards[index]) for index in missing))
    with track("sampling", num_rollouts * len(asked), done=done) as advance:
        for index in missing:
            jobs = [(f"{one.id}/{i}", one) for _, one in shards[index] for i in range(num_rollouts)]
            episodes = run_episodes(
                engine,
                source,
                jobs,
                sampling,
                limits,
                chat_template_kwargs=switches,
                advance=advance,
            )
            batches = {one.id: place // prompts_per_batch for place, one in shards[index]}
            rows, refused = _table(engine, source, episodes, batches, sampling)
            stage.write(index, rows, refused=refused)
    refused = [name for shard in stage.shards() for name in shard.get("refused", [])]
    if len(refused) == num_rollouts * len(asked):
        raise InputError(
            "no trajectory can be used: the chat template shows earlier turns otherwise than they"
            " were written in all of them; --on-rewrite record keeps them"
        )
    return stage.finish(**summarize(run), refused_rollouts=refused, **bad_rows.summary())


def tasks_hashes(prompts: Sequence[Prompt]) -> dict[str, str]:
    """Hashes of tasks: an environment may read every field of a row."""
    fields = config_hash([[prompt.id, jsonable(dict(prompt.metadata))] for prompt in prompts])
    return {"prompts": hash_of_prompts(prompts), "task_fields": fields}


def ask_all(
    prompts: Sequence[Prompt],
    source: EnvironmentSource,
    bad_rows: BadRows,
    student: TokenModel,
    sampling: Sampling,
    switches: Mapping[str, Any],
    **how: Any,
) -> list[Asked]:
    """Tasks as token ids that leave room for a response; what is done with others, `bad_rows`
    decides.

    Raises:
        InputError: a task cannot be begun and is not to be skipped, or none can.
        ContextLengthError: one leaves no room.
    """
    asked: dict[str, Asked] = {}
    problem = None
    for prompt in prompts:
        try:
            asked[prompt.id] = ask(
                prompt,
                source,
                student=student,
                seed=sampling.seed,
                chat_template_kwargs=switches,
                **how,
            )
        except InputError as found:
            bad_rows(found)
            problem = problem or found
    if problem is not None and not asked:
        raise problem
    shown = [one.shown for one in asked.values()]
    kept = with_room(shown, bad_rows, student=student, max_new_tokens=sampling.max_new_tokens)
    return [asked[one.id] for one in kept]


def _shards(
    asked: Sequence[Asked], num_rollouts: int, shard_size: int
) -> list[list[tuple[int, Asked]]]:
    """Tasks with their places, whole tasks to a shard."""
    per_shard = max(1, shard_size // num_rollouts)
    placed = list(enumerate(asked))
    return [placed[start : start + per_shard] for start in range(0, len(placed), per_shard)]


def _table(
    engine: Engine,
    source: EnvironmentSource,
    episodes: Sequence[Episode],
    batches: Mapping[str, int],
    sampling: Sampling,
) -> tuple[pl.DataFrame, list[str]]:
    """The rows of one shard, and the names of what was refused."""
    rows, refused = [], []
    for episode in episodes:
        if episode.refused is not None:
            logger.warning("left out: %s", episode.refused)
            refused.append(episode.name)
            continue
        rows.append(_row(engine, source, episode, batches[episode.asked.id], sampling))
    return pl.DataFrame(rows, schema=polars_schema(RolloutTable)), refused


def _row(
    engine: Engine, source: EnvironmentSource, episode: Episode, batch_id: int, sampling: Sampling
) -> dict[str, Any]:
    """One row of the rollout table."""
    student, asked, conversation = engine.author, episode.asked, episode.conversation
    shown, ids = asked.shown, conversation.response
    tools = shown.prompt.tools
    return {
        "rollout_id": episode.name,
        "prompt_id": asked.id,
        "sample_index": int(episode.name.rpartition("/")[2]),
        "batch_id": batch_id,
        "source": "sampled",
        "engine": engine.kind,
        "environment": source.name,
        "messages": json.dumps(shown.messages, ensure_ascii=False),
        "tools": json.dumps(tools, ensure_ascii=False) if tools else None,
        "prompt_text": shown.shown.text,
        "prompt_token_ids": shown.token_ids,
        "response_text": str(student.tokenizer.decode(ids, skip_special_tokens=False)),
        "response_token_ids": ids,
        "loss_mask": conversation.loss_mask,
        "turn_starts": conversation.turn_starts,
        "conversation_match": conversation.match,
        "sampled_logprobs": conversation.logprobs,
        "finish_reason": episode.finish_reason,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": sampling.seed,
        "reward": episode.reward.total,
        "reward_parts": json.dumps(dict(episode.reward.parts), ensure_ascii=False),
        "ground_truth": asked.prompt.answer,
        "solution": asked.prompt.solution,
        "tokenizer_fingerprint": tokenizer_fingerprint(student.tokenizer),
        "ids_origin": IdsOrigin.EXACT.value,
        "template_origin": TemplateOrigin.EXACT.value,
        "planted_labels": planted_labels(student, asked.prompt, ids),
    }
