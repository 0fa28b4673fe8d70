"""FasterVLM: keep the patches that [CLS] attends to most.

Source: arXiv:2412.01818, github.com/Theia-4869/FasterVLM.
Score: attention of [CLS] to each patch, mean over heads, in the block that makes the layer the connector reads.
Selection: the k highest scores; ties go to the lower raster index.
Order emitted: raster.
Upstream IDs: compact (shifted).
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.pruning._budget import budget
from analysis.pruning._select import ranking
from analysis.types import Selection, VisualTokens, kept


def prune(visual: VisualTokens, keep: float | None, *, seeds: Sequence[int] = ()) -> list[Selection]:
    """The k tokens with most [CLS] attention. Raises ValueError on a bad keep ratio."""
    k = budget(keep, visual.features.shape[1])
    best = ranking(visual.signals.cls_attention)[:, :k]
    return kept(visual.features, best.sort(dim=1).values)
