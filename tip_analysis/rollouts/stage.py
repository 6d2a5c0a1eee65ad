"""Prompts to rollouts: render, sample, label, grade, shard by shard into a run folder.

Reads prompts (`prompts.Prompt`) and a student; writes `rollouts/*.parquet` (`schema.RolloutTable`).
Which tokens a rollout holds depends on the student, its prompt, its name and the seed, not on
batch, shard or what was sampled before.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from tip_analysis.core.atomic_files import file_hash
from tip_analysis.core.contract_checks import polars_schema
from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import IdsOrigin, OnBadRow, TemplateOrigin
from tip_analysis.core.progress import Advance, track
from tip_analysis.core.record import config_hash
from tip_analysis.core.run_folder import Run
from tip_analysis.core.schema import RolloutTable
from tip_analysis.core.toy_pairs import ToyPair, pair_with_vocabulary
from tip_analysis.models.batching import TokenBudget
from tip_analysis.models.loading import LanguageModel, tokenizer_fingerprint
from tip_analysis.models.token_model import TokenModel
from tip_analysis.rollouts.bad_rows import BadRows, as_bad_rows
from tip_analysis.rollouts.encoded import EncodedPrompt, encode_usable, with_room
from tip_analysis.rollouts.engines.engine import Engine, Request
from tip_analysis.rollouts.engines.hf import HFEngine
from tip_analysis.rollouts.grading import default_grader, grade, resolve_grader
from tip_analysis.rollouts.importers.formats import ImportReport
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.rendering import RenderedPrompt, resolve_template, unused_switches
from tip_analysis.rollouts.sampling import Generation, Sampling

logger = logging.getLogger(__name__)

ROLLOUTS_PER_SHARD = 64


def sample_rollouts(
    run: Run,
    *,
    student: TokenModel,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    engine: Engine | None = None,
    num_rollouts: int = 4,
    template: str = "plain",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    grader: str | None = None,
    prompts_per_batch: int = 8,
    token_budget: int = 16384,
    on_bad_row: BadRows | OnBadRow | str = OnBadRow.FAIL,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Sample `num_rollouts` rollouts of every prompt into `run`; what is there already is kept.

    Args:
        run: the run folder.
        student: the model that writes; without its weights where `engine` holds them.
        prompts: what it is asked.
        sampling: temperature, nucleus, length limit, seed.
        engine: what it writes with; by default this package's own sampler.
        num_rollouts: k, the rollouts of each prompt.
        template: the text around a problem: a name of `rendering.TEMPLATES`, or a text with
            `{problem}`.
        chat_template_kwargs: switches for the chat template, such as `enable_thinking`.
        grader: a name of `grading.GRADERS`, `module:function` or `file.py:function`; None chooses
            by the prompts.
        prompts_per_batch: prompts whose rollouts make one optimizer step: they share a `batch_id`.
        token_budget: tokens a batch of the own sampler, prompts and room for responses included.
        on_bad_row: `fail`, or `skip`: a prompt that the template refuses, or that leaves no room
            for a response, is left out and counted; or what counted rows of the file already.
        overwrite: start afresh, whatever the folder holds.

    Returns:
        The stage's summary, as `run.json` has it.

    Raises:
        ConfigurationMismatchError: the folder holds rollouts of another configuration.
        EngineError: the engine failed; whole shards are kept, and the command may be run again.
        ContextLengthError: a prompt leaves no room for `max_new_tokens`.
    """
    if num_rollouts < 1 or prompts_per_batch < 1:
        raise OptionError("--num-rollouts and --prompts-per-batch must be at least 1")
    engine = engine or own_sampler(student, token_budget)
    switches = dict(chat_template_kwargs or {})
    _warn_of_what_the_template_ignores(student, prompts, switches)
    bad_rows = as_bad_rows(on_bad_row)
    tasks = encode_usable(
        prompts, bad_rows, student=student, template=template, chat_template_kwargs=switches
    )
    tasks = with_room(tasks, bad_rows, student=student, max_new_tokens=sampling.max_new_tokens)
    prompts = [task.prompt for task in tasks]
    engine.expect(longest_sequence(tasks, sampling))
    grader = grader or _suitable_grader(student, prompts)
    resolve_grader(grader)
    stage = run.begin(
        "rollout",
        config={
            "student": student.describe(),
            "num_rollouts": num_rollouts,
            **asdict(sampling),
            "template": resolve_template(template),
            "chat_template_kwargs": switches,
            "grader": grader,
            "prompts_per_batch": prompts_per_batch,
            **engine.identity(),
        },
        inputs={"prompts": hash_of_prompts(prompts)},
        settings={**engine.facts(), "num_prompts": len(prompts), **bad_rows.record()},
        overwrite=overwrite,
    )
    shards = _jobs_by_shard(tasks, num_rollouts, prompts_per_batch, engine.rollouts_per_shard)
    missing = stage.missing(len(shards))
    done = sum(map(len, shards)) - sum(len(shards[index]) for index in missing)
    with track("sampling", num_rollouts * len(tasks), done=done) as advance:
        for index in missing:
            rows = _sample_shard(engine, shards[index], sampling, grader, advance)
            stage.write(index, rows)
    return stage.finish(**summarize(run), **bad_rows.summary())


