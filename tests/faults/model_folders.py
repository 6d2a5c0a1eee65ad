"""Model folders and GGUF files from strangers: config, weights, tokenizer, template, index and
adapter, each spoiled in every way that `mutations` knows and in some of its own."""

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from faults.mutations import mutate, spoil
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from small_tokenizers import CHAT_TEMPLATE, make_tokenizer
from tiny_models import ARCHITECTURES, tiny_model

Case = tuple[str, list[str]]
"""What was spoiled, and the command that reads it."""

PROMPT = {"id": "a", "problem": "What is 12 + 34?"}
INDEX = "model.safetensors.index.json"
SIZES = (0, -1, 1, 3, 10**4 + 1, 10**6, 10**9, 2**31, 2**63, 10**30, 1.5, True, None, "2", [], {})
"""What a size or a count may be said to be."""
TEMPLATES = (
    "{{ 1 / 0 }}",
    "{% for",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 'x' * 10000000000 }}",
    "{{ ''.__class__.__mro__ }}",
    "{% include '/etc/passwd' %}",
    "",
    "{{ '\ud83d' }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{{ ('x' * 100000) * 100000 }}",
)

ENDLESS = "(model|[a-z._0-9]|[a-z._0-9])*X"
"""A regular expression that finds nothing in time that doubles with each character."""


def good_folders(folder: Path) -> list[Path]:
    """Tiny models to spoil: five architectures, one of two shards, one adapter, one GGUF file."""
    tokenizer = make_tokenizer()
    made = []
    for architecture in ARCHITECTURES:
        model = tiny_model(architecture, vocab_size=len(tokenizer), tied=architecture != "llama")
        place = folder / architecture
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        made.append(place)
    sharded = folder / "sharded"
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(sharded, max_shard_size="30KB")
    tokenizer.save_pretrained(sharded)
    adapter = folder / "adapter"
    adapted = get_peft_model(
        tiny_model(vocab_size=len(tokenizer)),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "qwen3")
    adapted.save_pretrained(adapter)
    return [*made, sharded, adapter, gguf_folder(folder / "gguf")]


