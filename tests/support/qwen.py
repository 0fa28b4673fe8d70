"""A random tiny Qwen2.5-VL in Hugging Face form: patches of 6 pixels, 12 pixels a token, a word-level tokenizer."""

import json
import re

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    BatchFeature,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from analysis.refstamps.grammar import vocabulary

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|> <unk>".split()
)
TEXT = """system You are a helpful assistant. user assistant Locate in this image and output the bbox coordinates in
JSON format. {"bbox_2d": [ 0 1 2 3 4 5 6 7 8 9 , ]}"""
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 6,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 12 * 12 * 4, "longest_edge": 12 * 12 * 256},
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}


def tokenizer():
    pieces = re.findall(r"[A-Za-z']+|\d|[^\w\s]+", TEXT)
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*SPECIAL, *pieces, "\n", *vocabulary()]))}
    words = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[A-Za-z']+|\d|[^\w\s]+|\n"), "removed", invert=True)
    words.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[1:-1],
        padding_side="left",
    )


VISION = dict(
    depth=3,
    num_heads=2,
    hidden_size=16,
    intermediate_size=24,
    out_hidden_size=32,
    patch_size=6,
    spatial_merge_size=2,
    temporal_patch_size=2,
)
CLASSES = {
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        dict(window_size=48, fullatt_block_indexes=[2]),
    ),
    "qwen3_vl": (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
    ),
}


@torch.no_grad()
def build(folder, family="qwen2_5_vl"):
    """The model, saved in the folder with its other files."""
    words = tokenizer()
    ids = words.get_vocab()
    config_class, whole_class, more = CLASSES[family]
    config = config_class(
        vision_config=VISION | more,
        text_config=dict(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            initializer_range=0.3,
            max_position_embeddings=1024,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]),
            bos_token_id=None,
            eos_token_id=ids["<|im_end|>"],
            pad_token_id=0,
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    whole = whole_class(config).eval()
    for weight in whole.model.visual.parameters():
        if weight.ndim > 1:
            weight.normal_(0, 0.3)
    whole.generation_config.update(eos_token_id=ids["<|im_end|>"], pad_token_id=0)
    whole.save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return whole


def prepared(folder, images, texts):
    """What transformers' processor makes of images and prompts; its class itself asks for torchvision, for videos."""
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    seen = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=images, return_tensors="pt")
    counts = seen.image_grid_thw.prod(dim=1) // PREPROCESSOR["merge_size"] ** 2
    full = [text.replace("<|image_pad|>", "<|image_pad|>" * n) for text, n in zip(texts, counts.tolist(), strict=True)]
    asked = words(full, padding=True, return_tensors="pt", return_token_type_ids=False)
    kinds = (asked["input_ids"] == words.convert_tokens_to_ids("<|image_pad|>")).int()
    return dict(**asked, **seen, mm_token_type_ids=kinds)


class Processor:
    """As transformers' processor, whose class asks for torchvision."""

    def __init__(self, folder):
        self.folder, self.tokenizer = folder, PreTrainedTokenizerFast.from_pretrained(folder)
        self.batch_decode = self.tokenizer.batch_decode

    def apply_chat_template(self, chats, tokenize=False, processor_kwargs=None, **more):
        def told(chat):
            _, text = chat[0]["content"]
            body = f"<|vision_start|><|image_pad|><|vision_end|>{text['text']}"
            return f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n"

        if not tokenize:
            return told(chats)
        images = [chat[0]["content"][0]["image"] for chat in chats]
        return BatchFeature(prepared(self.folder, images, list(map(told, chats))))
