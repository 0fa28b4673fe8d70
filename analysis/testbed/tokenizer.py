"""The tiny models' tokenizer: one token per word, and LLaVA's fixed task phrases as one token each.

The text is LLaVA's to the letter; only its cutting into tokens is coarser than a 32k sentencepiece, because two cores
train on it. A coordinate "0.34" is three tokens: what stands before its digits, and each digit, as in Llama.
"""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..models.llava import SYSTEM
from .grammar import DESCRIBE, REFER, vocabulary

# CLIP's text tower takes eos id 2 for the sign of an old bug and then pools elsewhere: </s> must not be id 2
SPECIAL = ("<pad>", "<s>", "<unk>", "</s>", "<image>")


def build() -> PreTrainedTokenizerFast:
    space = "▁"  # stands for a space, as in sentencepiece
    # a question follows a line break, so its first piece carries no space
    fixed = [*(phrase.replace(" ", space) for phrase in (REFER, DESCRIBE)), "List", "Is", "What", "How"]
    words = dict.fromkeys([*re.findall(r"[A-Za-z']+", SYSTEM), "USER", "ASSISTANT", *vocabulary()])
    marks = [f"{space}[0.", f"{space}[1.", f",{space}0.", f",{space}1.", "]", ".", ",", ":", "?", "\n"]
    pieces = [*SPECIAL, *fixed, *marks, *"0123456789", *(space + word for word in words)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    pattern = "|".join([*map(re.escape, fixed), rf",{space}[01]\.", rf"{space}\[[01]\.", rf"{space}[A-Za-z']+", r"\d",
                        r"[\].,:?\n]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", additional_special_tokens=["<image>"], padding_side="left",
                                   clean_up_tokenization_spaces=False)
