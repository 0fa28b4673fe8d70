"""DART: a few pivots, and for each of them the tokens least like it.

Source: arXiv:2502.11494, github.com/ZichenWen1/DART, read in github.com/ModelTC/LightCompress. Upstream works inside
  the decoder: keys and normalised states of a layer, and as many pivots among the words as in the image. Here, before
  the decoder, are the keys of the tower's last block and the projected tokens, and all pivots are the image's.
Score: sum of the absolute values of a patch's key, for pivots; cosine between projected tokens, for the others.
Selection: the p highest scores are pivots, p = min(pivots, k). In the order of their score each pivot takes the tokens
  of lowest cosine to it of those not taken: (k - p) / p of them, the first ones one more where that is not whole.
  Ties go to the lower raster index.
  Option pivots: 8, as many as upstream has in image and words together.
Order emitted: raster.
Upstream IDs: original.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from analysis.pruning._budget import budget
from analysis.pruning.common import ranking
from analysis.types import Selection, VisualTokens, kept


def key_norms(visual: VisualTokens) -> Tensor:
    """[B, N] L1 norm of each patch's key."""
    return visual.signals.keys[:, 1:].float().abs().sum(dim=2)


def prune(visual: VisualTokens, keep: float | None, *, seeds: Sequence[int] = (), pivots: int = 8) -> list[Selection]:
    """The pivots and what differs from them. Raises ValueError on a bad keep ratio or option."""
    if not isinstance(pivots, int) or isinstance(pivots, bool) or pivots < 1:
        raise ValueError(f"option pivots is a number of tokens and must be at least 1, got {pivots!r}")
    k = budget(keep, visual.features.shape[1])
    p = min(pivots, k)
    pivot, tokens = ranking(key_norms(visual))[:, :p], normalize(visual.features.float(), dim=-1)
    cosine = tokens.take_along_dim(pivot[..., None], dim=1) @ tokens.mT  # [B, p, N]
    taken = torch.zeros_like(cosine[:, 0], dtype=torch.bool).scatter_(1, pivot, True)
    for i in range(p):
        count = (k - p) // p + (i < (k - p) % p)
        order = ranking(-cosine[:, i].masked_fill(taken, torch.inf))
        taken.scatter_(1, order[:, :count], True)
    return kept(visual.features, taken.nonzero()[:, 1].view(len(taken), k))
