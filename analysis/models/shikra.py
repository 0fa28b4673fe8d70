"""Shikra: CLIP tower, one linear connector, Llama decoder (arXiv:2306.15195, github.com/shikras/shikra).

Facts this file fixes, from the upstream code: the image is padded to a centred square with white; the connector reads
the second-last layer without [CLS]; <im_start> and <im_end> enclose the visual tokens, and the spaces before and after
them are no tokens; a referring expression is asked
for with one of 54 templates drawn at random, most of which put the image after the expression: here always with the
fifth; a box is answered as "Answer: [x1,y1,x2,y2] .", fractions of the square with three decimals.

Upstream publishes a delta on LLaMA-7B in the names of its own classes; `convert.py` makes a folder of the class below.
"""

from __future__ import annotations

from torch import nn
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from analysis.models import base
from analysis.models.stem import install_stem


class ShikraConfig(LlavaConfig):
    model_type = "shikra"


class ShikraForConditionalGeneration(LlavaForConditionalGeneration):
    """transformers' LLaVA with Shikra's connector; with the testbed's stem where `vision_config.stem` says so."""

    config_class = ShikraConfig

    def __init__(self, config):
        super().__init__(config)
        vision = config.vision_config
        self.model.multi_modal_projector = nn.Linear(vision.hidden_size, config.text_config.hidden_size)
        if getattr(vision, "stem", None):
            install_stem(self.model.vision_tower.embeddings, vision)


AutoConfig.register("shikra", ShikraConfig)


class Shikra(base.Model):
    image = "<im_start><im_patch><im_end>"
    marks = ("<im_start>", "<im_end>")
    ask_for = f"{image} {{}}"
    rec = f"Can you point out {{}} in the image {image} and provide the coordinates of its location?"
    box_format, frame = "shikra", "padded"
    fill = (255, 255, 255)


def whole_class(config: ShikraConfig) -> tuple[type, dict]:
    """See `llava.whole_class`."""
    return ShikraForConditionalGeneration, {}


def assemble(whole: ShikraForConditionalGeneration, **where) -> Shikra:
    """See `llava.assemble`."""
    return Shikra(**base.parts(whole, **where), layer=base.feature_layer(whole.config), max_new_tokens=60)
