"""Regular expressions of an adapter's config: what ends is peft's to use, the rest is named."""

import json
import time

import pytest
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_language_model, tiny_model

from tip_analysis.core.errors import ModelError
from tip_analysis.models import adapter_patterns
from tip_analysis.models.adapter_patterns import check_patterns
from tip_analysis.models.loading import load_model

NAMES = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(4)]
ENDLESS = r"(model|layers|self_attn|[a-z._0-9]|[a-z._0-9])*X"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(adapter_patterns, "SECONDS", 1.0)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"modules_to_save": ["lm_head", ENDLESS]},
        {"rank_pattern": {ENDLESS: 4}},
        {"layers_pattern": [ENDLESS]},
        {"target_modules": "a*", "corda_config": {"deep": [{"er": ENDLESS}]}},
    ],
)
def test_a_pattern_without_end_is_named(config, impatient):
    before = time.monotonic()
    with pytest.raises(ModelError, match=r"the pattern '\(model\|layers.* does not end within 1 s"):
        check_patterns("adapter_config.json", config, NAMES)
    assert time.monotonic() - before < 60


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|v)_proj",
        "all-linear",
        "(",
        "a{99999999999}",
        "*",
        "\ud800+",
        "x" * 10**5,
        r"(.*\.)*",
    ],
)
def test_other_patterns_are_pefts_to_judge(pattern):
    check_patterns("adapter_config.json", {"target_modules": pattern}, NAMES)


def test_no_process_is_begun_for_plain_names(monkeypatch):
    monkeypatch.setattr(adapter_patterns, "_WORKER", "/nowhere")
    check_patterns("f", {"target_modules": ["q_proj", "v_proj"], "r": 8, "bias": None}, NAMES)


def test_an_adapter_with_a_pattern_is_used_or_refused(tmp_path, impatient):
    base = tiny_language_model()
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=r".*\.(q|v)_proj", task_type="CAUSAL_LM")
    adapted = get_peft_model(tiny_model(vocab_size=base.vocab_size), config)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    assert load_model(str(tmp_path / "adapter")).vocab_size == base.vocab_size
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ENDLESS}))
    with pytest.raises(ModelError, match="does not end within 1 s"):
        load_model(str(tmp_path / "adapter"))
