"""Gradients over many architectures: squared norms and products with ∇L are those of autograd, one
token at a time, whatever the method."""

import pytest
import torch
from zoo import SHORT, ZOO, zoo_model

from tip_analysis.core.errors import ModelError
from tip_analysis.gradients import measuring, rollout_gradients
from tip_analysis.gradients.forward_mode import ForwardMode
from tip_analysis.gradients.forward_rules import custom_functions
from tip_analysis.gradients.measuring import token_gradients
from tip_analysis.rollouts.encoded import Rollout

ROLLOUTS = [
    Rollout("a/0", "a", [5, 9, 14], [10, 20, 30, 2]),
    Rollout("b/0", "b", [7, 8], [33, 12, 6]),
]
everything = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHORT else pytest.mark.slow) for name in ZOO]
)


def gradients_by_autograd(model):
    """g_t of every token, flat, for each rollout: [R, P]."""
    parameters = [parameter.requires_grad_() for parameter in model.parameters()]
    result = []
    for rollout in ROLLOUTS:
        tokens = torch.tensor([[*rollout.prompt, *rollout.response[:-1]]])
        rows = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
        losses = -rows[len(rollout.prompt) - 1 :].gather(1, torch.tensor(rollout.response)[:, None])
        flat = []
        for loss in losses[:, 0]:
            parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            flat.append(
                torch.cat(
                    [
                        torch.zeros(p.numel()).double() if g is None else g.double().flatten()
                        for p, g in zip(parameters, parts, strict=True)
                    ]
                )
            )
        result.append(torch.stack(flat))
    return result


@everything
@pytest.mark.parametrize("method", ["exact", "probe"])
def test_norms_and_products_are_those_of_autograd(name, method):
    model = zoo_model(name, dtype=torch.float64)
    found = token_gradients(
        student=model,
        teacher=None,
        rollouts=ROLLOUTS,
        loss="negative_logprob",
        method=method,
        num_probes=48,
    )
    one, other = gradients_by_autograd(model)
    # Two prompts, so two folds of one: ∇L of a token's other fold is the other rollout's mean.
    products = torch.cat([one @ other.mean(0), other @ one.mean(0)])
    scale = float(products.abs().max())
    torch.testing.assert_close(found["grad_dot_loss"], products, atol=2e-5 * scale, rtol=1e-5)
    norms = torch.cat([one, other]).square().sum(1)
    if method == "exact":
        torch.testing.assert_close(found["grad_norm_sq"], norms, rtol=1e-5, atol=1e-9)
    else:  # the relative standard error of each is at most √(2/48) = 0.2
        ratio = found["grad_norm_sq"] / norms
        assert ((ratio - 1).abs() < 5 * 0.21).all()
        assert abs(float(ratio.mean()) - 1) < 4 * 0.21 / 2


@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_nobody_is_warned_of_attention_that_cannot_be_chosen(name, capfd):
    token_gradients(
        student=zoo_model(name),
        teacher=None,
        rollouts=ROLLOUTS,
        loss="negative_logprob",
        num_probes=2,
    )
    assert "attention implementation" not in capfd.readouterr().err


def test_a_custom_function_is_differentiated_by_its_backward_pass():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, *gradients):
            (x,) = ctx.saved_tensors
            return gradients[0] * 3 * x**2

    x, v = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    dual = torch.autograd.forward_ad
    own = torch.autograd.Function.__dict__["apply"]
    with torch.no_grad(), dual.dual_level(), custom_functions():
        value, tangent = dual.unpack_dual(Cube.apply(dual.make_dual(x, v)))
        torch.testing.assert_close(value, x**3)
        torch.testing.assert_close(tangent, 3 * x**2 * v)
        torch.testing.assert_close(Cube.apply(x), x**3)
    assert torch.autograd.Function.__dict__["apply"] is own


def without_forward_mode(monkeypatch, works=lambda scope: False):
    """Let forward mode fail in all scopes but those that `works` says."""
    tangents = ForwardMode.tangents

    def broken(self, directions):
        result = tangents(self, directions)
        return result if works(self.scope.name) else result * 1.5

    monkeypatch.setattr(ForwardMode, "tangents", broken)


def test_exact_needs_no_forward_mode(monkeypatch):
    model = zoo_model("llama", dtype=torch.float64)
    options = {"student": model, "teacher": None, "loss": "negative_logprob", "method": "exact"}
    expected = token_gradients(rollouts=ROLLOUTS, **options)
    without_forward_mode(monkeypatch)
    found = token_gradients(rollouts=ROLLOUTS, **options)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, equal_nan=True, rtol=1e-6, atol=1e-9)


def test_the_largest_scope_that_works_is_named_before_the_work_begins(monkeypatch):
    model = zoo_model("llama", dtype=torch.float64)
    without_forward_mode(monkeypatch, works=lambda scope: scope == "last:1")

    def begun(*args, **kwargs):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(measuring, "loss_directions", begun)
    with pytest.raises(ModelError, match=r"largest scope that works here is --params last:1"):
        token_gradients(
            student=model, teacher=None, rollouts=ROLLOUTS, loss="negative_logprob", num_probes=2
        )


def test_ordinary_models_are_differentiated_layer_by_layer():
    model = zoo_model("llama", dtype=torch.float64)
    pair = measuring.model_pair(model, None)
    settings = measuring.GradientSettings(("negative_logprob",), num_probes=2)
    scope = measuring.parameter_scope(model, pair.student.head, "all")
    nothing = measuring.LossDirections({}, {}, (0.0, 0.0), {})
    with rollout_gradients.RolloutMeter(pair, scope, settings, nothing) as meter:
        meter.verify(ROLLOUTS[0])
        assert not meter._forward.whole
