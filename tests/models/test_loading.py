import json
from pathlib import Path

import pytest
import torch
from small_tokenizers import make_tokenizer
from tiny_models import tiny_language_model, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tip_analysis.core.errors import (
    ModelError,
    OptionError,
    UnknownNameError,
    VocabularyMismatchError,
)
from tip_analysis.demo.arithmetic.tokenizer import build_tokenizer
from tip_analysis.models.hidden_states import last_hidden_states
from tip_analysis.models.loading import (
    load_model,
    resolve_device,
    shared_vocabulary,
    token_texts,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from tip_analysis.models.locating import smollm2_path
from tip_analysis.models.output_head import causal_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_saved_folder_loads_as_it_was(saved):
    loaded = load_model(str(saved), dtype="float32", device="cpu")
    original = tiny_model(vocab_size=loaded.vocab_size)
    assert weights_fingerprint(loaded.model) == weights_fingerprint(original)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.stop_token_ids == {2}
    assert loaded.context_length == 128
    description = loaded.describe()
    assert description["architecture"] == "Qwen3ForCausalLM"
    assert description["vocab_size"] == 47
    assert json.loads(json.dumps(description)) == description


def test_a_lora_adapter_folder_loads_on_its_base(saved, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = load_model(str(saved), dtype="float32", device="cpu")
    adapted = get_peft_model(
        base.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.peft_config["default"].base_model_name_or_path = str(saved)
    adapted.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="float32", device="cpu")
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        own = adapted(tokens).logits[0]
        torch.testing.assert_close(loaded.head(last_hidden_states(loaded.model, tokens)[0]), own)
        plain = load_model(str(saved), dtype="float32", device="cpu").model(tokens).logits[0]
        assert not torch.allclose(own, plain)
    assert type(causal_model(loaded.model)).__name__ == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "no model at"),
        ("./nothing.gguf", "no such GGUF file"),
        ("arithmetic-techer", "did you mean 'arithmetic-teacher'"),
        ("no-such-name-anywhere", "cannot load the model 'no-such-name-anywhere'"),
    ],
)
def test_unknown_models_are_refused_in_one_line(name, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ModelError, UnknownNameError), match=message) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_never_read(saved, tmp_path):
    for file in Path(saved).iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(tiny_model(vocab_size=47).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(tmp_path), device="cpu")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"without config\.json"):
        load_model(str(tmp_path))


def test_unknown_dtypes_and_devices_are_refused(saved):
    with pytest.raises(UnknownNameError, match="bfloat16"):
        load_model(str(saved), dtype="bf16")
    with pytest.raises(OptionError, match="--device"):
        resolve_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match="0 CUDA devices"):
            resolve_device("cuda:0")


def test_smollm2_is_found_by_its_metadata_or_named_in_the_error(monkeypatch):
    from tip_analysis.models import locating as module

    def absent(name):
        raise module.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.metadata, "files", absent)
    with pytest.raises(ModelError, match="make smollm2"):
        smollm2_path()


def test_heads_padded_to_different_sizes_share_the_smaller():
    assert (
        shared_vocabulary(tiny_language_model(padding_rows=17), tiny_language_model(padding_rows=5))
        == 52
    )


def test_other_vocabularies_are_refused_by_the_first_token_that_differs():
    ours = tiny_language_model(name="ours")
    vocabulary = dict(ours.tokenizer.get_vocab())
    swapped = vocabulary | {"7": vocabulary["8"], "8": vocabulary["7"]}
    theirs = tiny_language_model(name="theirs", tokenizer=word_tokenizer(swapped))
    with pytest.raises(
        VocabularyMismatchError,
        match=rf"token id {vocabulary['7']} is '7' for the student and '8' for the teacher",
    ):
        shared_vocabulary(ours, theirs)
    larger = tiny_language_model(
        name="larger", tokenizer=word_tokenizer(vocabulary | {"extra": len(vocabulary)})
    )
    with pytest.raises(
        VocabularyMismatchError, match=r"is None for the student and 'extra' for the teacher"
    ):
        shared_vocabulary(ours, larger)


def test_a_head_smaller_than_the_vocabulary_is_refused():
    small = tiny_language_model(padding_rows=-3)
    with pytest.raises(VocabularyMismatchError, match="has only 44 rows"):
        shared_vocabulary(small, small)


def test_fingerprints_tell_models_and_tokenizers_apart():
    assert weights_fingerprint(tiny_model(seed=0)) == weights_fingerprint(tiny_model(seed=0))
    assert weights_fingerprint(tiny_model(seed=0)) != weights_fingerprint(tiny_model(seed=1))
    assert tokenizer_fingerprint(build_tokenizer()) == tokenizer_fingerprint(build_tokenizer())
    assert tokenizer_fingerprint(word_tokenizer({"a": 0, "b": 1})) != tokenizer_fingerprint(
        word_tokenizer({"a": 1, "b": 0})
    )


def test_token_texts_keep_the_space_before_a_word():
    tokenizer = make_tokenizer()
    ids = tokenizer("sold half as", add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts[token] for token in ids) == "sold half as"


def word_tokenizer(vocabulary):
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.real_model
def test_smollm2_loads_dequantized():
    loaded = load_model("smollm2-135m-instruct", device="cpu")
    assert loaded.vocab_size == 49152
    assert loaded.context_length == 8192
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008
    assert loaded.tokenizer.chat_template
