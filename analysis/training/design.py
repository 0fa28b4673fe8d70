"""The embedded models' sizes and configurations: one place that says how the testbed is built.

All follow real models' values where a tiny one can: learned absolute position embeddings in a plain CLIP, whose
second-last layer is read, rotary base 10,000, a two-layer connector. Fixed beforehand, from those and from pilots; see
the cards.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn
from transformers import (
    Blip2VisionConfig,
    CLIPConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from analysis import models
from analysis.models.base import ATTENTION, Model
from analysis.models.minigpt_v2 import MiniGPTv2Config
from analysis.models.shikra import ShikraConfig
from analysis.training.tokenizer import build as build_tokenizer

IMAGE, PATCH = 192, 12  # pixels: the side of a padded scene, and of a patch
GRID = IMAGE // PATCH  # 16 x 16 patches
PINPOINTS = [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]]  # height, width of LLaVA-NeXT's mosaics: two tiles for every scene
FAMILY = {  # of an embedded model, a name in `models.FAMILIES`
    "tiny-llava": "llava",
    "tiny-llava-wide": "llava",
    "tiny-llava-next": "llava_next",
    "tiny-shikra": "shikra",
    "tiny-minigpt-v2": "minigpt_v2",
    "tiny-qwen2.5-vl": "qwen2_5_vl",
}
TOWER = {
    "minigpt_v2": "tiny-eva",
    "qwen2_5_vl": "tiny-qwen-tower",
}  # families whose tower is no CLIP: the stage of theirs
# Qwen2.5-VL: 12 pixels a token as in the others, images in their own shape
QWEN = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": PATCH // 2,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": PATCH**2 * 16, "longest_edge": PATCH**2 * GRID**2},
    "image_mean": list(OPENAI_CLIP_MEAN),
    "image_std": list(OPENAI_CLIP_STD),
}


def clip_config(vocab: int) -> CLIPConfig:
    """The tiny CLIP's sizes; the text tower reads the tokenizer's ids."""
    vision = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
                  image_size=IMAGE, patch_size=PATCH)  # fmt: skip
    text = dict(vocab_size=vocab, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=40, bos_token_id=1, eos_token_id=3, pad_token_id=0)  # fmt: skip
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)


def text_config(vocab: int, width: int, layers: int) -> LlamaConfig:
    """The decoder's sizes: heads of 32, and Llama's rotary base."""
    return LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=width // 32, max_position_embeddings=2048,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=3, pad_token_id=0,
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0),
    )  # fmt: skip


def eva_config(vision) -> Blip2VisionConfig:
    """MiniGPT-v2's tower in the tiny CLIP's sizes."""
    return Blip2VisionConfig(
        hidden_size=vision.hidden_size, intermediate_size=vision.intermediate_size, image_size=IMAGE, patch_size=PATCH,
        num_hidden_layers=vision.num_hidden_layers, num_attention_heads=vision.num_attention_heads,
    )  # fmt: skip


def qwen_vision(vision) -> Qwen2_5_VLVisionConfig:
    """Qwen2.5-VL's tower in about the tiny CLIP's sizes: two layers in windows of 8 x 8 tokens, two over the image."""
    return Qwen2_5_VLVisionConfig(
        depth=4, hidden_size=vision.hidden_size, intermediate_size=3 * vision.hidden_size, num_heads=4,
        out_hidden_size=128, patch_size=QWEN["patch_size"], spatial_merge_size=QWEN["merge_size"],
        temporal_patch_size=QWEN["temporal_patch_size"], window_size=8 * PATCH, fullatt_block_indexes=[1, 3],
    )  # fmt: skip


def qwen_config(tokenizer: PreTrainedTokenizerBase, vision: Qwen2_5_VLVisionConfig) -> Qwen2_5_VLConfig:
    """The decoder is tiny-llava's in size, with M-RoPE over (t, row, column)."""
    sizes = text_config(len(tokenizer), 128, 5)
    keys = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
            " max_position_embeddings pad_token_id")  # fmt: skip
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
           for name in ("im_end", "image_pad", "video_pad", "vision_start", "vision_end")}  # fmt: skip
    return Qwen2_5_VLConfig(
        vision_config=vision.to_dict(), tie_word_embeddings=False,
        text_config={key: getattr(sizes, key) for key in keys.split()} | dict(
            bos_token_id=None, eos_token_id=ids["im_end"], tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[4, 6, 6])),
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
    )  # fmt: skip


def config_of(name: str, tokenizer: PreTrainedTokenizerBase, vision) -> PreTrainedConfig:
    """The configuration of an embedded model on its tower's, a CLIP's or what `TOWER` names.

    `clip` in it names the folder beside it, for pruners that read words.
    """
    if family_of(name) == "qwen2_5_vl":
        return qwen_config(tokenizer, vision)
    size = (192, 6) if name.startswith("tiny-llava-wide") else (128, 5)
    common = dict(text_config=text_config(len(tokenizer), *size), clip="tiny-clip", image_seq_length=GRID * GRID,
                  tie_word_embeddings=False)  # fmt: skip
    family = family_of(name)
    image = tokenizer.convert_tokens_to_ids("<im_patch>" if family == "shikra" else "<image>")
    match family:
        case "llava":
            return LlavaConfig(vision_config=vision, image_token_index=image, **common)
        case "llava_next":
            return LlavaNextConfig(vision_config=vision, image_token_index=image, image_grid_pinpoints=PINPOINTS,
                                   frame="resized", **common)  # fmt: skip
        case "shikra":
            return ShikraConfig(vision_config=vision, image_token_index=image, **common)
        case "minigpt_v2":
            return MiniGPTv2Config(vision_config=vision, image_token_index=image, **common)
    raise ValueError(f"{name} has no configuration")


def family_of(name: str) -> str:
    """A name in `models.FAMILIES`; "tiny-llava-seed1" is of tiny-llava's."""
    return FAMILY[name.split("-seed")[0]]


def write_rest(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """What a checkpoint's folder holds besides configuration and weights."""
    tokenizer.save_pretrained(folder)
    if config.model_type == "qwen2_5_vl":
        (folder / "preprocessor_config.json").write_text(json.dumps(QWEN, indent=2) + "\n")
        return
    side = config.vision_config.image_size
    size = dict(height=side, width=side)
    settings = dict(image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD, size=size)
    if config.model_type == "llava_next":
        settings |= dict(size=dict(shortest_edge=side), crop_size=size, image_grid_pinpoints=PINPOINTS)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def build(name: str, tower: nn.Module, folder: Path, device="cpu") -> tuple[nn.Module, Model]:
    """A model with a frozen tower and the rest random: whole, and as its adapter sees it.

    tower: the tiny CLIP's vision model, or the stage's in `TOWER`; folder: where the adapter finds tokenizer and
    preprocessor, which are written there.
    """
    family = models.FAMILIES[family_of(name)]
    tokenizer = build_tokenizer(family_of(name))
    config = config_of(name, tokenizer, tower.config)
    whole = family.whole_class(config)[0](config)
    (whole.model.visual if config.model_type == "qwen2_5_vl" else whole.model.vision_tower).load_state_dict(
        tower.state_dict()
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_rest(folder, config, tokenizer)
    whole.set_attn_implementation(ATTENTION)
    model = family.assemble(whole, source=str(folder), name=name, revision="", device=str(device))
    for part in (model.decoder, model.connector, model.head, model.embed):
        part.requires_grad_(True)
    if config.model_type == "llava_next":
        whole.model.image_newline.requires_grad_(True)
    return whole, model
