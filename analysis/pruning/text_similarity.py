"""Text-visual similarity: keep the patches most like the words.

Source: baseline of arXiv:2506.21873; its code is not public, so space, text and order are this project's choices.
Score: cosine(text, signals.clip_patches) in the space that CLIP shares between image and text.
  Option about: "expression" (default, signals.clip_text) or "prompt" (the whole question, signals.clip_prompt).
Selection: the k highest scores; ties go to the lower raster index.
Order emitted: score, descending; order "raster" gives the other reading.
Upstream IDs: compact (permuted and shifted; under raster order only shifted).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import cosine_similarity

from analysis.pruning._budget import budget
from analysis.pruning._select import ranking, text
from analysis.types import Selection, VisualTokens, kept


def scores(visual: VisualTokens, about: str = "expression") -> Tensor:
    """[B, N]. Raises ValueError on an unknown text."""
    words = text(visual.signals, about)[
        :, None
    ]  # first, so that a model without a text tower is told that it lacks one
    return cosine_similarity(visual.signals.clip_patches.float(), words, dim=-1)


def prune(
    visual: VisualTokens, keep: float | None, *, seeds: Sequence[int] = (), about: str = "expression"
) -> list[Selection]:
    """The k tokens most similar to the text, best first. Raises ValueError on a bad keep ratio or option."""
    k = budget(keep, visual.features.shape[1])
    return kept(visual.features, ranking(scores(visual, about))[:, :k])