def gguf_folder(folder: Path) -> Path:
    """A llama of one layer in a GGUF file."""
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    vocabulary = make_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]["merges"]
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    shapes = {
        "token_embd": (len(tokens), 32),
        "output_norm": (32,),
        "output": (len(tokens), 32),
        "blk.0.attn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_norm": (32,),
        "blk.0.ffn_gate": (48, 32),
        "blk.0.ffn_up": (48, 32),
        "blk.0.ffn_down": (32, 48),
    }
    numbers = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numbers.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def model_cases(seed: int, number: int, goods: list[Path], folder: Path) -> Iterator[Case]:
    """Copies of good models of which one file is spoiled, and a rollout with each."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "p.jsonl"
    prompts.write_text(json.dumps(PROMPT))
    for index in range(number):
        rng = random.Random(f"models {seed} {index}")
        good = rng.choice(goods)
        model = folder / f"model-{index}"
        shutil.copytree(good, model)
        what = spoil_model(model, rng)
        named = model / "model.gguf" if good.name == "gguf" else model
        run = folder / f"run-{index}"
        command = ["rollout", str(run), "--student", str(named), "--prompts", str(prompts)]
        command += ["--num-rollouts", "1", "--max-new-tokens", "2"]
        command += ["--device", "cpu", "--dtype", "float32"]
        yield f"model {index} {good.name} {what}", command
        shutil.rmtree(model)
        shutil.rmtree(run, ignore_errors=True)


def spoil_model(model: Path, rng: random.Random) -> str:
    """Spoil one thing of a model; says what."""
    ways: dict[str, Callable[[Path, random.Random], str]] = {"bytes": _any_bytes}
    if (model / "model.gguf").is_file():
        ways |= {"gguf": _gguf_numbers, "more gguf": _gguf_numbers}
    elif (model / "adapter_config.json").is_file():
        ways |= {"adapter": _adapter_config, "header": _header}
    else:
        ways |= {"config": _config, "sizes": _sizes, "header": _header, "json": _any_json}
        ways |= {"template": _template, "tokenizer": _tokenizer, "index": _index}
    return rng.choice(list(ways.values()))(model, rng)


def _any_bytes(model: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(path for path in model.iterdir() if path.suffix != ".md"))
    content = path.read_bytes()
    if rng.random() < 0.2:
        path.write_bytes(rng.choice([b"", b"{}", b"[]", b"null", b"\x80\x02K\x01.", content[:9]]))
    else:
        path.write_bytes(spoil(content, rng))
    return f"bytes of {path.name}"


def _change(path: Path, rng: random.Random, change: Callable[[Any], Any] | None = None) -> str:
    value = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for _ in range(rng.choice([1, 1, 1, 3])):
        value = mutate(value, rng) if change is None else change(value)
    path.write_text(json.dumps(value), "utf-8")
    return path.name


def _config(model: Path, rng: random.Random) -> str:
    return _change(model / "config.json", rng)


def _adapter_config(model: Path, rng: random.Random) -> str:
    if rng.random() < 0.5:
        return _change(model / "adapter_config.json", rng)
    names = ["r", "lora_alpha", "rank_pattern", "base_model_name_or_path", "peft_type"]
    name = rng.choice([*names, "target_modules", "exclude_modules", "modules_to_save"])
    values = [*SIZES, {"q_proj": 10**9}, "../../x", str(model), "PREFIX_TUNING", "IA3", ENDLESS]
    value = rng.choice(values)
    return f"{name} {value} in " + _change(
        model / "adapter_config.json", rng, lambda config: config | {name: value}
    )


def _sizes(model: Path, rng: random.Random) -> str:
    """One count or size of a config."""
    path = model / "config.json"
    config = json.loads(path.read_text("utf-8"))
    names = [name for name, value in config.items() if isinstance(value, int)]
    name, value = rng.choice([*names, "quantization_config", "transformers_weights"]), None
    value = rng.choice([*SIZES, "../../x.safetensors", {"quant_method": "gptq", "bits": 4}])
    path.write_text(json.dumps(config | {name: value}))
    return f"{name} {value}"


def _any_json(model: Path, rng: random.Random) -> str:
    names = ["generation_config.json", "tokenizer_config.json", INDEX, "chat_template.json"]
    return _change(model / rng.choice(names), rng)


def _template(model: Path, rng: random.Random) -> str:
    template = rng.choice(TEMPLATES) if rng.random() < 0.7 else None
    text = spoil(CHAT_TEMPLATE.encode(), rng) if template is None else None
    content = text or (template or "").encode("utf-8", "surrogatepass")
    (model / "chat_template.jinja").write_bytes(content)
    return f"template {(template or 'spoiled')[:30]}"


def _tokenizer(model: Path, rng: random.Random) -> str:
    return _change(model / "tokenizer.json", rng)


def _index(model: Path, rng: random.Random) -> str:
    """An index that leads elsewhere."""
    outside = rng.choice(["../../x", "../x.safetensors", "/etc/passwd", "model.bin", "", "~", None])
    path = model / INDEX
    index = json.loads(path.read_text()) if path.is_file() else {"metadata": {}, "weight_map": {}}
    weights = index["weight_map"] or {"lm_head.weight": ""}
    weights[rng.choice(sorted(weights))] = outside
    path.write_text(json.dumps(index | {"weight_map": weights}))
    if rng.random() < 0.7:
        (model / "model.safetensors").unlink(missing_ok=True)
    return f"index to {outside}"


def _header(model: Path, rng: random.Random) -> str:
    """The header of a safetensors file: its length, or what it says."""
    path = rng.choice(sorted(model.glob("*.safetensors")))
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    if rng.random() < 0.3:
        wrong = rng.choice([0, 1, size - 1, size + 1, 10**8 + 1, 2**31, 2**63, 2**64 - 1])
        path.write_bytes(struct.pack("<Q", wrong) + content[8:])
        return f"header of {wrong} bytes"
    header = json.loads(content[8 : 8 + size])
    name = rng.choice([name for name in header if name != "__metadata__"])
    change = rng.choice(["dtype", "shape", "offsets", "drop", "any"])
    if change == "dtype":
        header[name]["dtype"] = rng.choice(["I32", "U32", "BF16", "F64", "F8_E4M3", "Q4", "", 7])
    elif change == "shape":
        header[name]["shape"] = rng.choice([[], [0], [-1], [2**40, 2**40], [10**30], "x", None])
    elif change == "offsets":
        header[name]["data_offsets"] = rng.choice([[0, 2**63], [5, 1], [-1, 4], [], [0, 4]])
    elif change == "drop":
        del header[name]
    else:
        header = mutate(header, rng)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return f"{change} of {name}"


def _gguf_numbers(model: Path, rng: random.Random) -> str:
    """A count, a length or an offset of a GGUF file: eight or four bytes near its beginning, near
    its keys, or anywhere in its metadata."""
    path = model / "model.gguf"
    content = bytearray(path.read_bytes())
    keys = [b"block_count", b"head_count", b"embedding_length", b"tokens", b"merges", b"vocab_size"]
    keys += [b"token_embd.weight", b"ffn_up.weight", b"eos_token_id", b"attn_q.weight"]
    key = rng.choice(keys)
    after = content.index(key) + len(key)
    at = rng.choice([4, 8, 16, 24, after, after + 4, after + 8, rng.randrange(len(content) // 4)])
    form = rng.choice(["<I", "<Q"])
    value = rng.choice([0, 1, 7, 10**4, 10**6, 10**9, 2**31, 2**32 - 1])
    content[at : at + struct.calcsize(form)] = struct.pack(form, value)
    path.write_bytes(content)
    return f"{value} at {at} ({key.decode()})"


def write_weights_outside(path: Path) -> None:
    """A sound safetensors file that a strange index may point at."""
    import torch

    save_file({"lm_head.weight": torch.ones(2, 2)}, path)
