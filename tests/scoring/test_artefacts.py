"""Artefact labels by hand, and a pair of models that differ in their stop token only."""

import copy

import polars as pl
import pytest
import torch
from tiny_models import tiny_language_model

from tip_analysis.analysis.scores import add_scores
from tip_analysis.analysis.screening import screen_tokens, warnings_of
from tip_analysis.analysis.selection import select_tokens
from tip_analysis.core.errors import OptionError
from tip_analysis.core.names import Artefact, StopTokens
from tip_analysis.core.run_folder import create_run
from tip_analysis.gradients.settings import GradientSettings
from tip_analysis.gradients.stage import measure_run
from tip_analysis.models.hidden_states import last_hidden_states
from tip_analysis.models.loading import LanguageModel
from tip_analysis.models.output_head import OutputHead
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.sampling import Sampling
from tip_analysis.rollouts.stage import sample_rollouts
from tip_analysis.scoring.artefacts import PADDED_MASS, label_artefacts, mass_outside
from tip_analysis.scoring.scorer import Scorer
from tip_analysis.scoring.stage import score_rollouts

FIRST_STOP, OTHER_STOP = 2, 3


def token_rows(token_ids: list[int], written: list[bool], **columns: list) -> pl.DataFrame:
    size = len(token_ids)
    return pl.DataFrame(
        {
            "rollout_id": ["a/0"] * size,
            "position": list(range(size)),
            "token_id": token_ids,
            "loss_mask": written,
            "reverse_kl": columns.get("reverse_kl", [0.5] * size),
            "stop_mismatch": columns.get("stop_mismatch", [0.0] * size),
            "artefact": [None] * size,
        }
    ).with_columns([pl.Series(PADDED_MASS, columns[PADDED_MASS])] if PADDED_MASS in columns else [])


def labels(tokens: pl.DataFrame, origin: str = "exact") -> list[str | None]:
    rollouts = pl.DataFrame({"rollout_id": ["a/0"], "ids_origin": [origin]})
    found = label_artefacts(tokens, rollouts, stop_ids={2, 3}, special_ids={1, 2, 3})
    assert PADDED_MASS not in found.columns
    return found["artefact"].to_list()


def test_what_comes_after_a_stop_token_is_an_artefact_and_the_stop_itself_is_not() -> None:
    assert labels(token_rows([9, 2, 8, 2], [True] * 4)) == [
        None,
        Artefact.SPECIAL_TOKEN,  # a stop token inside what the student wrote
        Artefact.AFTER_END,
        Artefact.AFTER_END,
    ]
    assert labels(token_rows([9, 8, 2], [True] * 3)) == [None, None, None]


def test_turns_begin_again_after_tokens_that_the_student_did_not_write() -> None:
    ids, written = [9, 2, 7, 8, 8, 2], [True, True, False, True, True, True]
    assert labels(token_rows(ids, written)) == [None] * 6
    cut = labels(token_rows([9, 8, 7, 8, 8, 2], written))
    assert cut == [None, None, None, Artefact.AFTER_TRUNCATION, None, None]


def test_special_tokens_padded_mass_and_text_encoded_again() -> None:
    assert labels(token_rows([9, 1, 8], [True] * 3))[1] == Artefact.SPECIAL_TOKEN
    padded = token_rows([9, 8], [True] * 2, **{PADDED_MASS: [0.2, 0.001]})
    assert labels(padded) == [Artefact.PADDED_MASS, None]
    again = labels(token_rows([9, 8, 7, 8], [True, True, True, False]), "retokenized")
    assert again == [Artefact.RETOKENIZED, None, Artefact.RETOKENIZED, None]


@pytest.mark.parametrize(
    ("delta", "mismatch", "is_one"),
    [(20.0, 19.0, True), (20.0, 5.0, False), (0.05, 0.05, False), (0.3, 0.16, True)],
)
def test_a_stop_mismatch_counts_where_it_is_most_of_a_divergence(delta, mismatch, is_one) -> None:
    row = token_rows([9], [True], reverse_kl=[delta], stop_mismatch=[mismatch])
    assert labels(row) == [Artefact.STOP_TOKEN if is_one else None]


def test_mass_outside_the_shared_vocabulary_is_that_of_the_whole_softmax() -> None:
    logits = 3 * torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    inside = logits[:, :9].log_softmax(-1)
    top_logprobs, top_ids = inside.max(-1)
    found = mass_outside(logits, 9, top_ids, top_logprobs)
    assert torch.allclose(found, logits.softmax(-1)[:, 9:].sum(-1), atol=1e-6)
    assert mass_outside(logits[:, :9], 9, top_ids, top_logprobs).tolist() == [0.0] * 5


# ------------------------------------------------------------------ two models, two stop tokens


