"""What is refused by name when weights are read, and adapters as PEFT saves them."""

import json
import shutil
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_language_model
from zoo import TOKENIZER, zoo_model

from tip_analysis.core.errors import ModelError
from tip_analysis.models.head_alone import head_rows, load_head
from tip_analysis.models.hidden_states import last_hidden_states
from tip_analysis.models.loading import load_model, load_tokenizer
from tip_analysis.models.output_head import model_body
from tip_analysis.rollouts.sampling import Sampling, generate

TOKENS = torch.tensor([[1, 4, 5, 6, 9]])


@pytest.fixture
def folder(tmp_path):
    model = tiny_language_model(tied=False)
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"]
)
def test_a_missing_weight_is_named(folder, name):
    change_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(ModelError, match=f"lack the weight {name}"):
        load_model(str(folder))


def test_a_weight_of_another_shape_is_named(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(7, 32)}))
    with pytest.raises(ModelError, match=rf"{name} is \(7, 32\) in the files, but \(48, 32\)"):
        load_model(str(folder))


def test_weights_that_nobody_uses_are_told(folder, caplog, capfd):
    change_weights(folder, lambda weights: weights.update({"model.other.weight": torch.ones(2)}))
    load_model(str(folder))
    assert "does not use the weight model.other.weight" in caplog.text
    assert "LOAD REPORT" not in capfd.readouterr().err  # one line is enough


def test_a_tied_head_and_buffers_need_not_be_stored(tmp_path):
    model = tiny_language_model(tied=True)
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_model(str(tmp_path), dtype="float32")
    torch.testing.assert_close(loaded.model(TOKENS).logits, model.model(TOKENS).logits)


def test_the_config_of_another_kind_of_model_is_refused(folder, tmp_path):
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    config.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"lack the weight .*Bert"):
        load_model(str(folder))
    bert = transformers.BertLMHeadModel(config)
    shutil.rmtree(tmp_path / "bert", ignore_errors=True)
    bert.save_pretrained(tmp_path / "bert")
    TOKENIZER.save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="no causal language model"):
        load_model(str(tmp_path / "bert"))
    transformers.T5Config(vocab_size=61).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"kind 't5'"):
        load_model(str(folder))


