"""InternVL3 (arXiv:2504.10479) by `generate`: boxes in thousandths of the image's width and height.

Facts this file fixes: up to twelve tiles and a thumbnail, each of them pruned by itself, one ID a token; the expression
stands between <ref> and </ref>; a box is answered as <box>[[x1, y1, x2, y2]]</box>, of which decoding leaves the
brackets.
"""

from __future__ import annotations

from transformers import InternVLForConditionalGeneration

from analysis.models import by_generate


def whole_class(config) -> tuple[type, dict]:
    """See `llava.whole_class`."""
    return InternVLForConditionalGeneration, by_generate.OPTIONS


def assemble(whole: InternVLForConditionalGeneration, **where) -> by_generate.ByGenerate:
    """See `by_generate.assemble`."""
    rec = "Please provide the bounding box coordinate of the region this sentence describes: <ref>{}</ref>"
    return by_generate.assemble(whole, **where, rec=rec, box_format="internvl", frame="resized")
