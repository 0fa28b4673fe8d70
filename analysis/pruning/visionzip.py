"""VisionZip: keep the patches that [CLS] attends to most, and merge all others into a few contextual tokens.

Source: arXiv:2412.04467, github.com/dvlab-research/VisionZip.
Score: attention of [CLS] to each patch, mean over heads (upstream: sum), in the block that makes the connector's layer.
Selection: of k tokens, c = 10 k / 64 rounded half up are contextual, as in upstream's setting 54 + 10; c = 0 if nothing
  is pruned. Dominant: the k - c highest scores; ties go to the lower raster index. Upstream's 54 include [CLS] itself,
  which has no place in the grid; here its place goes to one more patch.
  Contextual: of the R other patches in raster order, every floor(R / c)-th from the first is a target. Each patch that
  is none joins the target with the most similar key (cosine; ties go to the first). A contextual token is its target
  plus the mean of those that joined, before the connector; it carries its target's raster index.
  Option keys: "last" (default), signals.keys, of the tower's last block, heads side by side; or "read", upstream's: of
  the block that makes the connector's layer, mean over heads.
Order emitted: dominant in raster order, then contextual in raster order.
Upstream IDs: compact (shifted, contextual tokens moved to the end).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from analysis.pruning._budget import budget
from analysis.pruning.common import append, ranking
from analysis.registry import pick
from analysis.types import Selection, VisualTokens, kept

KEYS = {"last": "keys", "read": "read_keys"}


def _contextual(visual: VisualTokens, rest: Tensor, c: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, c, D] and origin [B, c] of the contextual tokens of patches `rest` [B, R] in raster order."""
    length = rest.shape[1]
    target = torch.arange(c, device=rest.device) * (length // c)
    patches = visual.signals.patches.take_along_dim(rest[..., None], dim=1).float()
    keys = normalize(keys[:, 1:].take_along_dim(rest[..., None], dim=1).float(), dim=-1)
    joined = one_hot((keys @ keys[:, target].mT).argmax(dim=2), c).float()  # [B, R, c]
    joined[:, target] = 0
    mean = joined.mT @ patches / joined.sum(dim=1)[..., None].clamp(min=1)
    tokens = (patches[:, target] + mean).to(visual.signals.patches.dtype)
    return visual.connect(tokens), rest[:, target]


def score(visual: VisualTokens, *, seeds: Sequence[int] = ()) -> Tensor:
    """[B, N] attention of [CLS] to the patches: the mean over heads ranks them as upstream's sum does."""
    return visual.signals.cls_attention.float()


def prune(
    visual: VisualTokens, keep: float | None, *, seeds: Sequence[int] = (), keys: str = "last"
) -> list[Selection]:
    """The most attended tokens, then the contextual ones. Raises ValueError on a bad keep ratio or option."""
    n, signal = visual.features.shape[1], pick(KEYS, keys, "value of option keys")
    k = budget(keep, n)
    c = (10 * k + 32) // 64 if k < n else 0
    order = ranking(score(visual))
    chosen = kept(visual.features, order[:, : k - c].sort(dim=1).values)
    if c == 0:
        return chosen
    features, origin = _contextual(visual, order[:, k - c :].sort(dim=1).values, c, getattr(visual.signals, signal))
    return [append(*one) for one in zip(chosen, features, origin)]
