"""Qwen2.5-VL: a window-attention tower for images of any size, 2 x 2 merger, Qwen2.5 decoder with M-RoPE
(arXiv:2502.13923, github.com/QwenLM/Qwen2.5-VL).

Facts this file fixes, as in transformers and the report: the image is resized to multiples of a token's side (28
pixels) within the processor's bounds on its area, its aspect nearly kept; a token is 2 x 2 patches. Visual IDs are the
planes (0, row, column), and the text goes on after the longer side. The prompt is the chat template with the system
message that it sets where there is none; the image comes first. A box is answered in JSON, in whole pixels of the
*resized* image.

There is no [CLS] and no text tower: of the methods here "random", "spatial" and "divprune" can run.

What a tokenizer for it must have (a tiny one, `training.tokenizer.build`): the special tokens <|im_start|>, <|im_end|>
(which ends an answer: eos_token), <|vision_start|>, <|vision_end|>, <|image_pad|> and <|video_pad|>; a pad_token; no
bos_token is used. Between special tokens the prompt has these texts, each tokenized by itself: "system\\nYou are a
helpful assistant.", "\\n", "user\\n", "Locate {} in this image and output the bbox coordinates in JSON format." and
"assistant\\n". The answer is '{"bbox_2d": [12, 34, 56, 78]}' before <|im_end|>: pieces '{"bbox_2d": [', ', ', ']}' and
digits, all without a space before them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from analysis.models import base, towers
from analysis.rec.boxes import resized_to_tokens
from analysis.types import Signals, VisualTokens

_SPECIAL = re.compile(r"(<\|[a-z_]+\|>)")


def _no_text_tower() -> NoReturn:
    raise AttributeError("Qwen2.5-VL has no CLIP whose words its patches compare with")


@dataclass(frozen=True, kw_only=True)
class Qwen2_5VL(base.Model):
    """See `base.Model`. processor: transformers' own, which resizes and cuts into patches."""

    processor: Qwen2VLImageProcessorPil
    frame: str

    image = "<|vision_start|><|image_pad|><|vision_end|>"
    ask_for = f"{image}{{}}"
    rec = f"{image}Locate {{}} in this image and output the bbox coordinates in JSON format."
    box_format, token_frame = "qwen2_5_vl", "resized"

    def layout(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tokens. Raises ValueError for an image too long or too thin."""
        super().layout(size)
        sizes, side = self.processor.size, self.processor.patch_size * self.processor.merge_size
        width, height = resized_to_tokens(size, side, sizes["shortest_edge"], sizes["longest_edge"])
        return height // side, width // side

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Input of the tower, [B, patches, values of a patch], for images of one layout."""
        seen = self.processor([image.convert("RGB") for image in images], return_tensors="pt")
        return seen.pixel_values.unflatten(0, (len(images), -1)).to(self.device, self.dtype)

    def see(self, pixels: Tensor, size: tuple[int, int]) -> VisualTokens:
        grid, count, merge = self.layout(size), len(pixels), self.processor.merge_size
        grids = torch.tensor([[1, *(merge * side for side in grid)]] * count, device=self.device)
        output = self.tower(pixels[:, : merge**2 * grid[0] * grid[1]].flatten(0, 1), grid_thw=grids)
        patches = towers.merged_patches(self.tower, output.last_hidden_state, grids)
        return VisualTokens(
            output.pooler_output.unflatten(0, (count, -1)),
            grid,
            Signals(patches=lambda: patches.unflatten(0, (count, -1))),
            towers.merger(self.tower),
            ids=towers.grid_ids(*grid, device=self.device),
        )

    def texts(self, expressions: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
        return {}

    def split(self, message: str, words: str) -> tuple[Tensor, Tensor]:
        sides = self.chat.format(message).split("<|image_pad|>")
        if len(sides) != 2:
            raise ValueError(f"a prompt needs exactly one image {self.image!r}, got {len(sides) - 1} in {message!r}")
        made = []
        for side in sides:
            ids = []
            for part in filter(None, _SPECIAL.split(side)):
                special = _SPECIAL.fullmatch(part)
                text = part.replace("{}", words)
                ids += [self.tokenizer.convert_tokens_to_ids(part)] if special else base.plain_ids(self.tokenizer, text)
            made.append(torch.tensor(ids, device=self.device))
        return made[0], made[1]


def whole_class(config) -> tuple[type, dict]:
    """See `llava.whole_class`. No method here asks for the tower's attention, so that it need not be eager."""
    kernels = dict(base.ATTENTION, vision_config="sdpa")
    return Qwen2_5_VLForConditionalGeneration, dict(attn_implementation=kernels)


def assemble(
    whole: Qwen2_5_VLForConditionalGeneration, source: str, name: str, revision: str, device: str
) -> Qwen2_5VL:
    """See `base.parts` for the arguments. OSError where there is no preprocessor_config.json; ValueError for a
    tokenizer that lacks one of the special tokens."""
    whole = whole.to(device).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    known = tokenizer.get_vocab()
    marks = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    if absent := [mark for mark in marks if mark not in known]:
        raise ValueError(f"{name}: the tokenizer lacks {', '.join(absent)}")
    processor = Qwen2VLImageProcessorPil.from_pretrained(source, local_files_only=True)
    vision, side = whole.config.vision_config, processor.patch_size * processor.merge_size
    if (vision.patch_size, vision.spatial_merge_size) != (processor.patch_size, processor.merge_size):
        raise ValueError(
            f"{name}: preprocessor_config.json cuts patches of {processor.patch_size} pixels and merges "
            f"{processor.merge_size}, config.json says {vision.patch_size} and {vision.spatial_merge_size}"
        )
    return Qwen2_5VL(
        name=name,
        revision=revision,
        grid=None,
        tower=whole.model.visual,
        connector=whole.model.visual.merger,
        decoder=whole.model.language_model,
        head=whole.lm_head,
        embed=whole.get_input_embeddings(),
        tokenizer=tokenizer,
        image_token=whole.config.image_token_id,
        eos=known["<|im_end|>"],
        layer=vision.depth,
        clip=_no_text_tower,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        chat="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
        "<|im_start|>assistant\n",
        max_new_tokens=60,
        processor=processor,
        frame=f"resized_pixels:{side},{processor.size['shortest_edge']},{processor.size['longest_edge']}",
    )
