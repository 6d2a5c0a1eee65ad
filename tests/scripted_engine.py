"""An engine that writes what a test says, with a real tokenizer; chat templates in the manner of
real ones."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from small_tokenizers import make_tokenizer

from tip_analysis.core.names import FinishReason, SamplingEngine
from tip_analysis.rollouts.rendering import encode
from tip_analysis.rollouts.sampling import Generation

CHATML_TOOLS = (
    "{%- if tools %}{{ '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}"
    "{{ messages[0].content }}{%- else %}{{ 'You help.' }}{%- endif %}"
    "{{ '\n\n# Tools\n<tools>' }}{%- for tool in tools %}{{ '\n' + (tool | tojson) }}{%- endfor %}"
    "{{ '\n</tools><|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}"
    "{%- endif %}{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- elif not (message.role == 'system' and tools and loop.first) %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
"""As Qwen2.5 has it: tools in the system turn, consecutive tool messages in one user turn."""

LLAMA_3 = (
    "{{ '<|begin_of_text|>' }}{%- for message in messages %}"
    "{%- set role = 'ipython' if message.role == 'tool' else message.role %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + (message.content | trim)"
    " + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
"""As Llama 3 has it: headers, an ipython role, trimmed content."""

DROPS_THOUGHTS = (
    "{%- set last = namespace(query=0) %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set last.query = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    "{%- set parts = message.content.split('</think>') %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{%- if parts | length > 1 and loop.index0 > last.query %}"
    "{{ '<think>\n' + parts[0].split('<think>')[-1].strip('\n') + '\n</think>\n\n' }}{%- endif %}"
    "{{ parts[-1].lstrip('\n') + '<|im_end|>\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + message.content }}"
    "{{ '\n</tool_response><|im_end|>\n' }}"
    "{%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
"""As Qwen3 has it: thoughts of the turns before the last question of the user are dropped."""


def chat_tokenizer(template: str) -> Any:
    """A tokenizer with the special tokens of its template."""
    tokenizer = make_tokenizer.__wrapped__(template)
    if "eot_id" in template:
        headers = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
        tokenizer.add_special_tokens(
            {"eos_token": "<|eot_id|>", "additional_special_tokens": headers}
        )
    return tokenizer


def token_model(tokenizer: Any, context_length: int | None = None) -> Any:
    return SimpleNamespace(
        name="scripted",
        tokenizer=tokenizer,
        vocab_size=len(tokenizer),
        context_length=context_length,
        stop_token_ids=frozenset({tokenizer.eos_token_id}),
        describe=lambda: {"name": "scripted"},
    )


@dataclass
class ScriptedEngine:
    """Writes the k-th text of a rollout in its k-th turn."""

    author: Any
    texts: dict[str, list[str]]
    asked: list[list[str]] = field(default_factory=list)
    prefixes: dict[str, list[list[int]]] = field(default_factory=dict)

    kind = SamplingEngine.HF
    rollouts_per_shard = 4

    def identity(self) -> dict[str, Any]:
        return {}

    def facts(self) -> dict[str, Any]:
        return {}

    def expect(self, longest: int) -> None:
        self.longest = longest

    def generate(self, requests, sampling, advance=None) -> list[Generation]:
        self.asked.append([request.name for request in requests])
        return [self._one(request, sampling) for request in requests]

    def _one(self, request, sampling) -> Generation:
        rollout = request.name.partition("@")[0]
        seen = self.prefixes.setdefault(rollout, [])
        script = self.texts.get(rollout) or self.texts["*"]
        text = script[len(seen)]
        seen.append(list(request.token_ids))
        ids = [*encode(self.author.tokenizer, text), self.author.tokenizer.eos_token_id]
        limit = request.limit(sampling)
        reason = FinishReason.STOP if len(ids) <= limit else FinishReason.LENGTH
        return Generation(ids[:limit], [-1.0] * len(ids[:limit]), reason)

    def update(self, student) -> None:
        pass

    def close(self) -> None:
        pass
