import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny_models import tiny_language_model

from tip_analysis.models.loading import LanguageModel, load_model
from tip_analysis.models.output_head import OutputHead
from tip_analysis.rollouts.engines.handed_weights import changed, own_logprobs, write_weights

SEQUENCE = [1, 4, 9, 12, 7, 30, 2]


def loaded(folder, student):
    student.tokenizer.save_pretrained(folder)
    return load_model(str(folder), dtype="float32", device="cpu")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2"])
def test_what_is_written_is_the_model_with_a_head_of_its_own(tmp_path, architecture, tied):
    student = tiny_language_model(architecture, tied=tied)
    write_weights(student, tmp_path)
    again = loaded(tmp_path, student)
    torch.testing.assert_close(own_logprobs(again, SEQUENCE), own_logprobs(student, SEQUENCE))
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    head = again.model.get_output_embeddings().weight
    assert head is not again.model.get_input_embeddings().weight
    assert student.model.config.tie_word_embeddings == tied  # the student itself is as it was


def test_shards_with_an_index_name_the_head_too(tmp_path):
    student = tiny_language_model()
    student.model.save_pretrained(tmp_path / "plain")
    saved = student.model.save_pretrained

    def in_shards(folder):
        saved(folder, max_shard_size="20KB")

    student.model.save_pretrained = in_shards
    write_weights(student, tmp_path / "cut")
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    name = index["weight_map"]["lm_head.weight"]
    with safe_open(tmp_path / "cut" / name, framework="pt") as file:
        assert torch.equal(file.get_tensor("lm_head.weight"), student.head.linear.weight)
    torch.testing.assert_close(
        own_logprobs(loaded(tmp_path / "cut", student), SEQUENCE), own_logprobs(student, SEQUENCE)
    )


def test_an_adapter_is_merged_into_a_copy(tmp_path):
    student = tiny_language_model("llama")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(student.model, config).eval()
    student = LanguageModel("adapted", adapted, student.tokenizer, OutputHead(adapted))
    kept = {name: value.clone() for name, value in adapted.state_dict().items()}
    write_weights(student, tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    torch.testing.assert_close(
        own_logprobs(loaded(tmp_path, student), SEQUENCE),
        own_logprobs(student, SEQUENCE),
        atol=1e-4,
        rtol=1e-4,
    )
    assert all(torch.equal(value, kept[name]) for name, value in adapted.state_dict().items())


def test_changed_weights_all_differ_and_come_back(tmp_path):
    student = tiny_language_model()
    kept = [parameter.clone() for parameter in student.model.parameters()]
    before = own_logprobs(student, SEQUENCE)
    with changed(student.model):
        pairs = zip(student.model.parameters(), kept, strict=True)
        assert not any(torch.equal(parameter, old) for parameter, old in pairs)
        assert (own_logprobs(student, SEQUENCE) - before).abs().median() > 0.1
    assert all(
        torch.equal(parameter, old)
        for parameter, old in zip(student.model.parameters(), kept, strict=True)
    )
