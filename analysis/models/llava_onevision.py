"""LLaVA-OneVision (arXiv:2408.03326) by `generate`: LLaVA-1.5's question and fractions with two decimals.

Facts this file fixes: the plainly resized image, then its tiles, each of the two pruned by itself; one ID a token. In
which frame it answers is documented nowhere: "frame" in config.json says it, "resized" is the default, for that is
what the whole image is.
"""

from __future__ import annotations

from transformers import LlavaOnevisionForConditionalGeneration

from analysis.models import by_generate
from analysis.models.llava import REC_QUESTION


def whole_class(config) -> tuple[type, dict]:
    """See `llava.whole_class`."""
    return LlavaOnevisionForConditionalGeneration, by_generate.OPTIONS


def assemble(whole: LlavaOnevisionForConditionalGeneration, **where) -> by_generate.ByGenerate:
    """See `by_generate.assemble`."""
    frame = getattr(whole.config, "frame", "resized")
    return by_generate.assemble(whole, **where, rec=REC_QUESTION, box_format="llava", frame=frame)
