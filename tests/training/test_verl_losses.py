"""The losses that verl is given, with stand-ins that have the signatures of verl's own source."""

import importlib
import math
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from tip_analysis.core.errors import OptionError

NAME = "tip_analysis.training.verl_losses"


@dataclass
class Settings:
    names: list
    use_topk: bool = False
    use_estimator: bool = False


@pytest.fixture
def registered(monkeypatch):
    """The module, imported as verl imports it, and what it registers."""
    registry = {}

    def register_distillation_loss(loss_settings):
        def decorator(function):
            for name in loss_settings.names:
                assert name not in registry
                registry[name] = (loss_settings, function)
            return function

        return decorator

    losses = ModuleType("verl.trainer.distillation.losses")
    losses.DistillationLossSettings = Settings
    losses.register_distillation_loss = register_distillation_loss
    padding = ModuleType("verl.workers.utils.padding")
    padding.no_padding_2_padding = lambda tensor, data: tensor
    for name in ("verl", "verl.trainer", "verl.trainer.distillation", "verl.workers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["verl.trainer.distillation"].losses = losses
    monkeypatch.setitem(sys.modules, "verl.workers.utils", ModuleType("verl.workers.utils"))
    monkeypatch.setitem(sys.modules, "verl.trainer.distillation.losses", losses)
    monkeypatch.setitem(sys.modules, "verl.workers.utils.padding", padding)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    module = importlib.import_module(NAME)
    yield module, registry
    sys.modules.pop(NAME, None)


def batch(seed=0, rows=3, length=10):
    random = np.random.default_rng(seed)
    student, teacher = (
        torch.from_numpy(-random.exponential(1.0, (rows, length))) for _ in range(2)
    )
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, 6:] = 0
    mask[2:, 2:4] = 0  # a tool's tokens
    entropy = torch.from_numpy(random.exponential(1.0, (rows, length)))
    output = {"log_probs": student.requires_grad_(), "entropy": entropy}
    return output, {"teacher_logprobs": teacher.unsqueeze(-1), "response_mask": mask}


CONFIG = SimpleNamespace(distillation_loss=SimpleNamespace(use_policy_gradient=True))


def test_each_rule_is_a_loss_mode_of_its_own(registered):
    _, registry = registered
    assert set(registry) == {"tip_soft_or", "tip_divergence", "tip_entropy"}
    assert all(settings.use_estimator for settings, _ in registry.values())


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("rule", ["soft_or", "divergence", "entropy"])
def test_what_is_kept_is_the_rules_choice_and_its_mean_is_over_the_kept(
    rule, ratio, registered, monkeypatch
):
    monkeypatch.setenv("TIP_RETENTION_RATIO", str(ratio))
    output, data = batch()
    losses, metrics = registered[1][f"tip_{rule}"][1](None, CONFIG, output, data)
    losses = losses.detach()
    student, teacher = output["log_probs"].detach(), data["teacher_logprobs"][..., 0]
    mask = data["response_mask"].bool()
    r = teacher - student
    scores = {"divergence": r.exp() - r - 1, "entropy": output["entropy"]}
    h, d = output["entropy"][mask], scores["divergence"][mask]
    clip = np.quantile(h.float().numpy(), 0.98)
    scaled_h = (output["entropy"].clamp(max=float(clip)) - h.min()) / (clip - h.min())
    scaled_d = (scores["divergence"] - d.min()) / (d.max() - d.min())
    scores["soft_or"] = 1 - (1 - scaled_h) * (1 - scaled_d)
    kept = losses != 0
    assert not (kept & ~mask).any()
    for row in range(len(mask)):
        m = int(mask[row].sum())
        k = max(1, math.floor(ratio * m))
        order = scores[rule][row].masked_fill(~mask[row], -math.inf).argsort(descending=True)
        assert kept[row].nonzero()[:, 0].tolist() == sorted(order[:k].tolist())
        expected = (student - teacher)[row][kept[row]].mean()
        assert losses[row].sum() / m == pytest.approx(expected.item())
    assert metrics == {"distillation/tip_selected_share": kept.sum().item() / mask.sum().item()}


def test_nested_masks_are_taken_as_verl_hands_them(registered):
    output, data = batch(rows=2)
    flat = registered[1]["tip_entropy"][1](None, CONFIG, output, data)[0]
    lengths = [10, 6]
    data["response_mask"] = torch.nested.nested_tensor(
        [torch.ones(n, dtype=torch.long) for n in lengths], layout=torch.jagged
    )
    nested = registered[1]["tip_entropy"][1](None, CONFIG, output, data)[0]
    torch.testing.assert_close(nested, flat)


def test_what_would_train_on_something_else_is_refused(registered, monkeypatch):
    loss = registered[1]["tip_soft_or"][1]
    output, data = batch()
    supervised = SimpleNamespace(distillation_loss=SimpleNamespace(use_policy_gradient=False))
    with pytest.raises(OptionError, match="use_policy_gradient=true"):
        loss(None, supervised, output, data)
    with pytest.raises(OptionError, match="calculate_entropy=true"):
        loss(None, CONFIG, output | {"entropy": None}, data)
    for given in ("half", "0", "1.5"):
        monkeypatch.setenv("TIP_RETENTION_RATIO", given)
        with pytest.raises(OptionError, match=r"\(0, 1\]"):
            loss(None, CONFIG, output, data)


def test_an_empty_micro_batch_keeps_nothing(registered):
    output, data = batch()
    data["response_mask"] = torch.zeros_like(data["response_mask"])
    losses, metrics = registered[1]["tip_soft_or"][1](None, CONFIG, output, data)
    assert not losses.any()
    assert metrics == {"distillation/tip_selected_share": 0.0}
