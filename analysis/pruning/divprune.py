"""DivPrune: keep tokens that are far from each other.

Source: arXiv:2503.02175, github.com/vbdi/divprune.
Score: cosine distance between projected tokens (visual.features).
Selection: greedy max-min. First the token whose nearest other token is farthest; then, k - 1 times, the token whose
  nearest chosen token is farthest. Ties go to the lower raster index. A chosen token is never chosen again; upstream
  may choose it again where all others are copies of chosen ones. Upstream rounds halves of keep * N to even, not up.
Order emitted: raster.
Upstream IDs: compact (shifted).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

from analysis.pruning._budget import budget
from analysis.types import Selection, VisualTokens, kept


def prune(visual: VisualTokens, keep: float | None, *, seeds: Sequence[int] = ()) -> list[Selection]:
    """k mutually distant tokens. Raises ValueError on a bad keep ratio."""
    batch, n, _ = visual.features.shape
    k = budget(keep, n)
    tokens = normalize(visual.features.float(), dim=-1)
    distance = 1 - tokens @ tokens.mT
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest = distance.amin(dim=2)  # to any other token first, to a chosen one from then on
    chosen, image = [], torch.arange(batch, device=tokens.device)
    for _ in range(k):
        one = nearest.argmax(dim=1)
        nearest = torch.minimum(nearest, distance[image, one]) if chosen else distance[image, one]
        nearest[image, one] = -torch.inf  # and stays so
        chosen.append(one)
    return kept(visual.features, torch.stack(chosen, dim=1).sort(dim=1).values)
