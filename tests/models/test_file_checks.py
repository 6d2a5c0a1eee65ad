"""What is refused of a model's files before a library loops or allocates by what they say."""

import json
import struct

import pytest
from faults.model_folders import gguf_folder
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_language_model, tiny_model
from transformers import AutoModelForCausalLM, GPTNeoConfig

from tip_analysis.core.errors import ModelError, VocabularyMismatchError
from tip_analysis.models.file_checks import check_sizes
from tip_analysis.models.gguf_files import check_gguf
from tip_analysis.models.head_alone import head_rows, load_head
from tip_analysis.models.loading import load_model
from tip_analysis.rollouts.encoded import encode_prompts
from tip_analysis.rollouts.prompts import Prompt

KINDS = ("qwen3", "llama", "gpt2", "gemma2")


@pytest.fixture
def folder(tmp_path):
    def save(architecture: str = "qwen3"):
        made = tiny_language_model(architecture)
        made.model.save_pretrained(tmp_path / "model")
        made.tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def change(path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


LAYERS = {"gpt2": "n_layer"}
WIDTHS = {"gpt2": "n_embd"}


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize(
    "load", [load_model, head_rows, lambda name: load_head(name, dtype="float32")]
)
def test_layers_without_end_are_refused_before_anything_loops(folder, architecture, load):
    name = LAYERS.get(architecture, "num_hidden_layers")
    model = folder(architecture)
    change(model / "config.json", **{name: 10**9})
    with pytest.raises(ModelError, match=rf"{name} is 1000000000; expected 10000 at most"):
        load(str(model))


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("value", [0, -8])
@pytest.mark.parametrize("names", [WIDTHS, LAYERS])
def test_models_without_width_or_layers_are_refused(folder, architecture, value, names):
    default = "hidden_size" if names is WIDTHS else "num_hidden_layers"
    model = folder(architecture)
    entries: dict = {names.get(architecture, default): value}
    if names is LAYERS:
        entries["layer_types"] = None
    change(model / "config.json", **entries)
    with pytest.raises(ModelError, match=rf"(hidden_size|num_hidden_layers)\W*(is )?{value}"):
        load_model(str(model))


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "intermediate_size"])
def test_a_config_far_larger_than_the_files_is_refused(folder, name):
    model = folder()
    change(model / "config.json", **{name: 10**7})
    with pytest.raises(ModelError, match=r"describes [\d,]+ parameters, but its files hold [\d,]+"):
        load_model(str(model))


def test_buffers_of_any_size_are_refused():
    config = GPTNeoConfig(
        hidden_size=8,
        num_layers=2,
        attention_types=[[["global"], 2]],
        num_heads=2,
        vocab_size=47,
        max_position_embeddings=30_000,
    )
    with pytest.raises(ModelError, match=r"buffers of 1,800,000,\d+ bytes beside 1,000 "):
        check_sizes(AutoModelForCausalLM, config, stored=1000)


@pytest.mark.parametrize(
    "name", ["../../x.safetensors", "/etc/passwd", "a/b.safetensors", "", None]
)
def test_an_index_that_leads_out_is_refused(folder, name):
    model = folder()
    (model / "model.safetensors").unlink()
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ModelError, match=r"the file of lm_head\.weight is"):
        load_model(str(model))


def test_an_attention_of_a_repository_is_refused(folder):
    model = folder()
    change(model / "config.json", attn_implementation="somebody/attention")
    with pytest.raises(ModelError, match="code of a repository"):
        load_model(str(model))


@pytest.mark.parametrize("eos", ["2", [2, "3"], {"a": 1}, True])
def test_an_end_of_sequence_that_is_no_token_is_refused(folder, eos):
    model = folder()
    change(model / "generation_config.json", eos_token_id=eos)
    with pytest.raises(ModelError, match=r"eos_token_id|cannot load the model"):
        load_model(str(model))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"r": 10**9}, "r is 1000000000, but the largest size of its weights is"),
        ({"rank_pattern": {"q_proj": 10**9}}, "q_proj is 1000000000"),
        ({"megatron_config": {}, "megatron_core": "this"}, "Megatron"),
        ({"peft_type": "XLORA", "adapters": {"0": "../../x"}}, "XLORA"),
        ({"layer_replication": [[0, 10**9]]}, "expected 10000 at most"),
    ],
)
def test_adapters_that_ask_for_too_much(folder, tmp_path, entries, says):
    base = folder()
    adapted = get_peft_model(
        tiny_model(vocab_size=47), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter" / "adapter_config.json", **entries)
    with pytest.raises(ModelError, match=says):
        load_model(str(tmp_path / "adapter"))


def test_an_adapter_that_is_its_own_base_is_refused(tmp_path):
    entries = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(entries))
    (tmp_path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(ModelError, match="an adapter too"):
        load_model(str(tmp_path))


def test_a_tokenizer_that_panics_is_one_line(folder, monkeypatch, capfd):
    class PanicException(BaseException):
        pass

    def panic(*_, **__):
        import os

        os.write(2, b"thread '<unnamed>' panicked at src/lib.rs:\nnote: run with RUST_BACKTRACE\n")
        raise PanicException("index out of bounds\nmore")

    model = folder()
    monkeypatch.setattr("tip_analysis.models.weights.AutoTokenizer.from_pretrained", panic)
    with pytest.raises(ModelError, match=r"its tokenizer is broken: index out of bounds$"):
        load_model(str(model))
    assert capfd.readouterr().err == ""


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    return (gguf_folder(tmp_path_factory.mktemp("good") / "gguf") / "model.gguf").read_bytes()


class TestGguf:
    def test_the_elements_of_a_good_file(self, content, tmp_path):
        (tmp_path / "m.gguf").write_bytes(content)
        matrices = 2 * 420 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
        assert check_gguf(tmp_path / "m.gguf") == matrices + 3 * 32

    @pytest.mark.parametrize("at", [8, 16])
    @pytest.mark.parametrize("count", [10**9, 2**63])
    def test_counts_beyond_the_file(self, content, tmp_path, at, count):
        changed = content[:at] + struct.pack("<Q", count) + content[at + 8 :]
        (tmp_path / "m.gguf").write_bytes(changed)
        with pytest.raises(ModelError, match=r"counts .* beyond its end"):
            check_gguf(tmp_path / "m.gguf")

    @pytest.mark.parametrize("length", [0, 3, 5, 30, 1000, 8000])
    def test_files_cut_short(self, content, tmp_path, length):
        (tmp_path / "m.gguf").write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"GGUF file|is empty"):
            check_gguf(tmp_path / "m.gguf")

    def test_layers_without_end(self, content, tmp_path):
        at = content.index(b"block_count") + len(b"block_count") + 4
        changed = content[:at] + struct.pack("<I", 10**9) + content[at + 4 :]
        (tmp_path / "m.gguf").write_bytes(changed)
        with pytest.raises(ModelError, match=r"llama\.block_count is 1000000000"):
            load_model(str(tmp_path / "m.gguf"))


def test_a_prompt_of_tokens_that_the_model_has_no_row_for_is_refused(folder):
    model = load_model(str(folder()))
    model.tokenizer.add_tokens(["<extra>"])
    prompts = [Prompt(id="p", problem="1+1<extra>=")]
    with pytest.raises(VocabularyMismatchError, match=r"'p' holds the token id 47, but .* 47 rows"):
        encode_prompts(prompts, student=model)
