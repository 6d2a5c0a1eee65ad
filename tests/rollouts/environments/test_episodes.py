"""Conversations that grow turn by turn: token ids, limits, failures, batches at different turns."""

import json
import time

import pytest
from scripted_engine import (
    CHATML_TOOLS,
    DROPS_THOUGHTS,
    LLAMA_3,
    ScriptedEngine,
    chat_tokenizer,
    token_model,
)

from tip_analysis.core.errors import InputError, OptionError
from tip_analysis.core.names import FinishReason
from tip_analysis.rollouts.environments.episodes import Limits, ask, run_episodes
from tip_analysis.rollouts.environments.protocol import End, Reward, checked_reward
from tip_analysis.rollouts.environments.registry import EnvironmentSource
from tip_analysis.rollouts.environments.tool_box import ToolBox, tool_schema
from tip_analysis.rollouts.prompts import Prompt
from tip_analysis.rollouts.rendering import encode, render_chat
from tip_analysis.rollouts.sampling import Sampling

TEMPLATES = {"chatml": CHATML_TOOLS, "llama3": LLAMA_3, "drops_thoughts": DROPS_THOUGHTS}
TOOLS = [tool_schema("add", "Adds.", {"a": {"type": "integer"}, "b": {"type": "integer"}})]


def fail():
    raise SystemExit("stop everything")


def hang():
    time.sleep(5)


class Adder:
    """Answers calls; asks again, as a user, where it is told to; over with a turn without calls."""

    asks_again = False

    def reset(self, task):
        self.tools = ToolBox({"add": lambda a, b: a + b, "fail": fail, "hang": hang}, timeout_s=0.2)
        return [{"role": "user", "content": task.row["problem"]}], TOOLS

    def step(self, message):
        answers = self.tools.answer(message)
        if not answers and self.asks_again and "more" in message["content"]:
            return [{"role": "user", "content": "And then?"}], False
        return answers, not answers

    def reward(self, trajectory):
        found = float("46" in trajectory.messages[-1]["content"])
        return Reward(found, {"sum": found})


class Asker(Adder):
    asks_again = True


class Broken(Adder):
    def step(self, message):
        if "boom" in message["content"]:
            raise ValueError("boom")
        if "sleep" in message["content"]:
            time.sleep(3)
        return super().step(message)


def call(name="add", **arguments):
    text = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{text}\n</tool_call>"


def play(
    template, texts, *, of=ScriptedEngine, environment=Adder, names=("p/0",), limits=None, room=900,
    **how,
):  # fmt: skip
    engine = of(token_model(chat_tokenizer(TEMPLATES[template])), texts)
    source = EnvironmentSource("adder", environment)
    asked = ask(Prompt("p", problem="What is 12 + 34?"), source, student=engine.author, seed=0)
    jobs = [(name, asked) for name in names]
    return engine, run_episodes(engine, source, jobs, Sampling(room), limits or Limits(), **how)


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_of_every_turn_are_those_of_the_conversation_rendered_at_once(template):
    thought = "<think>\nI add.\n</think>\n\n"
    texts = [thought + call(a=12, b=34), thought + call(a=1, b=2), "The answer is 46."]
    engine, (episode,) = play(template, {"*": texts})
    tokenizer, messages = engine.author.tokenizer, episode.conversation.messages
    assert [one["role"] for one in messages] == ["user", *["assistant", "tool"] * 2, "assistant"]
    for turn, prefix in enumerate(engine.prefixes["p/0"]):
        before = messages[: 1 + 2 * turn]
        whole = render_chat(tokenizer, before, chat_template_kwargs={"tools": TOOLS})
        assert prefix == encode(tokenizer, whole)
    assert episode.conversation.match == "ids"
    assert episode.refused is None
    assert episode.reward == Reward(1.0, {"sum": 1.0})


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_mask_holds_what_the_student_wrote(template):
    texts = [call(a=12, b=34), "So 46."]
    engine, (episode,) = play(template, {"*": texts})
    conversation, tokenizer = episode.conversation, engine.author.tokenizer
    masked = list(zip(conversation.response, conversation.loss_mask, strict=True))
    ended = [[*encode(tokenizer, text), tokenizer.eos_token_id] for text in texts]
    assert [token for token, mine in masked if mine] == [token for ids in ended for token in ids]
    assert "46" in tokenizer.decode([token for token, mine in masked if not mine])
    assert conversation.turn_starts[0] == 0
    assert len(conversation.turn_starts) == 2
    second = conversation.turn_starts[1]
    assert conversation.loss_mask[second - 1 : second + 1] == [False, True]
    unknown = [logprob is None for logprob in conversation.logprobs]
    assert unknown == [not mine for mine in conversation.loss_mask]


def test_a_template_that_drops_earlier_thoughts_is_found_and_refused_by_name():
    texts = ["<think>\nhm\n</think>\n\nmore", "46"]
    _, (kept,) = play("chatml", {"*": texts}, environment=Asker)
    assert kept.refused is None
    _, (episode,) = play("drops_thoughts", {"*": texts}, environment=Asker)
    assert "'p/0'" in episode.refused
    assert "turn 1 of the student" in episode.refused
    assert episode.num_turns == 1


