"""The tiny models' tokenizer: one token per word, and LLaVA's fixed task phrases as one token each.

The text is each model's own to the letter; only its cutting into tokens is coarser than a 32k sentencepiece, because
two cores train on it. A coordinate "0.34" is three tokens: what stands before its digits, and each digit, as in Llama.
All families share the first tokens, so that one can begin with the language model of another.
"""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from analysis.models.base import SYSTEM
from analysis.models.llava import REC_QUESTION
from analysis.models.minigpt_v2 import MiniGPTv2
from analysis.models.shikra import Shikra
from analysis.refstamps.grammar import DESCRIBE, vocabulary

SPACE = "▁"  # stands for a space, as in sentencepiece
# CLIP's text tower takes eos id 2 for the sign of an old bug and then pools elsewhere: </s> must not be id 2
SPECIAL = ("<pad>", "<s>", "<unk>", "</s>", "<image>")
# what a family's prompts and boxes need besides: special tokens, pieces that are no words, text with more words
EXTRA: dict[str, tuple[list[str], list[str], str]] = {
    "llava": ([], [], ""),
    "llava_next": ([], [], ""),
    "shikra": (["<im_start>", "<im_patch>", "<im_end>"], [",0.", ",1.", f"{SPACE}."], f"Answer {Shikra.rec}"),
    "minigpt_v2": (
        [],
        [f"{SPACE}{mark}" for mark in ("[INST]", "[/INST]", "<Img>", "</Img>", "[refer]", "[vqa]", "{<")]
        + ["><", ">}"],
        MiniGPTv2.rec.replace("[refer]", ""),
    ),
    "qwen2_5_vl": (
        [f"<|{mark}|>" for mark in ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")],
        [f'{SPACE}{{"bbox_2d":{SPACE}[', "]}", "You"],
        "system are a helpful assistant user Locate in this image and output the bbox coordinates in JSON format",
    ),
}


def build(family: str = "llava") -> PreTrainedTokenizerFast:
    """A tokenizer for the prompts and answers of a family, a name in `EXTRA`."""
    special, pieces, text = EXTRA[family]
    # a question follows a line break in LLaVA, so its first piece carries no space
    refer = REC_QUESTION.removesuffix(" {}")
    fixed = [*(phrase.replace(" ", SPACE) for phrase in (refer, DESCRIBE)), "List", "Is", "What", "How"]
    words = dict.fromkeys([*re.findall(r"[A-Za-z']+", SYSTEM), "USER", "ASSISTANT", *vocabulary()])
    # a bare SPACE: Llama's token before and after LLaVA's image, where a space or a line break stands alone
    marks = [SPACE, f"{SPACE}[0.", f"{SPACE}[1.", f",{SPACE}0.", f",{SPACE}1.", "]", ".", ",", ":", "?", "\n"]
    known = [*SPECIAL, *fixed, *marks, *"0123456789", *(SPACE + word for word in words)]
    if family != "llava" and family != "llava_next":  # whose questions follow a space
        pieces = [*pieces, *(SPACE + phrase for phrase in fixed)]
    more = re.findall(r"[A-Za-z']+", re.sub(r"<.*?>|\{\}", " ", text))
    between = [f",{SPACE}"] if family == "qwen2_5_vl" else []  # two numbers of a box
    every = [*known, *special, *pieces, *between, *(SPACE + word for word in more)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(every))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    pattern = "|".join(
        [
            *map(re.escape, [*pieces, *fixed]),
            *(rf"{piece}(?=\d)" for piece in between),
            rf",{SPACE}[01]\.",
            rf"{SPACE}\[[01]\.",
            rf"{SPACE}[A-Za-z']+",
            r"\d",
            r"[\].,:?\n]",
            SPACE,
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", *special],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
