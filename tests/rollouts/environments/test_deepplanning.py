"""DeepPlanning out of a checkout, on a stand-in with the same file shapes."""

import json

import pytest
from deepplanning_stand_in import write_checkout
from scripted_engine import CHATML_TOOLS, ScriptedEngine, chat_tokenizer, token_model

from tip_analysis.core.errors import InputError, OptionError
from tip_analysis.core.run_folder import create_run, open_run
from tip_analysis.rollouts.environments.deepplanning import DeepPlanning, task_sets
from tip_analysis.rollouts.environments.episodes import task_of
from tip_analysis.rollouts.environments.registry import resolve_environment
from tip_analysis.rollouts.environments.stage import sample_trajectories
from tip_analysis.rollouts.sampling import Sampling


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkout")
    write_checkout(root)
    return root


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def as_message(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "function": function}]}


def test_both_domains_from_prompt_to_reward(checkout, tmp_path):
    source = resolve_environment(f"deepplanning:{checkout}")
    texts = {
        "travel-en/0/0": [
            call("query_train_info", origin="Hefei"),
            "<think>\nG2 fits.\n</think>\n\n<plan>Take G2.</plan>",
        ],
        "travel-en/0/1": ["No plan."],
        "shopping-1/1/0": [
            call("add_product_to_cart", product_id="a"),
            "Done.",
            call("add_product_to_cart", product_id="b"),
            "Really done.",
        ],
        "shopping-1/1/1": [call("add_product_to_cart", product_id="a"), "Done.", "Done."],
    }
    engine = ScriptedEngine(token_model(chat_tokenizer(CHATML_TOOLS)), texts)
    summary = sample_trajectories(
        create_run(tmp_path / "run"),
        student=engine.author,
        source=source,
        prompts=source.tasks(),
        sampling=Sampling(2000),
        engine=engine,
        num_rollouts=2,
    )
    assert summary["refused_rollouts"] == []
    rollouts = {
        row["rollout_id"]: row for row in open_run(tmp_path / "run").rollouts().collect().to_dicts()
    }
    rewards = {name: row["reward"] for name, row in rollouts.items()}
    assert rewards == {
        "travel-en/0/0": 1.0,
        "travel-en/0/1": 0.0,
        "shopping-1/1/0": 1.0,
        "shopping-1/1/1": 0.5,
    }
    parts = json.loads(rollouts["travel-en/0/0"]["reward_parts"])
    assert parts == {
        "delivered": 1.0,
        "commonsense_weighted_score": 1.0,
        "personalized_score": 1.0,
        "composite_score": 1.0,
        "case_acc": 1.0,
    }
    assert json.loads(rollouts["travel-en/0/1"]["reward_parts"]) == {"delivered": 0.0}
    shop = rollouts["shopping-1/1/0"]
    assert json.loads(shop["reward_parts"])["is_completed"] == 1.0
    assert len(shop["turn_starts"]) == 4
    assert "Look at the cart once more." in shop["response_text"]
    assert "Plan a trip (en)." in rollouts["travel-en/0/0"]["prompt_text"]
    assert '"train_no": "G2"' in rollouts["travel-en/0/0"]["response_text"]
    cart = checkout / "benchmark/deepplanning/shoppingplanning/database/case_1/cart.json"
    assert json.loads(cart.read_text()) == {"items": []}  # the checkout is as it was


def opened(checkout, name, **how):
    source = resolve_environment(f"deepplanning:{checkout}#{name}")
    (prompt,) = source.tasks()
    environment = DeepPlanning({name: task_sets(checkout)[name]}, **how)
    environment.reset(task_of(prompt, 0))
    return environment


def test_tools_that_fail_hang_or_end_their_process(checkout):
    environment = opened(checkout, "travel-en", tool_timeout_s=1.0)
    for origin, said in (("Nowhere", "error: DeepPlanning, call: no answer"), ("Void", "error:")):
        (message,), done = environment.step(as_message("query_train_info", origin=origin))
        assert message["content"].startswith(said)
        assert not done
    (message,), _ = environment.step(as_message("query_train_info", origin="Nanjing"))
    assert json.loads(message["content"])[0]["train_no"] == "G3"
    (message,), _ = environment.step(as_message("unknown", a=1))
    assert "not found" in message["content"]
    environment.close()


def test_what_is_no_checkout_is_refused(checkout, tmp_path):
    with pytest.raises(OptionError, match="no checkout"):
        resolve_environment(f"deepplanning:{tmp_path}")
    with pytest.raises(OptionError, match="travel-en, shopping-1"):
        resolve_environment(f"deepplanning:{checkout}#travel-fr")
    base = write_checkout(tmp_path / "other")
    (base / "travelplanning" / "database").rename(base / "elsewhere")
    with pytest.raises(OptionError, match="databases of travel-en"):
        resolve_environment(f"deepplanning:{base}")
    assert resolve_environment(f"deepplanning:{base}#shopping-1").name == "deepplanning#shopping-1"
    with pytest.raises(InputError, match="none of"):
        opened(checkout, "travel-en").reset(task_of(resolve_environment(
            f"deepplanning:{checkout}#shopping-1").tasks()[0], 0))  # fmt: skip


def test_other_queries_are_another_configuration(tmp_path):
    base = write_checkout(tmp_path)
    before = resolve_environment(f"deepplanning:{base}").identity()
    file = base / "travelplanning/data/travelplanning_query_en.json"
    file.write_text(file.read_text().replace("Hefei", "Wuhan"))
    assert resolve_environment(f"deepplanning:{base}").identity() != before


def test_tools_that_cannot_be_imported_are_not_passed_over(tmp_path):
    base = write_checkout(tmp_path)
    (base / "shoppingplanning/tools/add_product.py").write_text("class AddProduct: ...")
    with pytest.raises(InputError, match="'add_product_to_cart'"):
        opened(base, "shopping-1")