def longest_sequence(prompts: Sequence[EncodedPrompt], sampling: Sampling) -> int:
    """Tokens of the longest prompt with the longest response."""
    return max((len(prompt.token_ids) for prompt in prompts), default=0) + sampling.max_new_tokens


def own_sampler(student: TokenModel, token_budget: int) -> HFEngine:
    """This package's own sampler.

    Raises:
        OptionError: the student has no weights.
    """
    if not isinstance(student, LanguageModel):
        raise OptionError(f"{student.name} is not loaded: name the engine that holds its weights")
    return HFEngine(student, TokenBudget(token_budget))


def _warn_of_what_the_template_ignores(
    student: TokenModel, prompts: Sequence[Prompt], switches: Mapping[str, Any]
) -> None:
    if unused := unused_switches(student.tokenizer, switches):
        logger.warning(
            "the chat template of %s does not use %s: nothing changes",
            student.name,
            ", ".join(unused),
        )
    if any(prompt.tools for prompt in prompts) and unused_switches(student.tokenizer, ["tools"]):
        logger.warning(
            "the chat template of %s does not show tools: the student is not told of those that the"
            " prompts name",
            student.name,
        )


def hash_of_prompts(prompts: Sequence[Prompt]) -> str:
    """Hash of all that decides what is shown and how it is graded; tools count where there are
    any."""
    return config_hash(
        [
            [p.id, p.problem, p.messages, p.answer, p.solution, *([p.tools] * bool(p.tools))]
            for p in prompts
        ]
    )


def _suitable_grader(student: TokenModel, prompts: Sequence[Prompt]) -> str:
    has_answer = any(prompt.answer is not None for prompt in prompts)
    return default_grader(has_answer=has_answer, is_toy=toy_pair_of(student) is not None)


@dataclass(frozen=True)
class _Job:
    """One rollout to sample."""

    task: EncodedPrompt
    batch_id: int
    sample: int

    @property
    def rollout_id(self) -> str:
        return f"{self.task.id}/{self.sample}"


