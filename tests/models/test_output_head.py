"""The output head: a model's own logits from its last hidden states."""

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model

from tip_analysis.core.errors import ModelError
from tip_analysis.models.hidden_states import last_hidden_states
from tip_analysis.models.output_head import OutputHead


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_split_head_gives_the_models_own_logits(architecture, tied):
    model = tiny_model(architecture, tied=tied)
    head = OutputHead(model)
    head.verify()
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9]])
    with torch.no_grad():
        torch.testing.assert_close(
            head(last_hidden_states(model, tokens)[0]), model(tokens).logits[0]
        )


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_a_head_with_an_unknown_transform_goes_through_the_models_own_forward(architecture, caplog):
    model = tiny_model(architecture)
    original = model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits * 0.5 + 1.0
        return output

    model.forward = forward
    head = OutputHead(model)
    head.verify()
    assert "slower" in caplog.text
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        hidden = last_hidden_states(model, tokens)[0]
        torch.testing.assert_close(head(hidden), model(tokens).logits[0])
        torch.testing.assert_close(head(hidden[2:4]), model(tokens).logits[0, 2:4])
    assert model.base_model.forward.__func__ is type(model.base_model).forward  # put back


def test_logits_that_cannot_be_rebuilt_are_refused():
    model = tiny_model()
    original = model.forward
    calls = iter(range(1, 100))

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits + next(calls)
        return output

    model.forward = forward
    with pytest.raises(ModelError, match="cannot be rebuilt"):
        OutputHead(model).verify()
