"""The tokenizer of the agent pair, built in code: one token per digit, name, tag or piece of a
call, and a chat template in the manner of ChatML."""

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tip_analysis.demo.agent.language import END, PAD, SPECIAL_TOKENS, TOKEN_ID, UNK, VOCABULARY

MAX_LENGTH = 160
"""Context length of both models, in tokens."""

CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\ntools:{% for tool in tools %} {{ tool.function.name }}"
    "{% endfor %}<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>"
    "{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, as `AutoTokenizer` loads it from the shipped folders."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_ID, unk_token=UNK))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    entries = sorted(VOCABULARY, key=len, reverse=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex("|".join(map(re.escape, entries))), behavior="isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
