"""Trajectories that DeepPlanning's runner wrote, imported from a checkout."""

import json

import pytest
from deepplanning_stand_in import write_checkout
from scripted_engine import CHATML_TOOLS, chat_tokenizer

from tip_analysis.core.errors import ImportFormatError
from tip_analysis.rollouts.importers.formats import import_rollouts

QUESTION = [{"role": "system", "content": "Plan."}, {"role": "user", "content": "To Nanjing?"}]
TURNS = [
    {"role": "assistant", "content": "I look."},
    {"role": "tool", "name": "query_train_info", "content": "G2"},
    {"role": "assistant", "content": "<plan>G2</plan>"},
]


def imported(files):
    tokenizer = chat_tokenizer(CHATML_TOOLS)
    return import_rollouts(
        "deepplanning", files, tokenizer=tokenizer, tokenizer_fingerprint="stand-in"
    )


@pytest.fixture
def results(tmp_path):
    base = write_checkout(tmp_path)
    run = base / "travelplanning" / "results" / "model_en"
    for name, scored in (("id_0", True), ("id_1", False)):
        record = {"id": name, "language": "en", "messages": [*QUESTION, *TURNS]}
        place = run / "trajectories" / f"{name}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(record))
        if scored:
            score = run / "evaluation" / f"{name}_score.json"
            score.parent.mkdir()
            scores = {"composite_score": 0.75, "case_acc": 0.0}
            score.write_text(json.dumps({"sample_id": "0", "scores": scores}))
    return base


def test_travel_with_tools_and_scores(results):
    table, report = imported([results / "travelplanning" / "results"])
    assert report.rollouts == 2
    assert table["prompt_id"].to_list() == ["travel-en/0", "travel-en/1"]
    assert table["reward"].to_list() == [0.75, None]
    assert json.loads(table["reward_parts"][0])["case_acc"] == 0.0
    assert set(table["environment"]) == {"deepplanning"}
    assert json.loads(table["tools"][0])[0]["function"]["name"] == "query_train_info"
    assert "query_train_info" in table["prompt_text"][0]
    assert table["finish_reason"].to_list() == ["stop", "stop"]
    mask = table["loss_mask"][0].to_list()
    assert mask[0] is mask[-1] is True
    assert not all(mask)
    assert "<plan>G2</plan>" in table["response_text"][0]


def test_shopping_and_what_is_no_trajectory(results):
    case = results / "shoppingplanning" / "database" / "case_1"
    (case / "messages.json").write_text(json.dumps({"step": 1, "messages": [*QUESTION, TURNS[0]]}))
    table, _ = imported([case])
    assert table["prompt_id"].to_list() == ["shopping/1"]
    (case / "messages.json").write_text(json.dumps({"messages": QUESTION}))
    with pytest.raises(ImportFormatError, match="turn of the assistant"):
        imported([case / "messages.json"])


def test_files_outside_a_checkout_are_noted(results, tmp_path):
    place = tmp_path / "elsewhere" / "trajectories" / "id_0.json"
    place.parent.mkdir(parents=True)
    record = {"language": "en", "messages": [*QUESTION, *TURNS]}
    place.write_text(json.dumps(record))
    table, report = imported([place])
    assert table["tools"][0] is None
    assert any("tool_schema_en.json" in note for note in report.notes)
