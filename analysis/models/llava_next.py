"""LLaVA-NeXT (LLaVA-1.6): LLaVA-1.5's parts, and the image also in tiles of higher resolution (llava-vl.github.io).

Facts this file fixes, as in transformers: first the whole image, plainly resized; then a mosaic of tiles, the image
resized and padded to the one of `image_grid_pinpoints` that suits it best, of which the padding's tokens are dropped
and after each of whose rows a learned newline token follows. The prompt is Vicuna's as in LLaVA-1.5, or Mistral's.

The whole image and the mosaic are pruned each by itself (`pruning.images`). Of the mosaic, patches, keys and [CLS]
attention are its tiles' own; where a method needs one [CLS], it is the whole image's.

In which frame the real checkpoints answer is documented nowhere: "frame" in config.json says it, "padded" is the
default because LLaVA-1.5's training answers are in it. `12_real_checkpoints` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from analysis.models import base, llava
from analysis.models.stem import install_stem
from analysis.types import Signals, VisualTokens


@dataclass(frozen=True, kw_only=True)
class LlavaNext(base.Model):
    """See `base.Model`. newline: [D]; processor: transformers' own, which cuts the tiles."""

    newline: Tensor
    processor: LlavaNextImageProcessorPil
    frame: str = "padded"

    ask_for = llava.Llava.ask_for
    rec = llava.Llava.rec
    box_format = llava.Llava.box_format
    token_frame = "resized"  # of the whole image and, without the padding's tokens, of the mosaic

    def mosaic(self, size: tuple[int, int]) -> tuple[Tensor, int]:
        """For an image of size (width, height): [R, C] which token of all T tiles' lies where, and T.

        Raises ValueError for an image so thin that no token of its tiles lies outside the padding.
        """
        side, (rows, columns) = self.tower.config.image_size, self.grid
        shape = get_anyres_image_grid_shape(size[::-1], self.processor.image_grid_pinpoints, side)
        tokens = torch.arange(shape[0] * shape[1] * rows * columns).view(*shape, rows, columns)
        laid = tokens.transpose(1, 2).reshape(1, shape[0] * rows, shape[1] * columns)
        index = unpad_image(laid, size[::-1])[0]
        if not index.numel():
            raise ValueError(f"an image of {size[0]} x {size[1]} pixels is too thin: no token of its tiles is left")
        return index, shape[0] * shape[1]

    def layout(self, size: tuple[int, int]) -> tuple:
        index, tiles = self.mosaic(size)
        return tiles, *index.shape, *index.flatten().tolist()

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Input of the tower, [B, 1 + T, 3, S, S]: the whole image, then its tiles row by row."""
        pixels = self.processor([image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        return pixels.to(self.device, self.dtype)

    def see(self, pixels: Tensor, size: tuple[int, int]) -> VisualTokens:
        index, tiles = self.mosaic(size)
        views = self.look(pixels.flatten(0, 1))
        first = torch.arange(len(pixels), device=self.device) * (1 + tiles)
        features, place = self.connector(views.patches), index.flatten().to(self.device)

        def laid(tokens: Tensor) -> Tensor:
            """[B * (1 + T), N, ...] -> [B, R * C, ...]"""
            return tokens.unflatten(0, (-1, 1 + tiles))[:, 1:].flatten(1, 2)[:, place]

        closer = Signals(
            patches=lambda: laid(views.patches),
            cls=lambda: views.cls[first],
            cls_attention=lambda: laid(views.cls_attention),
            cls_query=lambda: views.cls_query[first],
            keys=lambda: torch.cat([views.keys[first, :1], laid(views.keys[:, 1:])], dim=1),
            read_keys=lambda: torch.cat([views.read_keys[first, :1], laid(views.read_keys[:, 1:])], dim=1),
            clip_patches=lambda: laid(views.clip_patches),
            clip_read=lambda: laid(views.clip_read),
        )
        return VisualTokens(
            features[first],
            self.grid,
            views.take(first),
            self.connector,
            tiles=VisualTokens(laid(features), tuple(index.shape), closer, self.connector, newline=self.newline),
        )


class StemLlavaNext(LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with the testbed's convolutional stem as patch embedding."""

    def __init__(self, config):
        super().__init__(config)
        install_stem(self.model.vision_tower.embeddings, config.vision_config)


def whole_class(config) -> tuple[type, dict]:
    """See `llava.whole_class`."""
    return StemLlavaNext if getattr(config.vision_config, "stem", None) else LlavaNextForConditionalGeneration, {}


def assemble(whole: LlavaNextForConditionalGeneration, **where) -> LlavaNext:
    """See `llava.assemble`; OSError also where there is no preprocessor_config.json."""
    config, fields = whole.config, base.parts(whole, **where)
    if config.text_config.model_type == "mistral":
        fields["chat"] = "[INST] {} [/INST]"
    return LlavaNext(
        **fields,
        layer=base.feature_layer(config),
        newline=whole.model.image_newline,
        frame=getattr(config, "frame", "padded"),
        processor=LlavaNextImageProcessorPil.from_pretrained(where["source"], local_files_only=True),
    )
