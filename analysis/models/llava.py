"""LLaVA-1.5: CLIP tower, two-layer projector, Llama decoder (arXiv:2310.03744).

Facts this file fixes, from the upstream code: the image is padded to a centred square, never cropped (transformers'
own processor crops); the connector reads one hidden layer of the tower without its [CLS] token; the prompt is
upstream's "vicuna_v1" with the image first; a box is answered as fractions of the padded square.
"""

from __future__ import annotations

from transformers import LlavaForConditionalGeneration

from analysis.models import base
from analysis.models.stem import install_stem

REC_QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: {}"


class Llava(base.Model):
    ask_for = "<image>\n{}"
    rec = f"<image>\n{REC_QUESTION}"
    box_format, frame = "llava", "padded"
    fill = (122, 116, 104)  # CLIP's mean colour, in whole numbers as upstream


class StemLlava(LlavaForConditionalGeneration):
    """LLaVA with the testbed's convolutional stem as patch embedding; `vision_config.stem` holds its channels."""

    def __init__(self, config):
        super().__init__(config)
        install_stem(self.model.vision_tower.embeddings, config.vision_config)


# tiny-llava was saved by transformers' own class, which renames the head's key; only that class renames it back
RENAMED = {r"^language_model\.lm_head": "lm_head"}


def whole_class(config) -> tuple[type, dict]:
    """The class of the whole model, and options of its `from_pretrained`."""
    if getattr(config.vision_config, "stem", None):
        return StemLlava, dict(key_mapping=RENAMED)
    return LlavaForConditionalGeneration, {}


def assemble(whole: LlavaForConditionalGeneration, **where) -> Llava:
    """See `base.parts` for the arguments; ValueError also for a variant that reads several layers or keeps [CLS]."""
    return Llava(**base.parts(whole, **where), layer=base.feature_layer(whole.config))
