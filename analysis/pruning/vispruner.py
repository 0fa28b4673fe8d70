"""VisPruner: half of the tokens by [CLS] attention, the others by taking out what resembles another.

Source: arXiv:2412.01818, github.com/Theia-4869/VisPruner.
Score: attention of [CLS] to each patch, mean over heads, in the block that makes the layer the connector reads; cosine
  between patches of that layer.
Selection: of k tokens, floor(important * k) by attention, best first; ties go to the lower raster index. The rest, in
  the order of their attention, is thinned until k - floor(important * k) are left: those at even places are compared
  with those at odd places, and the 8 (or as many as are too many) whose best cosine is highest are taken out; what
  is left of the even ones, by that cosine, goes before the odd ones in the next round. An odd number of tokens, which
  upstream cannot take, has one more at even places.
  Option important: share by attention, 0.5 as upstream.
Order emitted: raster.
Upstream IDs: compact (shifted).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

from analysis.pruning._budget import budget
from analysis.pruning.common import ranking
from analysis.types import Selection, VisualTokens, kept

ROUND = 8  # tokens taken out at once


def prune(
    visual: VisualTokens, keep: float | None, *, seeds: Sequence[int] = (), important: float = 0.5
) -> list[Selection]:
    """The tokens with most [CLS] attention, and distinct ones. Raises ValueError on a bad keep ratio or option."""
    if not isinstance(important, int | float) or not 0 <= important <= 1:
        raise ValueError(f"option important is the share kept by attention and must be in [0, 1], got {important!r}")
    k = budget(keep, visual.features.shape[1])
    order, m = ranking(visual.signals.cls_attention), int(important * k)
    best, rest, wanted = order[:, :m], order[:, m:], k - m
    patches = normalize(visual.signals.patches.float(), dim=-1)
    while wanted and (length := rest.shape[1]) > wanted:
        surplus = min(ROUND, length - wanted, (length + 1) // 2)
        tokens = patches.take_along_dim(rest[..., None], dim=1)
        likeness = (tokens[:, ::2] @ tokens[:, 1::2].mT).amax(dim=2)
        stay = rest[:, ::2].take_along_dim(ranking(likeness)[:, surplus:], dim=1)
        rest = torch.cat([stay, rest[:, 1::2]], dim=1)
    return kept(visual.features, torch.cat([best, rest[:, :wanted]], dim=1).sort(dim=1).values)
