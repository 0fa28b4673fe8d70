"""FasterVLM: keep the patches that [CLS] attends to most.

Source: arXiv:2412.01818, github.com/Theia-4869/FasterVLM.
Score: attention of [CLS] to each patch, mean over heads, in the block that makes the layer the connector reads.
Selection: the k highest scores; ties go to the lower raster index.
Order emitted: raster.
Upstream IDs: compact (shifted).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from analysis.pruning.common import top_k
from analysis.types import VisualTokens


def score(visual: VisualTokens, *, seeds: Sequence[int] = ()) -> Tensor:
    """[B, N] attention of [CLS] to the patches."""
    return visual.signals.cls_attention.float()


prune = top_k(score, emit="raster")
