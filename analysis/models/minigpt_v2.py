"""MiniGPT-v2: EVA tower, four patches to a token, one linear connector, Llama-2 decoder (arXiv:2310.09478,
github.com/Vision-CAIR/MiniGPT-4).

Facts this file fixes, from the upstream code: the image is resized to the tower's square, its aspect lost; the tower's
last layer is normalised, [CLS] dropped, and four consecutive patches of a row are laid side by side: a token is a strip
of 1 x 4 patches (at 448 pixels 32 rows x 8 columns). The text before and the text after the image are tokenized apart,
and BOS stands there twice, once from the template and once from the tokenizer. A box is answered as
"{<x1><y1><x2><y2>}", whole per cents of the image's width and height.

EVA-CLIP's text tower is not part of the model, so it offers no signals of text. Upstream publishes the connector and
LoRA weights; `convert.py` makes a folder of the class below from them, EVA's weights and Llama-2-chat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from analysis.models import base
from analysis.models.stem import install_stem
from analysis.types import Signals

STRIP = 4


class MiniGPTv2Config(LlavaConfig):
    model_type = "minigpt_v2"


class MiniGPTv2ForConditionalGeneration(LlavaForConditionalGeneration):
    """transformers' LLaVA with BLIP-2's EVA tower (its final norm at PyTorch's default epsilon, as upstream) and a
    linear connector of strips; with the testbed's stem where `vision_config.stem` says so."""

    config_class = MiniGPTv2Config

    def __init__(self, config):
        super().__init__(config)
        vision, tower = config.vision_config, self.model.vision_tower
        self.model.multi_modal_projector = nn.Linear(STRIP * vision.hidden_size, config.text_config.hidden_size)
        tower.post_layernorm.eps = 1e-5
        if getattr(vision, "stem", None):
            install_stem(tower.embeddings, vision)


AutoConfig.register("minigpt_v2", MiniGPTv2Config)
AutoModel.register(Blip2VisionConfig, Blip2VisionModel, exist_ok=True)


def strips(patches: Tensor) -> Tensor:
    """[B, N, C] in raster order -> [B, N / 4, 4, C]."""
    return patches.unflatten(1, (-1, STRIP))


class MiniGPTv2(base.Model):
    image = "<ImageHere>"
    ask_for = f"<Img>{image}</Img> [vqa] {{}}"
    rec = f"<Img>{image}</Img> [refer] give me the location of {{}}"
    box_format, frame, token_frame = "minigpt_v2", "resized", "resized"

    def squared(self, image):
        return image

    def look(self, pixels: Tensor) -> Signals:
        """Run the tower, EVA, on [B, 3, S, S]. A strip has its patches' features side by side, and the mean of their
        keys and of their [CLS] attention; [CLS] counts four times where it is compared with strips."""
        tower, final = self.tower, self.tower.encoder.layers[-1]
        before = tower.embeddings(pixels)
        for block in tower.encoder.layers[:-1]:
            before = block(before)
        read, width = tower.post_layernorm(final(before)), tower.config.hidden_size

        def part(number: int) -> Tensor:  # of the fused queries, keys and values
            return final.self_attn.qkv(final.layer_norm1(before))[..., number * width : (number + 1) * width]

        @torch.inference_mode()
        def cls_attention() -> Tensor:
            weights = final.self_attn(final.layer_norm1(before))[1].mean(dim=1)  # [B, 1 + N, 1 + N]
            return strips(weights[:, 0, 1:, None]).mean(dim=(2, 3))

        @torch.inference_mode()
        def keys() -> Tensor:
            all_keys = part(1)
            return torch.cat([all_keys[:, :1], strips(all_keys[:, 1:]).mean(dim=2)], dim=1)

        @torch.inference_mode()
        def read_keys() -> Tensor:  # the last block makes the layer that is read
            heads = keys().unflatten(-1, (tower.config.num_attention_heads, -1))
            return heads.mean(dim=2)

        return Signals(
            patches=lambda: strips(read[:, 1:]).flatten(2),
            cls=lambda: read[:, 0].repeat(1, STRIP),
            cls_attention=cls_attention,
            keys=keys,
            cls_query=lambda: part(0)[:, 0],
            read_keys=read_keys,
        )

    def texts(self, expressions: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
        return {}


def whole_class(config: MiniGPTv2Config) -> tuple[type, dict]:
    """See `llava.whole_class`."""
    return MiniGPTv2ForConditionalGeneration, {}


def assemble(whole: MiniGPTv2ForConditionalGeneration, **where) -> MiniGPTv2:
    """See `base.parts`; ValueError also where a row of patches does not split into strips."""
    fields = base.parts(whole, **where)
    rows, columns = fields["grid"]
    if columns % STRIP:
        raise ValueError(f"{fields['name']}: {columns} patches in a row do not split into strips of {STRIP}")
    return MiniGPTv2(
        **fields | dict(grid=(rows, columns // STRIP)),
        chat="<s>[INST] {} [/INST]",
        layer=whole.config.vision_config.num_hidden_layers,
    )
