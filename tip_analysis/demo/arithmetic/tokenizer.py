"""The tokenizer of the arithmetic pair, built in code: one token per digit, sign or phrase of the
language.

Text is split at the vocabulary's own entries, longest first, so encoding the text of a solution
gives back its tokens; what is no entry becomes `<unk>`. Encoding puts `<bos>` in front; decoding
joins the texts of the tokens as they are.
"""

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tip_analysis.demo.arithmetic.language import BOS, EOS, PAD, TOKEN_ID, UNK, VOCABULARY

MAX_LENGTH = 128
"""Context length of both models, in tokens."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, as `AutoTokenizer` loads it from the shipped folders."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_ID, unk_token=UNK))
    entries = sorted(VOCABULARY, key=len, reverse=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex("|".join(map(re.escape, entries))), behavior="isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, TOKEN_ID[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
