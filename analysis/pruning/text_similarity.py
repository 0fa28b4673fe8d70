"""Text-visual similarity: keep the patches most like the words.

Source: baseline of arXiv:2506.21873; its code is not public, so space, text and order are this project's choices.
Score: cosine(text, signals.clip_patches) in the space that CLIP shares between image and text.
  Option about: "expression" (default, signals.clip_text) or "prompt" (the whole question, signals.clip_prompt).
  Option lowest: false (default), or true for the patches least like the text, as TRIM has it.
Selection: the k highest scores; ties go to the lower raster index.
Order emitted: score, descending; order "raster" gives the other reading.
Upstream IDs: compact (permuted and shifted; under raster order only shifted).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import cosine_similarity

from analysis.pruning.common import flag, text, top_k
from analysis.types import VisualTokens


def score(
    visual: VisualTokens, *, seeds: Sequence[int] = (), about: str = "expression", lowest: bool = False
) -> Tensor:
    """[B, N]. Raises ValueError on an unknown text or option."""
    words = text(visual.signals, about)  # first, so that a model without a text tower is told that it lacks one
    similarity = cosine_similarity(visual.signals.clip_patches.float(), words[:, None], dim=-1)
    return -similarity if flag(lowest, "lowest") else similarity


prune = top_k(score, emit="score")