def test_a_rewritten_conversation_goes_on_with_its_own_ids_where_that_is_asked_for():
    texts = ["<think>\nhm\n</think>\n\nmore", "46"]
    limits = Limits(on_rewrite="record")
    engine, (episode,) = play("drops_thoughts", {"*": texts}, environment=Asker, limits=limits)
    assert episode.conversation.match == "rewritten"
    assert episode.reward.total == 1.0
    first, second = engine.prefixes["p/0"]
    assert second[: len(first)] == first
    assert engine.author.tokenizer.decode(second).endswith(
        "<think>\nhm\n</think>\n\nmore<|im_end|>\n<|im_start|>user\nAnd then?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_space_that_a_template_trims_is_a_rewriting():
    _, (episode,) = play("llama3", {"*": [call(a=1, b=2) + "  \n", "46"]})
    assert episode.refused is not None


class Speller(ScriptedEngine):
    """Writes character by character, as no tokenizer would."""

    def _one(self, request, sampling):
        found = super()._one(request, sampling)
        tokenizer, ids = self.author.tokenizer, []
        for token_id in found.token_ids:
            token = tokenizer.convert_ids_to_tokens(token_id)
            special = token_id in tokenizer.all_special_ids
            ids += [token_id] if special else tokenizer.convert_tokens_to_ids(list(token))
        return type(found)(ids, [-1.0] * len(ids), found.finish_reason)


def test_tokens_that_the_tokenizer_would_not_choose_are_kept_and_marked():
    engine, (episode,) = play("chatml", {"*": [call(a=12, b=34), "46"]}, of=Speller)
    assert episode.conversation.match == "text"
    first, second = engine.prefixes["p/0"]
    response = episode.conversation.response
    assert second == [*first, *response[: len(second) - len(first)]]
    assert len(second) > len(
        encode(engine.author.tokenizer, engine.author.tokenizer.decode(second))
    )


def test_rollouts_at_different_turns_share_a_batch_and_do_not_depend_on_it():
    texts = {
        "p/0": ["46"],
        "p/1": [call(a=1, b=2), call(a=3, b=4), "46"],
        "p/2": [call(a=12, b=34), "46"],
        "p/3": ["nothing"],
    }
    names = tuple(texts)
    engine, together = play("chatml", texts, names=names)
    few, apart = play("chatml", texts, names=names, at_once=2)
    assert [len(asked) for asked in engine.asked] == [4, 2, 1]
    assert any(len({"@" in name for name in asked}) == 2 for asked in few.asked)
    for one, other in zip(together, apart, strict=True):
        assert one.conversation.response == other.conversation.response
        assert one.reward == other.reward
    assert [one.name for one in apart] == list(names)
    assert [one.reward.total for one in together] == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (call("fail"), "error: RuntimeError: SystemExit: stop everything"),
        (call("hang"), "error: no answer within 0.2 s"),
        (call("gone"), "error: there is no tool 'gone'"),
        (call(a=1), "error: TypeError"),
        ("<tool_call>\n{not json}\n</tool_call>", "error: the call is no valid JSON"),
    ],
)
def test_a_tool_that_fails_becomes_a_tool_message(text, said):
    _, (episode,) = play("chatml", {"*": [text, "46"]})
    (message,) = [one for one in episode.conversation.messages if one["role"] == "tool"]
    assert message["content"].startswith(said)
    assert episode.end is End.DONE
    assert episode.reward.total == 1.0


def test_an_environment_that_raises_or_hangs_becomes_a_tool_message():
    _, (raised,) = play("chatml", {"*": ["boom", "46"]}, environment=Broken)
    assert raised.conversation.messages[2]["content"] == "error: ValueError: boom"
    assert raised.reward.total == 1.0
    limits = Limits(step_timeout_s=0.1)
    _, (hung,) = play("chatml", {"*": ["sleep"]}, environment=Broken, limits=limits)
    assert hung.end is End.DONE  # what hangs cannot be asked again
    assert hung.conversation.said[-1]["content"] == "error: no answer within 0.1 s"


def test_limits_on_turns_and_tokens():
    texts = {"*": [call(a=1, b=2)] * 9}
    _, (episode,) = play("chatml", texts, limits=Limits(max_turns=3))
    assert (episode.end, episode.num_turns) == (End.TURNS, 3)
    assert episode.finish_reason is FinishReason.LENGTH
    for room in range(10, len(episode.conversation.response), 23):
        _, (cut,) = play("chatml", texts, room=room)
        assert cut.end is End.LENGTH
        assert len(cut.conversation.response) <= room
        assert cut.conversation.loss_mask[-1]  # nothing of the environment at the end
    with pytest.raises(OptionError):
        Limits(max_turns=0)


def test_what_an_environment_may_not_do():
    class Silent(Adder):
        def step(self, message):
            return [], False

    class Moody(Adder):
        count = 0

        def reset(self, task):
            Moody.count += 1
            return [{"role": "user", "content": f"{Moody.count}"}], None

    class Generous(Adder):
        def reward(self, trajectory):
            return 2.0

    for environment, reason in ((Silent, "neither"), (Moody, "another task"), (Generous, r"0, 1")):
        with pytest.raises(InputError, match=reason):
            play("chatml", {"*": ["x"]}, environment=environment)


def test_rewards_in_their_forms():
    assert checked_reward(0.5, "w") == Reward(0.5)
    assert checked_reward((1, {"a": 0.25}), "w") == Reward(1.0, {"a": 0.25})
    for wrong in (float("nan"), -0.1, "x", None):
        with pytest.raises(InputError):
            checked_reward(wrong, "w")
    with pytest.raises(InputError, match="'a'"):
        checked_reward(Reward(1.0, {"a": float("inf")}), "w")