def stops_with(model: LanguageModel, preferred: int, other: int, at: torch.Tensor) -> LanguageModel:
    """A copy that all but surely stops at the hidden state `at`, with `preferred`, not `other`."""
    network = copy.deepcopy(model.model)
    weight = network.get_output_embeddings().weight
    along = at / at.square().sum()
    with torch.no_grad():
        weight[preferred] = 60.0 * along
        weight[other] = 40.0 * along
    network.generation_config.eos_token_id = [FIRST_STOP, OTHER_STOP]
    head = OutputHead(network)
    head.verify()
    return LanguageModel(f"stops with {preferred}", network, model.tokenizer, head)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """One rollout that ends with FIRST_STOP, scored by teachers that prefer either stop token."""
    student, teacher = (
        tiny_language_model(seed=seed, tied=False, sharpness=2.0) for seed in (0, 1)
    )
    run = create_run(tmp_path_factory.mktemp("runs") / "run")
    prompt = Prompt("a", problem="12+34+56=")
    sample_rollouts(run, student=student, prompts=[prompt], sampling=Sampling(12), num_rollouts=4)
    rollouts = run.rollouts().collect()
    row = rollouts.row(0, named=True)
    body = [token for token in row["response_token_ids"] if token not in (FIRST_STOP, OTHER_STOP)]
    response = [*body, FIRST_STOP]
    ended = rollouts.head(1).with_columns(
        response_token_ids=pl.Series([response], dtype=pl.List(pl.Int32)),
        loss_mask=pl.Series([[True] * len(response)]),
        planted_labels=pl.Series([["plain"] * len(response)]).cast(
            rollouts.schema["planted_labels"]
        ),
        sampled_logprobs=pl.lit(None, rollouts.schema["sampled_logprobs"]),
    )
    sequence = torch.tensor([[*row["prompt_token_ids"], *body]])
    at = [last_hidden_states(model.model, sequence)[0, -1] for model in (student, teacher)]
    student = stops_with(student, FIRST_STOP, OTHER_STOP, at[0])
    alike = stops_with(teacher, FIRST_STOP, OTHER_STOP, at[1])
    unlike = stops_with(teacher, OTHER_STOP, FIRST_STOP, at[1])
    return {
        (name, stop_tokens): Scorer(student, model, stop_tokens=stop_tokens).token_table(ended)
        for name, model in (("alike", alike), ("unlike", unlike))
        for stop_tokens in StopTokens
    }


def test_merging_takes_away_what_is_a_matter_of_stop_tokens(scored) -> None:
    declared, merged = (scored["unlike", which] for which in StopTokens)
    assert declared["reverse_kl"][-1] > 5
    assert declared["artefact"][-1] == Artefact.STOP_TOKEN
    assert merged["reverse_kl"][-1] < 1e-3
    assert declared["stop_mismatch"][-1] == pytest.approx(declared["reverse_kl"][-1], rel=1e-3)
    assert (declared["student_stop_mass"][-1], declared["teacher_stop_mass"][-1]) == pytest.approx(
        (1.0, 1.0), abs=1e-3
    )


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5])
def test_masks_of_the_other_tokens_are_those_of_a_pair_that_stops_alike(scored, ratio) -> None:
    def chosen(tokens: pl.DataFrame) -> list[bool]:
        how = {"rule": "soft_or", "retention_ratio": ratio}
        return select_tokens(add_scores(tokens), **how).collect()["selected"].to_list()

    expected = scored["alike", StopTokens.MERGED]
    assert chosen(scored["unlike", StopTokens.MERGED]) == chosen(expected)
    for name in ("reverse_kl", "student_entropy", "forward_kl"):
        assert scored["unlike", StopTokens.MERGED][name].to_list() == pytest.approx(
            expected[name].to_list(), rel=1e-4, abs=1e-6
        )


def test_a_screen_says_that_the_loss_is_a_matter_of_stop_tokens(scored) -> None:
    table = screen_tokens(scored["unlike", StopTokens.DECLARED], rules=("soft_or",), ratios=(0.2,))
    row = table.filter(artefact="stop_token", name="reverse_kl").row(0, named=True)
    tokens = scored["unlike", StopTokens.DECLARED]
    labelled = tokens.filter(pl.col("artefact") == "stop_token")
    assert row["num_artefacts"] == labelled.height >= 1
    share = labelled["reverse_kl"].sum() / tokens["reverse_kl"].sum()
    assert row["share"] == pytest.approx(share, rel=1e-6)
    assert any("stop_token" in text for text in warnings_of(table))
    clean = screen_tokens(scored["unlike", StopTokens.MERGED], rules=("soft_or",), ratios=(0.2,))
    assert clean.filter(artefact="stop_token").height == 0


def test_gradients_of_merged_stop_tokens_are_refused(tmp_path) -> None:
    model = tiny_language_model()
    run = create_run(tmp_path / "run")
    prompt = Prompt("a", problem="12+34+56=")
    sample_rollouts(run, student=model, prompts=[prompt], sampling=Sampling(4), num_rollouts=1)
    score_rollouts(run, Scorer(model, model, stop_tokens=StopTokens.MERGED))
    recorded = run.stages()["score"]["config"]
    assert recorded["stop_tokens"] == "merged"
    assert recorded["student_stop_tokens"] == recorded["teacher_stop_tokens"] == [2]
    with pytest.raises(OptionError, match="--stop-tokens declared"):
        measure_run(run, student=model, teacher=model, settings=GradientSettings(num_probes=2))
