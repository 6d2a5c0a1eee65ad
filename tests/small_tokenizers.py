"""Real tokenizers, built in a moment: byte-level BPE trained on a few sentences, with and without a
chat template."""

from functools import cache

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "Natalia sold clips to 48 of her friends, and then she sold half as many clips in May.",
    "user\nWhat is 12 + 34?\nassistant\nThe answer is \\boxed{46}. So 12 + 34 = 46.",
    (
        "system\nYou are a helpful assistant.\n\nPlease reason step by step, and put your final"
        " answer within \\boxed{}."
    ),
    "Reference solution:\nNow solve the problem step by step in your own words.",
    (
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call> tool_response <think>'
        " </think>"
    ),
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool'"
    " %}<|im_start|>user\n<tool_response>\n{{ message.content }}\n</tool_response><|im_end|>\n{%"
    " else %}<|im_start|>{{ message.role }}\n{{ message.content }}{% for call in message.tool_calls"
    " or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endif"
    " %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is"
    " defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""ChatML, as SmolLM2 and Qwen have it, with tool turns and Qwen3's switch."""

DEFAULT_SYSTEM_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful"
    " assistant.<|im_end|>\n{% endif %}" + CHAT_TEMPLATE
)
"""With the system turn that Qwen2.5 and SmolLM2 put in where there is none."""

GENERATION_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant'"
    " %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}{% else %}{{"
    " message.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt"
    " %}<|im_start|>assistant\n{% endif %}"
)
"""With generation blocks, from which the assistant's tokens can be told."""

ALTERNATING_TEMPLATE = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""One that refuses a system turn and trims what it is given."""

BOS_TEMPLATE = "{{ bos_token }}" + CHAT_TEMPLATE
"""One that writes the beginning-of-sequence token itself."""


@cache
def make_tokenizer(
    chat_template: str | None = CHAT_TEMPLATE,
    *,
    adds_bos: bool = False,
    adds_eos: bool = False,
    lowercase: bool = False,
) -> PreTrainedTokenizerFast:
    """A tokenizer of some 400 tokens that can write any text; `lowercase` makes one that cannot
    give back what it read."""
    backend = Tokenizer(models.BPE())
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    if adds_bos or adds_eos:
        frame = f"{'<|endoftext|> ' if adds_bos else ''}$A{' <|im_end|>' if adds_eos else ''}"
        backend.post_processor = processors.TemplateProcessing(
            single=frame, special_tokens=[(SPECIAL[0], 0), (SPECIAL[2], 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        additional_special_tokens=[SPECIAL[1]],
        chat_template=chat_template,
    )
