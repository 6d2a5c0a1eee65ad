"""What a scorer is given: rollouts in shards, with the prompts that the teacher is shown; refuses
what cannot be scored."""

import json
from collections.abc import Mapping
from typing import Any

import polars as pl

from tip_analysis.core.errors import OptionError, RunError, VocabularyMismatchError
from tip_analysis.core.names import TeacherContext
from tip_analysis.core.run_folder import Run
from tip_analysis.models.hidden_states import check_context
from tip_analysis.models.loading import LanguageModel, tokenizer_fingerprint
from tip_analysis.models.token_model import TokenModel
from tip_analysis.rollouts.rendering import render, teacher_messages, with_tools


def prepare_rollouts(
    run: Run,
    student: LanguageModel | None,
    teacher: TokenModel,
    teacher_context: TeacherContext | str,
) -> pl.DataFrame:
    """The run's rollouts, each with the prompt that the teacher is shown.

    Args:
        run: a run folder with rollouts.
        student: the student; None where only the teacher is at hand, which must share its
            token-to-id map.
        teacher: the teacher.
        teacher_context: `none` or `solution`, see `with_teacher_prompts`.

    Raises:
        VocabularyMismatchError: the rollouts hold token ids of another tokenizer, or ids that are
            no token; names rollout and position.
        ContextLengthError: a rollout is longer than a model's context.
    """
    rollouts = run.rollouts().collect()
    reader = student or teacher
    ours = tokenizer_fingerprint(reader.tokenizer)
    if foreign := rollouts.filter(pl.col("tokenizer_fingerprint") != ours)["rollout_id"].to_list():
        raise VocabularyMismatchError(
            f"rollout {foreign[0]!r} holds the token ids of another tokenizer than that of"
            f" {reader.name}: score with the student that wrote it, and a teacher that shares its"
            " vocabulary"
        )
    _refuse_what_is_no_token(rollouts, reader)
    rollouts = with_teacher_prompts(rollouts, teacher, teacher_context, _template_switches(run))
    for model, prompt in ((student, "prompt_token_ids"), (teacher, "teacher_prompt_token_ids")):
        if model is None:
            continue
        lengths = (
            rollouts[prompt].fill_null(rollouts["prompt_token_ids"]).list.len()
            + rollouts["response_token_ids"].list.len()
        )
        check_context(model, rollouts["rollout_id"].to_list(), lengths.to_list())
        _check_ids(rollouts, model, [prompt, "response_token_ids"])
    return rollouts


def _check_ids(rollouts: pl.DataFrame, model: TokenModel, columns: list[str]) -> None:
    """Refuse token ids that a model has no row for."""
    for column in columns:
        beyond = rollouts.filter(pl.col(column).list.max() >= model.vocab_size)
        if beyond.height:
            name, largest = beyond["rollout_id"][0], beyond[column].list.max()[0]
            raise VocabularyMismatchError(
                f"rollout {name!r}: {column} holds {largest}, outside the vocabulary of"
                f" {model.name} ({model.vocab_size:,} tokens)"
            )


def _refuse_what_is_no_token(rollouts: pl.DataFrame, reader: TokenModel) -> None:
    """Refuse ids that the tokenizer does not have (padding rows of the head, gaps, beyond the end);
    names rollout and position."""
    known = sorted(reader.tokenizer.get_vocab().values())
    columns = ("prompt_token_ids", "teacher_prompt_token_ids", "response_token_ids")
    for column, text in zip(columns, ("prompt", "teacher's prompt", "response"), strict=True):
        strange = (
            rollouts.select("rollout_id", token_id=pl.col(column))
            .with_columns(position=pl.int_ranges(pl.col("token_id").list.len()))
            .filter(pl.col("token_id").list.len() > 0)
            .explode("token_id", "position")
            .filter(~pl.col("token_id").is_in(known))
        )
        for rollout_id, token_id, position in strange.head(1).iter_rows():
            raise VocabularyMismatchError(
                f"rollout {rollout_id!r}, position {position} of its {text}: {token_id} is no token"
                f" of {reader.name}, whose {len(known)} tokens have ids up to {max(known)}"
            )


def with_teacher_prompts(
    rollouts: pl.DataFrame,
    teacher: TokenModel,
    teacher_context: TeacherContext | str,
    switches: Mapping[str, Any] | None = None,
) -> pl.DataFrame:
    """Set `teacher_prompt_token_ids` for the context asked for.

    Args:
        rollouts: rows of `schema.RolloutTable`.
        teacher: whose chat template renders the prompts.
        teacher_context: `none` (the rollout's own prompt, or the teacher's where the rollout
            carries one) or `solution` (the reference solution in the user's turn).
        switches: of the chat template.

    Raises:
        UnknownNameError: no such context.
        RunError: a rollout lacks the solution, or its messages, that `solution` needs.
    """
    if TeacherContext(teacher_context) is TeacherContext.NONE:
        return rollouts
    prompts: dict[tuple[str, str, str | None], list[int]] = {}
    shown = []
    for row in rollouts.select("rollout_id", "messages", "solution", "tools").iter_rows(named=True):
        for needed in ("solution", "messages"):
            if row[needed] is None:
                raise RunError(
                    f"rollout {row['rollout_id']!r} has no {needed}: --teacher-context solution"
                    " needs one for every rollout"
                )
        # a solution belongs to its rollout: those of one prompt may have several
        key = (row["messages"], row["solution"], row["tools"])
        if key not in prompts:
            prompts[key] = _with_solution(teacher, *key, switches)
        shown.append(prompts[key])
    return rollouts.with_columns(
        pl.Series("teacher_prompt_token_ids", shown, dtype=pl.List(pl.Int32))
    )


def _with_solution(
    teacher: TokenModel,
    messages: str,
    solution: str,
    tools: str | None,
    switches: Mapping[str, Any] | None,
) -> list[int]:
    """Token ids of a prompt with the solution in the user's turn."""
    shown = teacher_messages(json.loads(messages), solution)
    switches = with_tools(switches, json.loads(tools) if tools else None)
    return render(teacher.tokenizer, shown, chat_template_kwargs=switches).token_ids


def _template_switches(run: Run) -> dict[str, Any]:
    """Switches of the chat template that the student's prompts were rendered with."""
    return run.stages().get("rollout", {}).get("config", {}).get("chat_template_kwargs", {})


def shards_of_part(run: Run, shard_size: int, part: tuple[int, int] = (0, 1)) -> range:
    """The shards that process i of n is to make: every n-th, from the i-th on.

    Raises:
        OptionError: a shard without rollouts, or i outside [0, n).
    """
    if shard_size < 1:
        raise OptionError(f"--shard-size must be at least 1, found {shard_size}")
    if not 0 <= part[0] < part[1]:
        raise OptionError(f"--shard i/n needs 0 <= i < n, found {part[0]}/{part[1]}")
    return range(part[0], num_shards(run, shard_size), part[1])


def num_shards(run: Run, shard_size: int) -> int:
    """Shards that all rollouts of a run make."""
    return -(-run.rollouts().select(pl.len()).collect().item() // shard_size)
