import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_language_model, tiny_model

from tip_analysis.core.errors import ContextLengthError, OptionError
from tip_analysis.models.hidden_states import (
    check_context,
    predicting_positions,
    response_hidden_states,
)
from tip_analysis.models.output_head import OutputHead

PROMPTS = [[1, 2, 3], [1, 2, 3], [5], [7, 8, 9, 10, 11], [1, 2, 3]]
RESPONSES = [[4, 5, 6], [7], [], [1, 2, 3, 4, 5, 6, 7], [4, 5]]


def test_the_shift_by_hand():
    # prompt a b, response c d: c is predicted at b (1), d at c (2); nothing is read at d.
    assert list(range(5))[predicting_positions(2, 2)] == [1, 2]
    assert list(range(5))[predicting_positions(1, 0)] == []
    with pytest.raises(OptionError, match="at least one token"):
        predicting_positions(0, 3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [{}, {"padding_side": "left"}, {"share_prompts": True}],
    ids=["right", "left", "shared"],
)
def test_hidden_states_give_the_models_own_logits_at_response_positions(architecture, options):
    # Gemma 2's attention takes its softmax in float32, where a float64 mask overflows: it has no
    # float64 form.
    model = tiny_model(
        architecture, dtype=torch.float32 if architecture == "gemma2" else torch.float64
    )
    head = OutputHead(model)
    head.verify()
    with torch.no_grad():
        states = response_hidden_states(model, PROMPTS, RESPONSES, **options)
        for prompt, response, hidden in zip(PROMPTS, RESPONSES, states, strict=True):
            assert hidden.shape == (len(response), 32)
            if response:
                own = model(torch.tensor([prompt + response])).logits[0]
                for index in range(
                    len(response)
                ):  # the plain statement of the shift: output i predicts token i + 1
                    torch.testing.assert_close(
                        head(hidden[index : index + 1])[0], own[len(prompt) + index - 1]
                    )


def test_gradients_pass_through():
    model = tiny_model(dtype=torch.float64)
    hidden = response_hidden_states(model, PROMPTS[:2], RESPONSES[:2])
    torch.cat(hidden).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_sequences_beyond_the_context_are_refused_by_name():
    model = tiny_language_model()
    check_context(model, ["a"], [128])
    with pytest.raises(ContextLengthError, match=r"'b' takes 129 tokens.*ends at 128"):
        check_context(model, ["a", "b"], [3, 129])
