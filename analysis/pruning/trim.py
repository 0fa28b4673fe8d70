"""TRIM: keep patches by their dot product with the text, and the mean of all others.

Source: arXiv:2409.10994, github.com/FreedomIntelligence/TRIM.
Score: softmax over patches of minus the dot product of signals.clip_patches and the text, neither normalised. The
  patches *least* like the text win: that minus sign is in upstream's code, which gives no reason for it. Option lowest:
  true (default), or false for the patches most like the text.
  Option layer: "last" (default), signals.clip_patches, as CLIP itself embeds an image; or "read", upstream's: the layer
  that the connector reads, projected into CLIP's space.
  Option about: "prompt" (default, the whole question as upstream) or "expression".
Selection: the k - 1 highest scores and one leftover token, the mean patch of the pruned, before the connector;
  k = 1 has no room for it. keep None: scores above Q3 + 1.5 (Q3 - Q1) of the image, or the best if there is none
  (upstream takes quartiles over the whole batch and may keep none). Ties go to the lower raster index.
  Option anchor, the raster index that the leftover token carries: "centroid" of the pruned (default), "last", or
  "drop" for no such token.
Order emitted: raster, the leftover token last.
Upstream IDs: compact (shifted).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from analysis.pruning.common import clip_patches, emit, flag, leftover, ranking, text, token_count
from analysis.types import Selection, VisualTokens


def score(
    visual: VisualTokens,
    *,
    seeds: Sequence[int] = (),
    about: str = "prompt",
    lowest: bool = True,
    layer: str = "last",
) -> Tensor:
    """[B, N]. Raises ValueError on an unknown text or option."""
    words = text(visual.signals, about)  # first, so that a model without a text tower is told that it lacks one
    similarity = (clip_patches(visual.signals, layer) @ words[..., None])[..., 0]
    return (-similarity if flag(lowest, "lowest") else similarity).softmax(dim=1)


def prune(
    visual: VisualTokens,
    keep: float | None,
    *,
    seeds: Sequence[int] = (),
    about: str = "prompt",
    anchor: str = "centroid",
    lowest: bool = True,
    layer: str = "last",
) -> list[Selection]:
    """The tokens least (or most) like the text, then the mean of the others. ValueError on a bad keep or option."""
    likeness = score(visual, about=about, lowest=lowest, layer=layer)
    count, spare = token_count(likeness, keep, anchor)
    n = likeness.shape[1]
    pruned = ranking(likeness).argsort(dim=1) >= count[:, None]
    order = pruned.int().argsort(dim=1, stable=True)
    weights = (1 / (n - count).clamp(min=1))[:, None].expand(-1, n)
    tokens = visual.features.take_along_dim(order[..., None], dim=1)
    return emit(tokens, order, count, leftover(visual, order, count, weights, anchor) if spare else None)
