"""Qwen3-VL (arXiv:2511.21631) by `generate`: boxes in JSON, in thousandths of the image's width and height.

Facts this file fixes: the prompt is Qwen2.5-VL's; M-RoPE gives an image the planes (0, row, column), and the decoder's
first layers add features of the tower's middle to visual tokens (DeepStack), which go with the kept ones.
"""

from __future__ import annotations

from transformers import Qwen3VLForConditionalGeneration

from analysis.models import by_generate


def whole_class(config) -> tuple[type, dict]:
    """See `llava.whole_class`."""
    return Qwen3VLForConditionalGeneration, by_generate.OPTIONS


def assemble(whole: Qwen3VLForConditionalGeneration, **where) -> by_generate.ByGenerate:
    """See `by_generate.assemble`."""
    rec = "Locate {} in this image and output the bbox coordinates in JSON format."
    return by_generate.assemble(whole, **where, rec=rec, box_format="qwen3_vl", frame="resized")