def adapted(folder, target, *, new_tokens=0, **options):
    """An adapter on the model in a folder, saved to `target` as PEFT does it; returns the model."""
    base = load_model(str(folder), dtype="float32").model
    if new_tokens:
        base.resize_token_embeddings(base.vocab_size + new_tokens, mean_resizing=False)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.peft_config["default"].base_model_name_or_path = str(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it says that it saves resized embeddings
        model.save_pretrained(target)
    return model.eval()


def test_an_adapter_without_a_tokenizer_has_its_bases(folder, tmp_path):
    model = adapted(folder, tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("tokenizer*"))
    loaded = load_model(str(tmp_path / "adapter"), dtype="float32")
    assert loaded.tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert load_tokenizer(str(tmp_path / "adapter")).get_vocab() == TOKENIZER.get_vocab()
    torch.testing.assert_close(loaded.model(TOKENS).logits, model(TOKENS).logits)
    assert head_rows(str(tmp_path / "adapter")) == loaded.vocab_size


def test_an_adapter_with_resized_embeddings(folder, tmp_path):
    model = adapted(
        folder, tmp_path / "adapter", new_tokens=3, modules_to_save=["embed_tokens", "lm_head"]
    )
    loaded = load_model(str(tmp_path / "adapter"), dtype="float32")
    assert loaded.vocab_size == head_rows(str(tmp_path / "adapter")) == len(TOKENIZER) + 3
    own = model(TOKENS).logits
    torch.testing.assert_close(loaded.model(TOKENS).logits, own)
    torch.testing.assert_close(loaded.head(last_hidden_states(loaded.model, TOKENS)[0]), own[0])
    assert max(generate(loaded, [[1, 5]], ["a"], Sampling(30))[0].token_ids) < len(TOKENIZER)
    head = load_head(str(tmp_path / "adapter"), dtype="float32")
    torch.testing.assert_close(head.head(last_hidden_states(loaded.model, TOKENS)[0]), own[0])


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_an_embedding_or_the_head(folder, tmp_path, target):
    """PEFT stores such a layer whole beside its adapter."""
    model = adapted(folder, tmp_path / "adapter", target_modules=["q_proj", target])
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(".base_layer." in name for name in stored)
    loaded = load_model(str(tmp_path / "adapter"), dtype="float32")
    own = model(TOKENS).logits
    torch.testing.assert_close(loaded.model(TOKENS).logits, own)
    torch.testing.assert_close(loaded.head(last_hidden_states(loaded.model, TOKENS)[0]), own[0])


def test_an_adapter_that_is_a_pickle_is_refused(folder, tmp_path):
    adapted(folder, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter" / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match="pickle"):
        load_model(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_model.bin").unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        load_model(str(tmp_path / "adapter"))


@pytest.mark.parametrize("what", ["missing", "strange"])
def test_an_adapter_that_does_not_fit_is_refused(folder, tmp_path, what):
    adapted(folder, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    tensor = weights.pop(name)
    if what == "strange":
        weights |= {name: tensor, "base_model.model.model.layers.9.x.lora_A.weight": tensor.clone()}
    save_file(weights, path)
    with pytest.raises(
        ModelError, match="lacks the adapter's weight" if what == "missing" else "no place"
    ):
        load_model(str(tmp_path / "adapter"))


def test_a_message_names_its_cause(folder, tmp_path):
    adapted(folder, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(config.read_text())
    for base, cause in (
        (None, "names no base model"),
        (str(tmp_path / "nowhere"), r"base model|no model"),
    ):
        config.write_text(json.dumps(written | {"base_model_name_or_path": base}))
        with pytest.raises(ModelError, match=cause):
            load_model(str(tmp_path / "adapter"))
    config.write_text(json.dumps(written | {"r": 5}))
    with pytest.raises(ModelError, match=r"size mismatch|shape"):
        load_model(str(tmp_path / "adapter"))
    change_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    config.write_text(json.dumps(written))
    with pytest.raises(ModelError, match=r"base model .*lack the weight model\.norm\.weight"):
        load_model(str(tmp_path / "adapter"))


def two_part_models():
    size = {
        "vocab_size": len(TOKENIZER),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    mllama = size | {"cross_attention_layers": [1], "pad_token_id": 0}
    mrope = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    qwen_vision = {
        "depth": 2,
        "hidden_size": 32,
        "embed_dim": 32,
        "num_heads": 4,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "fullatt_block_indexes": [1],
    }
    llama4 = size | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}
    return {
        "gemma3": transformers.Gemma3Config(
            text_config=size | {"head_dim": 8, "sliding_window": 6}, vision_config=vision
        ),
        "llama4": transformers.Llama4Config(
            text_config=llama4,
            vision_config=vision
            | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        ),
        "mllama": transformers.MllamaConfig(
            text_config=mllama,
            vision_config=vision | {"num_global_layers": 1, "intermediate_layers_indices": [0]},
        ),
        "qwen2_5_vl": transformers.Qwen2_5_VLConfig(
            text_config=size | mrope, vision_config=qwen_vision
        ),
        "mistral3": transformers.Mistral3Config(
            text_config=size | {"head_dim": 8, "model_type": "mistral"},
            vision_config=vision | {"model_type": "pixtral", "head_dim": 8},
        ),
    }


@pytest.mark.parametrize("name", ["gemma3", "llama4", "mllama", "qwen2_5_vl", "mistral3"])
def test_a_model_of_two_parts_is_read_by_its_text(name, tmp_path):
    config = two_part_models()[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="float32")
    with torch.no_grad():
        own = loaded.model(input_ids=TOKENS, use_cache=False).logits[0]
        found = loaded.head(last_hidden_states(loaded.model, TOKENS)[0])
    torch.testing.assert_close(found, own, atol=1e-5, rtol=0)
    inside = {id(parameter) for parameter in model_body(loaded.model).parameters()}
    outside = [key for key, p in loaded.model.named_parameters() if id(p) not in inside]
    assert all(
        "vision" in key or "visual" in key or "projector" in key or "lm_head" in key
        for key in outside
    )
    together = generate(loaded, [[1, 5, 6], [1, 9]], ["a", "b"], Sampling(8))
    assert generate(loaded, [[1, 9]], ["b"], Sampling(8))[0].token_ids == together[1].token_ids


def test_a_bare_llama4_has_a_body():
    model = zoo_model("llama4")
    assert model_body(model) is model.model
