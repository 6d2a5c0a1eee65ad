"""Ids that are no token are refused by rollout and position before a model runs."""

import polars as pl
import pytest
from tiny_models import tiny_language_model

from tip_analysis.core.errors import VocabularyMismatchError
from tip_analysis.core.run_folder import Run, create_run
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.rollouts.stage import sample_rollouts
from tip_analysis.rollouts.teacher_prompts import prepare_rollouts


@pytest.fixture
def student():
    return tiny_language_model(padding_rows=5)


@pytest.fixture
def run(student, tmp_path):
    run = create_run(tmp_path / "run")
    prompts = [Prompt("p", problem="12+34="), Prompt("q", problem="5+6=")]
    sample_rollouts(
        run, student=student, prompts=prompts, sampling=Sampling(max_new_tokens=6), num_rollouts=2
    )
    return run


@pytest.mark.parametrize(
    ("column", "text"), [("response_token_ids", "response"), ("prompt_token_ids", "prompt")]
)
@pytest.mark.parametrize("beyond", [0, 4, 5, 1000])
def test_an_id_that_is_no_token_is_refused_by_rollout_and_position(
    student, run, column, text, beyond, monkeypatch
):
    strange = len(student.tokenizer) + beyond  # a padding row of the head, or no row at all
    rollouts = run.rollouts().collect()
    ids = rollouts[column].to_list()
    ids[2][1] = strange
    altered = rollouts.with_columns(pl.Series(column, ids, dtype=pl.List(pl.Int32)))
    monkeypatch.setattr(Run, "rollouts", lambda self: altered.lazy())
    name = altered["rollout_id"][2]
    with pytest.raises(
        VocabularyMismatchError, match=rf"{name}', position 1 of its {text}: {strange} is no token"
    ):
        prepare_rollouts(run, student, student, "none")


def test_every_token_of_a_tokenizer_with_gaps_is_taken(student, run):
    ids = student.token_ids
    object.__setattr__(student, "token_ids", ids | {max(ids) + 3})
    assert prepare_rollouts(run, student, student, "none").height == 4
