"""LLaVA-PruMerge: keep the patches that [CLS] attends to most, with others merged into them. PruMerge+: add a grid.

Source: arXiv:2403.15388, github.com/42Shawn/LLaVA-PruMerge.
Score: a = softmax(cls_query . keys / sqrt(C)) of the tower's last block over [CLS] and patches, heads not split; then
  the patches' part of it.
Selection: the k - 1 highest scores and one leftover token; k = 1 has no room for it. keep None: scores above
  Q3 + 1.5 (Q3 - Q1) of the image, or the best if there is none (upstream takes quartiles over the whole batch and may
  keep none). Ties go to the lower raster index.
  plus, keep None: with m tokens by score, also every s-th from index 0 to N - 2, s = max(1, floor(floor(N / m) / 3)).
  plus, fixed keep: of the m = k - 1 tokens, ceil(m / 2) by score; the other g are spread over the L left in raster
  order, at places floor((j + 1/2) L / g).
  Option overlap: false (default), or true for what upstream does in training, where the g places are those among all N
  tokens, whatever the first half has; a token of both is kept once, so that fewer are kept (upstream reads it twice).
Merging, before the connector: each kept x_i becomes x_i + sum a_j x_j over the 32 other patches j with the keys most
  similar to its own (cosine; the weights do not sum to 1, and kept tokens count as others). The leftover token is
  sum a_j x_j over the pruned. If nothing is pruned, nothing is merged, so that keep = 1 is the unpruned model
  (upstream merges all the same, and appends a token of zeros).
  Option anchor, the raster index that the leftover token carries: "centroid" of the pruned, weighted by a (default),
  "last", or "drop" for no such token.
Order emitted: score, descending; with plus, then the grid in raster order; the leftover token last.
Upstream IDs: compact (permuted and shifted).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from analysis.pruning.common import emit, flag, leftover, ranking, token_count
from analysis.types import Selection, VisualTokens

NEIGHBOURS = 32


def score(visual: VisualTokens, *, seeds: Sequence[int] = ()) -> Tensor:
    """[B, N] attention of [CLS] to the patches."""
    keys, query = visual.signals.keys.float(), visual.signals.cls_query.float()
    logits = (keys @ query[..., None])[..., 0] / query.shape[-1] ** 0.5
    return logits.softmax(dim=1)[:, 1:]


def _with_grid(order: Tensor, count: Tensor, adaptive: bool, overlap: bool) -> tuple[Tensor, Tensor]:
    """The order and count of PruMerge+ from those of PruMerge."""
    n = order.shape[1]
    raster, rank = torch.arange(n, device=order.device), order.argsort(dim=1)
    if adaptive:
        best = rank < count[:, None]
        step = (n // count // 3).clamp(min=1)
        grid = (raster % step[:, None] == 0) & (raster < n - 1)
    else:
        m = int(count[0])  # a fixed keep gives every image the same
        half, g = m - m // 2, m // 2
        best = rank < half
        candidates = torch.ones_like(best) if overlap else ~best
        places = [(2 * j + 1) * (n if overlap else n - half) // (2 * g) for j in range(g)]
        grid = candidates & torch.isin(candidates.cumsum(dim=1) - 1, torch.tensor(places, device=order.device))
    place = torch.where(best, rank, torch.where(grid, n + raster, 2 * n + raster))
    return place.argsort(dim=1), (best | grid).sum(dim=1)


def _merged(visual: VisualTokens, index: Tensor, attention: Tensor) -> Tensor:
    """[B, K, D] tokens `index` [B, K] with their neighbours merged in."""
    keys = normalize(visual.signals.keys[:, 1:].float(), dim=-1)
    cosine = keys.take_along_dim(index[..., None], dim=1) @ keys.mT
    cosine.scatter_(2, index[..., None], -torch.inf)  # not itself
    near = cosine.argsort(dim=2, descending=True, stable=True)[..., : min(NEIGHBOURS, keys.shape[1] - 1)]
    weights = torch.zeros_like(cosine).scatter_(2, near, attention[:, None].take_along_dim(near, dim=2))
    weights.scatter_(2, index[..., None], 1)
    patches = visual.signals.patches
    return visual.connect((weights @ patches.float()).to(patches.dtype))


def prune(
    visual: VisualTokens,
    keep: float | None,
    *,
    seeds: Sequence[int] = (),
    plus: bool = False,
    anchor: str = "centroid",
    overlap: bool = False,
) -> list[Selection]:
    """The most attended tokens, merged with their neighbours, best first, then the leftover token.

    Raises ValueError on a bad keep ratio or option.
    """
    attention = score(visual)
    count, spare = token_count(attention, keep, anchor)
    order = ranking(attention)
    if flag(plus, "plus"):
        order, count = _with_grid(order, count, keep is None, flag(overlap, "overlap"))
    index, n = order[:, : int(count.max())], order.shape[1]
    untouched = visual.features.take_along_dim(index[..., None], dim=1)
    tokens = torch.where(count[:, None, None] < n, _merged(visual, index, attention), untouched)
    return emit(tokens, order, count, leftover(visual, order, count, attention, anchor) if spare else None)