def _jobs_by_shard(
    tasks: Sequence[EncodedPrompt], num_rollouts: int, prompts_per_batch: int, shard_size: int
) -> list[list[_Job]]:
    """The rollouts to sample, whole prompts to a shard, in the order of prompts and samples."""
    per_shard = max(1, shard_size // num_rollouts)
    return [
        [
            _Job(task, (start + place) // prompts_per_batch, sample)
            for place, task in enumerate(tasks[start : start + per_shard])
            for sample in range(num_rollouts)
        ]
        for start in range(0, len(tasks), per_shard)
    ]


def _sample_shard(
    engine: Engine, jobs: Sequence[_Job], sampling: Sampling, grader: str, advance: Advance
) -> pl.DataFrame:
    """The rollouts of one shard, in the order of its tasks and samples."""
    requests = [Request(job.rollout_id, job.task.token_ids) for job in jobs]
    generations = engine.generate(requests, sampling, advance)
    rows = [
        _row(engine, job, generation, sampling, grader)
        for job, generation in zip(jobs, generations, strict=True)
    ]
    return pl.DataFrame(rows, schema=polars_schema(RolloutTable))


def store_imported(
    run: Run,
    rollouts: pl.DataFrame,
    report: ImportReport,
    *,
    student: str,
    options: Mapping[str, Any],
    overwrite: bool = False,
) -> dict[str, Any]:
    """Put rollouts that another tool wrote (`importers.import_rollouts`) into a run folder, in
    place of sampled ones.

    Args:
        run: the run folder.
        rollouts: valid rows of the rollout table.
        report: what could not be recovered; becomes part of the record, and of every report made
            from it.
        student: the model that wrote them, as `load_model` takes it.
        options: how they were read, for the record.
        overwrite: start afresh, whatever the folder holds.

    Returns:
        The stage's summary.

    Raises:
        ConfigurationMismatchError: the folder holds other rollouts.
    """
    stage = run.begin(
        "rollout",
        config={"source": report.format, "student": {"name": student}, **options},
        inputs={path: file_hash(Path(path)) for path in report.files},
        overwrite=overwrite,
    )
    for index, start in enumerate(range(0, rollouts.height, ROLLOUTS_PER_SHARD)):
        if not stage.is_whole(index):
            stage.write(index, rollouts[start : start + ROLLOUTS_PER_SHARD])
    return stage.finish(**summarize(run), import_report=report.to_dict())


def _row(
    engine: Engine, job: _Job, generation: Generation, sampling: Sampling, grader: str
) -> dict[str, Any]:
    """One row of the rollout table."""
    student = engine.author
    task, prompt, token_ids = job.task, job.task.prompt, generation.token_ids
    text, bare_text = (
        str(student.tokenizer.decode(token_ids, skip_special_tokens=skip)) for skip in (False, True)
    )
    return {
        "rollout_id": job.rollout_id,
        "prompt_id": prompt.id,
        "sample_index": job.sample,
        "batch_id": job.batch_id,
        "source": "sampled",
        "engine": engine.kind,
        "messages": json.dumps(task.messages, ensure_ascii=False),
        "tools": json.dumps(prompt.tools, ensure_ascii=False) if prompt.tools else None,
        "prompt_text": task.shown.text,
        "prompt_token_ids": task.shown.token_ids,
        "response_text": text,
        "response_token_ids": token_ids,
        "loss_mask": [True] * len(token_ids),
        "sampled_logprobs": generation.logprobs,
        "finish_reason": generation.finish_reason,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": sampling.seed,
        "reward": grade(grader, bare_text, prompt.answer, prompt_text=task.shown.text),
        "ground_truth": prompt.answer,
        "solution": prompt.solution,
        "tokenizer_fingerprint": tokenizer_fingerprint(student.tokenizer),
        "ids_origin": IdsOrigin.EXACT.value,
        "template_origin": _template_origin(task.shown).value,
        "planted_labels": planted_labels(student, prompt, token_ids),
    }


def _template_origin(shown: RenderedPrompt) -> TemplateOrigin:
    return TemplateOrigin.EXACT if shown.is_chat else TemplateOrigin.NONE


def planted_labels(
    student: TokenModel, prompt: Prompt, token_ids: Sequence[int]
) -> list[str] | None:
    """The true label of each response token, for a student that speaks the language of a toy
    pair."""
    pair = toy_pair_of(student)
    if prompt.problem is None or pair is None:
        return None
    return list(
        pair.label_tokens(prompt.problem, student.tokenizer.convert_ids_to_tokens(list(token_ids)))
    )


def toy_pair_of(student: TokenModel) -> ToyPair | None:
    """The toy pair whose language a model speaks, so that its tokens have true labels; None for any
    other model."""
    return pair_with_vocabulary(student.tokenizer.get_vocab())


def summarize(run: Run) -> dict[str, Any]:
    """Counts of a run's rollouts: how many, how long, how they end, what they are worth."""
    rollouts = (
        run.rollouts()
        .select(
            "prompt_id",
            "finish_reason",
            "reward",
            num_tokens=pl.col("response_token_ids").list.len(),
        )
        .collect()
    )
    return {
        "num_prompts": rollouts["prompt_id"].n_unique(),
        "num_rollouts": rollouts.height,
        "num_tokens": int(rollouts["num_tokens"].sum()),
        "num_empty_rollouts": int((rollouts["num_tokens"] == 0).sum()),
        "finish_reasons": dict(Counter(rollouts["finish_reason"].to_list())),
        "num_graded": rollouts["reward"].count(),
        "mean_reward": rollouts["reward"].mean(),
    }
