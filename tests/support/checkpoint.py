"""A random tiny LLaVA in Hugging Face form, and noise to show it."""

import re

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedTokenizerFast

from analysis.models.llava import Llava

WORDS = "the a red blue cat dog cup left right of [ ] 0 . , " + " ".join(map(str, range(1, 10)))


def pieces(text):
    """The words of a prompt, as the tokenizer below cuts it."""
    return re.findall(r"</?s>|<im_\w+>|\w+|[^\w\s]+", text)


def tokenizer(more=""):
    """Word level, with the words of the prompt and of `more`; special tokens as LLaVA has them, and those in `more`."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    text = re.findall(r"\w+|[^\w\s]", Llava.chat.format(Llava.rec).replace("<image>", ""))
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(special + text + WORDS.split() + pieces(more)))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", *re.findall(r"<im_\w+>", more)],
    )


def config(words, **vision):
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            initializer_factor=20.0,
            **vision,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        clip="random-clip",
    )


def clip(words):
    """Its CLIP: the same tower's shape, and a text tower that reads the same words."""
    vision = config(words).vision_config.to_dict() | {"initializer_factor": 20.0}
    text = dict(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_factor=20.0,
    )
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=6))


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@torch.no_grad()
def saved(whole, words, folder):
    """The model with random statistics where it has some, ready to be compared; it and its words are in the folder."""
    for statistics in (buffer for name, buffer in whole.named_buffers() if "running" in name):
        statistics.uniform_(0.5, 2)
    whole.save_pretrained(folder)
    words.save_pretrained(folder)
    return whole.eval()
